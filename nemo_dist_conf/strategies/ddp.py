"""strategy=ddp: the whole model on every rank, gradients averaged by DistributedDataParallel."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Mapping, Optional, Union

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.names import DType
from nemo_dist_conf.schema.option import option
from nemo_dist_conf.strategies.common import autocast_problems, lazy_attribute
from nemo_dist_conf.strategies.spec import Strategy
from nemo_dist_conf.topology.axes import AxisRules
from nemo_dist_conf.wording import Spelling

if TYPE_CHECKING:
    from nemo_dist_conf.runtime.managers import DDPManager

__all__ = ["DDPConf", "DDPManager", "STRATEGY"]


@dataclass
class DDPConf:
    """Options of torch.nn.parallel.DistributedDataParallel, and what is applied before it."""

    activation_checkpointing: Union[bool, str] = option(
        False, "true or full: recompute every block in backward; selective: keep matmuls and attention; false: keep all"
    )
    broadcast_buffers: bool = option(False, "send rank 0's buffers to all ranks before every forward")
    find_unused_parameters: bool = option(False, "search each forward for parameters that get no gradient")
    static_graph: bool = option(False, "promise that the same parameters are used in every step")
    bucket_cap_mb: Optional[float] = option(None, "MiB of gradients reduced at once; null: torch's 25")
    gradient_as_bucket_view: bool = option(False, "let gradients live in the buckets: saves one copy of them")
    autocast_dtype: Optional[DType] = option(None, "run forward under torch.autocast in this dtype; null: no autocast")


def __getattr__(name: str) -> Any:
    return lazy_attribute(__name__, name, DDPManager="nemo_dist_conf.runtime.managers")


def _rules(conf: Mapping[str, Any], sizes: Mapping[str, Any], spelling: Spelling) -> list[Problem]:
    problems = autocast_problems(conf, spelling)
    bucket = conf["bucket_cap_mb"]
    if bucket is not None and not 0 < bucket < math.inf:
        problems.append(
            Problem(
                what=f"strategy.bucket_cap_mb={bucket:g} is not a size",
                asked=spelling.set("strategy.bucket_cap_mb", int(bucket) if float(bucket).is_integer() else bucket),
                allowed="MiB above 0, or null for torch's 25",
                instead=spelling.set("strategy.bucket_cap_mb", None),
            )
        )
    return problems


_WHOLE = "keeps the whole model on every rank"

STRATEGY = Strategy(
    name="ddp",
    schema=DDPConf,
    typed="nemo_dist_conf.runtime.typed_configs:DDPConfig",
    target="nemo_dist_conf.config.DDPConfig",
    axes=AxisRules(
        strategy="ddp",
        allowed=frozenset({"dp"}),
        mesh=("dp",),
        why_not={
            "tp": _WHOLE,
            "pp": _WHOLE,
            "ep": _WHOLE,
            "cp": "gives every rank whole sequences",
            "dp_replicate": "is one group of replicas already",
        },
        instead="fsdp2",
        instead_for=frozenset({"dp_replicate", "tp"}),
    ),
    rules=_rules,
    engine="nemo_dist_conf.runtime.engines.ddp:DDPEngine",
    costs="nemo_dist_conf.plan.strategies.ddp:COSTS",
    needs_mesh=False,
    compute_dtype="autocast_dtype",
)
