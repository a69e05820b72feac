"""strategy=megatron_fsdp: NVIDIA's Megatron-FSDP, with TP and CP: its names, defaults and rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, List, Mapping, Union

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.schema.option import option
from nemo_dist_conf.strategies.common import has_module, lazy_attribute, unknown_class
from nemo_dist_conf.strategies.spec import Strategy
from nemo_dist_conf.topology.axes import AxisRules
from nemo_dist_conf.topology.gpu_presence import cuda_present
from nemo_dist_conf.topology.launched_ranks import runs_here
from nemo_dist_conf.wording import Spelling

if TYPE_CHECKING:
    from nemo_dist_conf.runtime.managers import MegatronFSDPManager

__all__ = ["MegatronFSDPConf", "MegatronFSDPManager", "STRATEGY", "library_problems"]


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
        False, "true or full: recompute every block in backward; false: keep all"
    )


def __getattr__(name: str) -> Any:
    return lazy_attribute(__name__, name, MegatronFSDPManager="nemo_dist_conf.runtime.managers")


def library_problems(spelling: Spelling = Spelling()) -> list[Problem]:
    """That the megatron-fsdp package is there, in a version whose arguments are known. Imports nothing of it."""
    import importlib.metadata  # longer than all of our modules, and most configs are of other strategies

    try:
        version = importlib.metadata.version("megatron-fsdp")
    except importlib.metadata.PackageNotFoundError:
        version = None
    if version is not None and version.startswith("0.6."):
        return []
    what = "strategy=megatron_fsdp needs the package megatron-fsdp"
    if version is not None:
        what = f"megatron-fsdp {version} is installed, whose options and results are not those of 0.6"
    asked, allowed = spelling.choose("strategy", "megatron_fsdp"), "megatron-fsdp 0.6; or fsdp2, which needs no package"
    return [Problem(what=what, asked=asked, allowed=allowed, instead="pip install 'nemo_dist_conf[megatron]'")]


#: Where the library looks for memory that NCCL can register (megatron_fsdp/param_and_grad_buffer.py).
_ALLOCATORS = {"megatron.core.nccl_allocator": "megatron-core", "apex.contrib.nccl_allocator": "apex"}


def _allocator_problems(conf: Mapping[str, Any], spelling: Spelling) -> list[Problem]:
    if not conf["nccl_ub"] or any(has_module(path) for path in _ALLOCATORS):
        return []
    return [
        Problem(
            what="buffers registered with NCCL need an allocator of another package, and neither is installed",
            asked=spelling.set("strategy.nccl_ub", True),
            allowed=f"false, or {' or '.join(_ALLOCATORS.values())} installed",
            instead=spelling.set("strategy.nccl_ub", False),
        )
    ]


def _cuda_problems(conf: Mapping[str, Any], sizes: Mapping[str, Any], spelling: Spelling) -> list[Problem]:
    """The library runs on CUDA only. What comes closest elsewhere depends on what was to be sharded."""
    if not runs_here() or cuda_present():
        return []
    model_axes = any((sizes.get(name) or 1) > 1 for name in ("tp_size", "cp_size"))
    closest = spelling.choose("strategy", "fsdp2")
    if conf["zero_dp_strategy"] in (0, 1) and not model_axes:
        closest = spelling.choose("strategy", "ddp")
    elif conf["zero_dp_strategy"] == 2:
        closest = f"{closest} {spelling.set('strategy.reshard_after_forward', False)}"
    return [
        Problem(
            what="megatron-fsdp runs on CUDA devices only, and there is none here",
            asked=spelling.choose("strategy", "megatron_fsdp"),
            allowed="a machine with GPUs; fsdp2 and ddp run anywhere",
            instead=closest,
        )
    ]


def _rules(conf: Mapping[str, Any], sizes: Mapping[str, Any], spelling: Spelling) -> list[Problem]:
    problems = []
    zero = conf["zero_dp_strategy"]
    if isinstance(zero, bool) or zero not in (0, 1, 2, 3):
        problems.append(
            Problem(
                what=f"zero_dp_strategy={zero} is not a ZeRO stage",
                asked=spelling.set("strategy.zero_dp_strategy", zero),
                allowed="0 (nothing sharded), 1 (optimizer state), 2 (also gradients), 3 (also parameters)",
                instead=spelling.set("strategy.zero_dp_strategy", 3),
            )
        )
    units = conf["megatron_fsdp_unit_modules"]
    for path in units if units != _llama_blocks() else []:
        why = unknown_class(path)
        if why:
            problems.append(
                Problem(
                    what=f"megatron_fsdp_unit_modules: {path!r} {why}",
                    asked=spelling.set("strategy.megatron_fsdp_unit_modules", [path]),
                    allowed="package.module.Class of a repeated layer; the default: the model's own blocks",
                    instead=spelling.set("strategy.megatron_fsdp_unit_modules", _llama_blocks()),
                )
            )
    if not problems:
        problems += _contradictions(conf, sizes, spelling)
    return (
        problems
        + library_problems(spelling)
        + _allocator_problems(conf, spelling)
        + _cuda_problems(conf, sizes, spelling)
    )


def _contradictions(conf: Mapping[str, Any], sizes: Mapping[str, Any], spelling: Spelling) -> list[Problem]:
    """Options that the library would override without a word, or refuse in the middle of wrapping."""
    zero = conf["zero_dp_strategy"]
    stage = spelling.set("strategy.zero_dp_strategy", zero)
    problems = []

    def contradict(name: str, why: str, allowed: str, *also: str) -> None:
        key, value = f"strategy.{name}", conf[name]
        asked = " ".join([spelling.set(key, value), *also])
        problems.append(Problem(what=why, asked=asked, allowed=allowed, instead=spelling.set(key, not value)))

    if not conf["overlap_grad_reduce"] and zero >= 2:
        why = f"with zero_dp_strategy={zero} gradients are always reduced while backward goes on"
        contradict("overlap_grad_reduce", why, "true, or zero_dp_strategy of 0 or 1", stage)
    if not conf["overlap_param_gather"] and zero == 3:
        why = "with zero_dp_strategy=3 parameters are always gathered while forward goes on"
        contradict("overlap_param_gather", why, "true, or zero_dp_strategy of 0 to 2", stage)
    if conf["init_fsdp_with_meta_device"] and zero == 0:
        why = "with zero_dp_strategy=0 every rank holds the whole model, so it is not built on the meta device"
        contradict("init_fsdp_with_meta_device", why, "false, or zero_dp_strategy of 1 to 3", stage)
    if conf["init_fsdp_with_meta_device"] and (sizes.get("tp_size") or 1) > 1:
        why = "tensor parallelism splits the model before the library sees it, so the library cannot fill it"
        also = spelling.set("parallelism.tp_size", sizes["tp_size"])
        contradict("init_fsdp_with_meta_device", why, "false, or tp_size=1", also)
    if conf["average_in_collective"] and conf["calculate_per_token_loss"]:
        why = "gradients are either averaged over ranks or summed, for a loss that is divided by tokens elsewhere"
        also = spelling.set("strategy.calculate_per_token_loss", True)
        contradict("average_in_collective", why, "one of the two", also)
    return problems


_SHARDS = "shards over one data-parallel group"

STRATEGY = Strategy(
    name="megatron_fsdp",
    schema=MegatronFSDPConf,
    typed="nemo_dist_conf.runtime.typed_configs:MegatronFSDPConfig",
    target="nemo_dist_conf.config.MegatronFSDPConfig",
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
        instead="fsdp2",
        instead_for=frozenset({"dp_replicate", "tp"}),
    ),
    rules=_rules,
    engine="nemo_dist_conf.runtime.engines.megatron_fsdp:MegatronFSDPEngine",
    activation_checkpointing=(False, True),
    costs="nemo_dist_conf.plan.strategies.megatron_fsdp:COSTS",
    sums_gradients="calculate_per_token_loss",
    loss_scaling=False,
)
