"""strategy=fsdp2: parameters sharded block by block with torch's fully_shard, with HSDP, TP, SP, PP, CP and EP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Mapping, Optional, Union

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.names import DType
from nemo_dist_conf.schema.option import option
from nemo_dist_conf.schema.policies import MixedPrecisionConf, OffloadConf
from nemo_dist_conf.strategies.common import autocast_problems, lazy_attribute, off_but_changed
from nemo_dist_conf.strategies.spec import Strategy
from nemo_dist_conf.topology.axes import AxisRules
from nemo_dist_conf.wording import Spelling

if TYPE_CHECKING:
    from nemo_dist_conf.runtime.managers import FSDP2Manager

__all__ = ["FSDP2Conf", "FSDP2Manager", "OUTER_UNIT_ELEMENTS", "STRATEGY"]

#: Elements from which an embedding and a head are gathered and reduced on their own. Below, two more collectives cost
#: more than 1 MiB of float32 that waits for the end of backward.
OUTER_UNIT_ELEMENTS = 2**18


@dataclass
class FSDP2Conf:
    """Options of fully_shard and of what is applied before it."""

    sequence_parallel: bool = option(
        False, "with tensor parallelism: also split norms and the residual stream over the sequence"
    )
    # Optional[Dict] = None cannot be set from the command line (OmegaConf 2.3), so Any.
    tp_plan: Any = option(None, "tensor-parallel style by module name, {'layers.*.q':colwise}; null: the model's own")
    patch_is_packed_sequence: bool = option(
        False, "tell transformers that no batch is packed: saves a device sync per attention layer"
    )
    mp_policy: Optional[MixedPrecisionConf] = option(MixedPrecisionConf, "dtypes of compute and reduction; null: off")
    offload_policy: Optional[OffloadConf] = option(OffloadConf, "parameters in host memory; null: off")
    autocast_dtype: Optional[DType] = option(None, "run forward under torch.autocast in this dtype; null: no autocast")
    activation_checkpointing: Union[bool, str] = option(
        False, "true or full: recompute every block in backward; selective: keep matmuls and attention; false: keep all"
    )
    defer_fsdp_grad_sync: bool = option(
        True, "with gradient accumulation: reduce gradients in the last microbatch only"
    )
    reshard_after_forward: Optional[bool] = option(
        None, "free gathered parameters after forward; null: all but the last block's; inside a pipeline none"
    )
    enable_async_tensor_parallel: bool = option(
        False, "overlap tensor-parallel communication with matmuls (GPU; needs sequence_parallel and enable_compile)"
    )
    enable_compile: bool = option(False, "torch.compile every block")
    enable_fsdp2_prefetch: bool = option(False, "gather the next blocks' parameters ahead, as the two depths say")
    fsdp2_backward_prefetch_depth: int = option(2, "blocks gathered ahead in backward")
    fsdp2_forward_prefetch_depth: int = option(1, "blocks gathered ahead in forward")


def __getattr__(name: str) -> Any:
    return lazy_attribute(__name__, name, FSDP2Manager="nemo_dist_conf.runtime.managers")


def _rules(conf: Mapping[str, Any], sizes: Mapping[str, Any], spelling: Spelling) -> list[Problem]:
    problems = autocast_problems(conf, spelling)
    problems += off_but_changed(conf["offload_policy"], OffloadConf(), "strategy.offload_policy", spelling)
    problems += _prefetch_problems(conf, spelling)
    if conf["enable_compile"] and (sizes.get("ep_size") or 1) > 1:
        problems.append(
            Problem(
                what="how many tokens go to which expert is known in each step only, so blocks with split experts "
                "cannot be compiled",
                asked=f"{spelling.set('strategy.enable_compile', True)} "
                f"{spelling.set('parallelism.ep_size', sizes['ep_size'])}",
                allowed="enable_compile=false, or ep_size=1",
                instead=spelling.set("strategy.enable_compile", False),
            )
        )
    if conf["enable_compile"] and conf["sequence_parallel"] and (sizes.get("tp_size") or 1) > 1:
        problems += _older_torch_problems(spelling)
    if conf["enable_async_tensor_parallel"]:
        problems += _async_tp_problems(conf, sizes, spelling)
    return problems


def _older_torch_problems(spelling: Spelling) -> list[Problem]:
    """torch 2.11's backward of a compiled block ends in an error of its own where the sequence is split."""
    import importlib.metadata

    version = importlib.metadata.version("torch")
    if tuple(map(int, version.split(".")[:2])) >= (2, 13):
        return []
    compiled = spelling.set("strategy.enable_compile", True)
    return [
        Problem(
            what=f"torch {version} cannot compile blocks whose sequence is split",
            asked=f"{compiled} {spelling.set('strategy.sequence_parallel', True)}",
            allowed="one of the two, or torch 2.13",
            instead=spelling.set("strategy.enable_compile", False),
        )
    ]


def _prefetch_problems(conf: Mapping[str, Any], spelling: Spelling) -> list[Problem]:
    problems = []
    for name, default in (("fsdp2_backward_prefetch_depth", 2), ("fsdp2_forward_prefetch_depth", 1)):
        key, depth = f"strategy.{name}", conf[name]
        if depth < 0:
            problems.append(
                Problem(
                    what=f"{name}={depth} is not a number of blocks",
                    asked=spelling.set(key, depth),
                    allowed="0 (none ahead) or more",
                    instead=spelling.set(key, default),
                )
            )
        elif depth != default and not conf["enable_fsdp2_prefetch"]:
            switch = spelling.set("strategy.enable_fsdp2_prefetch", True)
            problems.append(
                Problem(
                    what=f"{name} was changed, but explicit prefetch is off",
                    asked=spelling.set(key, depth),
                    allowed=f"with {switch}",
                    instead=f"{switch} {spelling.set(key, depth)}",
                )
            )
    return problems


def _async_tp_problems(conf: Mapping[str, Any], sizes: Mapping[str, Any], spelling: Spelling) -> list[Problem]:
    needs = [
        ("sequence_parallel", conf["sequence_parallel"], "it overlaps the gathers of sequence parallelism"),
        ("enable_compile", conf["enable_compile"], "inductor does the overlapping"),
    ]
    missing = [(name, why) for name, on, why in needs if not on]
    asked = spelling.set("strategy.enable_async_tensor_parallel", True)
    problems = []
    if missing:
        names = " and ".join(f"{name}=true ({why})" for name, why in missing)
        also = " ".join(spelling.set(f"strategy.{name}", True) for name, _ in missing)
        problems.append(
            Problem(
                what=f"enable_async_tensor_parallel needs {' and '.join(name for name, _ in missing)}",
                asked=asked,
                allowed=names,
                instead=f"{asked} {also}",
            )
        )
    if (sizes.get("tp_size") or 1) == 1:
        problems.append(
            Problem(
                what="enable_async_tensor_parallel without tensor parallelism would do nothing",
                asked=asked,
                allowed="tp_size of 2 or more",
                instead=spelling.set("strategy.enable_async_tensor_parallel", False),
            )
        )
    return problems


STRATEGY = Strategy(
    name="fsdp2",
    schema=FSDP2Conf,
    typed="nemo_dist_conf.runtime.typed_configs:FSDP2Config",
    target="nemo_dist_conf.config.FSDP2Config",
    axes=AxisRules(
        strategy="fsdp2",
        allowed=frozenset({"dp", "dp_replicate", "tp", "pp", "cp", "ep"}),
        mesh=("pp", "dp_replicate", "dp_shard", "cp", "tp"),
        flattened=(
            ("dp", ("dp_replicate", "dp_shard")),
            ("dp_shard_cp", ("dp_shard", "cp")),
            ("dp_cp", ("dp_replicate", "dp_shard", "cp")),
        ),
    ),
    rules=_rules,
    engine="nemo_dist_conf.runtime.engines.fsdp2:FSDP2Engine",
    costs="nemo_dist_conf.plan.strategies.fsdp2:COSTS",
    compute_dtype="mp_policy.param_dtype",
)
