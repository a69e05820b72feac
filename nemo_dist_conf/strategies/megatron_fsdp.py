"""strategy=megatron_fsdp: the names, defaults and rules of NVIDIA's Megatron-FSDP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, List, Mapping, Union

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.schema.option import option
from nemo_dist_conf.strategies.spec import Strategy, shallow_dict
from nemo_dist_conf.topology import AxisRules, Paths

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["MegatronFSDPConf", "MegatronFSDPConfig", "MegatronFSDPManager", "STRATEGY", "not_executed"]


def _llama_blocks() -> List[str]:
    return ["transformers.models.llama.modeling_llama.LlamaDecoderLayer"]


@dataclass
class MegatronFSDPConf:
    """Options of the megatron-fsdp package; names and defaults of the API page."""

    megatron_fsdp_unit_modules: List[str] = option(_llama_blocks, "class paths of the blocks that are sharded as units")
    zero_dp_strategy: int = option(
        3, "what is sharded: 0 nothing, 1 optimizer state, 2 also gradients, 3 also parameters"
    )
    init_fsdp_with_meta_device: bool = option(False, "build the model on the meta device and fill it unit by unit")
    grad_reduce_in_fp32: bool = option(False, "reduce gradients in float32")
    preserve_fp32_weights: bool = option(False, "keep float32 main weights for the optimizer")
    overlap_grad_reduce: bool = option(True, "reduce gradients while backward goes on")
    overlap_param_gather: bool = option(True, "gather parameters while forward goes on")
    check_for_nan_in_grad: bool = option(True, "stop when the global gradient norm is not finite")
    average_in_collective: bool = option(False, "let the collective average instead of scaling before it")
    disable_bucketing: bool = option(False, "one collective per unit instead of buckets")
    calculate_per_token_loss: bool = option(False, "sum gradients over ranks; the loss is divided by tokens elsewhere")
    keep_fp8_transpose_cache: bool = option(False, "keep the transposed fp8 weights between forward and backward")
    nccl_ub: bool = option(False, "register communication buffers with NCCL")
    fsdp_double_buffer: bool = option(False, "two persistent buffers instead of allocating one per unit")
    activation_checkpointing: Union[bool, str] = option(
        False, "true: recompute every block in backward; false: keep all"
    )


@dataclass
class MegatronFSDPConfig(MegatronFSDPConf):
    """Typed options of ``strategy=megatron_fsdp``. Sizes (dp, tp, cp) are in ParallelismSizes."""

    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        from nemo_dist_conf.runtime.lower import lower_config

        lower_config(self, "megatron_fsdp")

    def to_dict(self) -> Dict[str, Any]:
        """Fields by name."""
        return shallow_dict(self)


class MegatronFSDPManager:
    """Will wrap with the megatron-fsdp package; in this version it refuses, with the way out."""

    def __init__(self, config: MegatronFSDPConfig, device_mesh: DeviceMesh) -> None:
        self.config = config
        self.device_mesh = device_mesh

    def parallelize(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Any:
        """Raises ConfigError: this version checks megatron_fsdp configs but does not execute them."""
        raise ConfigError(not_executed(Paths()))


def not_executed(paths: Paths) -> Problem:
    """The refusal of a start, in the words of the command line."""
    return Problem(
        "strategy=megatron_fsdp composes and is checked, but this version does not execute it",
        paths.choose("strategy", "megatron_fsdp"),
        "fsdp2 or ddp",
        paths.choose("strategy", "fsdp2"),
    )


def _rules(conf: Mapping[str, Any], sizes: Mapping[str, Any], paths: Paths) -> list[Problem]:
    problems = []
    zero = conf["zero_dp_strategy"]
    if isinstance(zero, bool) or zero not in (0, 1, 2, 3):
        problems.append(
            Problem(
                f"zero_dp_strategy={zero} is not a ZeRO stage",
                paths.set("strategy.zero_dp_strategy", zero),
                "0 (nothing sharded), 1 (optimizer state), 2 (also gradients), 3 (also parameters)",
                paths.set("strategy.zero_dp_strategy", 3),
            )
        )
    for path in conf["megatron_fsdp_unit_modules"]:
        if "." not in path or not all(part.isidentifier() for part in path.split(".")):
            problems.append(
                Problem(
                    f"megatron_fsdp_unit_modules: {path!r} is not a class path",
                    paths.set("strategy.megatron_fsdp_unit_modules", f"[{path}]"),
                    "package.module.Class",
                    paths.set("strategy.megatron_fsdp_unit_modules", f"[{_llama_blocks()[0]}]"),
                )
            )
    return problems


_SHARDS = "shards over one data-parallel group"

STRATEGY = Strategy(
    name="megatron_fsdp",
    schema=MegatronFSDPConf,
    config=MegatronFSDPConfig,
    axes=AxisRules(
        strategy="megatron_fsdp",
        allowed=frozenset({"dp", "tp", "cp"}),
        mesh=("dp", "cp", "tp"),
        flattened=(("dp_cp", ("dp", "cp")),),
        why_not={
            "dp_replicate": _SHARDS,
            "pp": "has no pipeline stages",
            "ep": "has no expert mesh here",
        },
    ),
    rules=_rules,
    manager="nemo_dist_conf.strategies.megatron_fsdp:MegatronFSDPManager",
    activation_checkpointing=(False, True),
)
