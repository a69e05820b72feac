"""What the resolvers of the recipe's YAML answer."""

from __future__ import annotations

from typing import Any, Mapping

from omegaconf import OmegaConf

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.topology.gpu_presence import cuda_present
from nemo_dist_conf.topology.launched_ranks import planned_world_size
from nemo_dist_conf.topology.solve import model_ranks
from nemo_dist_conf.wording import assigned, unknown_name

__all__ = ["autocast_dtype", "compute_dtype", "explain_target", "pipeline_rows"]

_DTYPES = ("auto", "float32", "bfloat16", "float16")


def compute_dtype(dtype: Any, device: str) -> str:
    """``train.dtype`` as a dtype's name: auto is bfloat16 on CUDA and float32 on the CPU."""
    if dtype not in _DTYPES:
        raise ConfigError(
            unknown_name(
                dtype,
                _DTYPES,
                what=f"train.dtype={dtype} is not a dtype to train in",
                asked=assigned("train.dtype", dtype),
                allowed=", ".join(_DTYPES),
                offer=lambda known: assigned("train.dtype", known),
            )
        )
    if dtype != "auto":
        return str(dtype)
    return "bfloat16" if device == "cuda" or (device == "auto" and cuda_present()) else "float32"


def autocast_dtype(dtype: Any, device: str) -> str | None:
    """The same for torch.autocast, where float32 means none."""
    name = compute_dtype(dtype, device)
    return None if name == "float32" else name


def pipeline_rows(parallelism: Any, global_batch_size: Any, micro_batch_size: Any) -> int:
    """``pipeline.pp_batch_size`` of the recipe: the rows that a data rank hands to the pipeline at a time.

    1, which is the default, without a pipeline and where the sizes do not fit: that is refused by their own rules.
    """
    given = parallelism if isinstance(parallelism, Mapping) else {}
    sizes = {name: given.get(name, 1) for name in ("pp_size", "cp_size", "tp_size")}
    if not all(isinstance(value, int) and value > 0 for value in (*sizes.values(), global_batch_size)):
        return 1
    data_ranks = max(1, planned_world_size() // model_ranks(sizes))
    if sizes["pp_size"] == 1 or global_batch_size % data_ranks:
        return 1
    return int(micro_batch_size or global_batch_size // data_ranks)


def explain_target(target: str, root: Any) -> str:
    """Help texts of the composed strategy, the other sections and the switches, with their values, for ``--help``."""
    from nemo_dist_conf.composition.explain import explain
    from nemo_dist_conf.composition.sections import SECTIONS, leaves
    from nemo_dist_conf.schema import SwitchesConf, documented
    from nemo_dist_conf.strategies import strategy_of_target

    strategy = strategy_of_target(target)
    nodes = {name: root.get(name) for name in ("strategy", *SECTIONS)}
    held = {name: OmegaConf.to_container(node, resolve=True) for name, node in nodes.items() if OmegaConf.is_dict(node)}
    held |= {row.name: root.get(row.name) for row in documented(SwitchesConf) if row.name in root}
    chosen = (*([f"strategy={strategy.name}"] if strategy else []), *SECTIONS, "batch_statistics")
    return explain(*chosen, values=leaves(held))
