"""What the resolvers of the recipe's YAML answer."""

from __future__ import annotations

from typing import Any

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.names import nearest
from nemo_dist_conf.topology.device import cuda_present

__all__ = ["autocast_dtype", "compute_dtype", "explain_target"]

_DTYPES = ("auto", "float32", "bfloat16")


def compute_dtype(dtype: Any, device: str) -> str:
    """``train.dtype`` as a dtype's name: auto is bfloat16 on CUDA and float32 on the CPU."""
    if dtype not in _DTYPES:
        likely = nearest(str(dtype), _DTYPES) or ["auto"]
        also = " (float16 would need loss scaling, which this recipe does not do)" if dtype == "float16" else ""
        what = f"train.dtype={dtype} is not a dtype to train in{also}"
        best = "bfloat16" if dtype == "float16" else likely[0]
        raise ConfigError(Problem(what, f"train.dtype={dtype}", ", ".join(_DTYPES), f"train.dtype={best}"))
    if dtype != "auto":
        return str(dtype)
    return "bfloat16" if device == "cuda" or (device == "auto" and cuda_present()) else "float32"


def autocast_dtype(dtype: Any, device: str) -> str | None:
    """The same for torch.autocast, where float32 means none."""
    name = compute_dtype(dtype, device)
    return None if name == "float32" else name


def explain_target(target: str) -> str:
    """Help texts of the composed strategy and of the other sections, for an app's ``--help``."""
    from nemo_dist_conf.compose import SECTIONS
    from nemo_dist_conf.explain import explain
    from nemo_dist_conf.strategies import strategy_of_target

    strategy = strategy_of_target(target)
    return explain(*([f"strategy={strategy.name}"] if strategy else []), *SECTIONS)
