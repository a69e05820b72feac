"""Typed twins of the groups parallelism, pipeline and moe; the strategies' typed configs stand with them."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Union

import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.lower import lower_config
from nemo_dist_conf.schema import MoEConf, PipelineConf

__all__ = ["MoEParallelizerConfig", "ParallelismSizes", "PipelineConfig"]


@dataclass(frozen=True)
class ParallelismSizes:
    """Ranks per axis. None: dp_size is inferred from the world size, dp_replicate_size means no replicas.

    Raises ConfigError for a size that is not a whole number of 1 or more.
    """

    dp_size: Optional[int] = None
    dp_replicate_size: Optional[int] = None
    tp_size: int = 1
    pp_size: int = 1
    cp_size: int = 1
    ep_size: int = 1

    def __post_init__(self) -> None:
        problems = []
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is None and item.default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                key = f"parallelism.{item.name}"
                optional = " or null" if item.default is None else ""
                default = "null" if item.default is None else item.default
                what = f"{key}={value!r} is not a number of ranks"
                problems.append(
                    Problem(what, f"{key}={value}", f"a whole number, 1 or more{optional}", f"{key}={default}")
                )
        ConfigError.raise_if(problems)


@dataclass
class MoEParallelizerConfig(MoEConf):
    """How the experts of a mixture-of-experts model are wrapped, for ep_size above 1.

    mp_policy None: as the strategy's. lm_head_precision: a dtype or its name.
    """

    lm_head_precision: Optional[Union[str, torch.dtype]] = None  # type: ignore[assignment]
    mp_policy: Optional[MixedPrecisionPolicy] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        lower_config(self, "moe")

    def to_dict(self) -> Dict[str, Any]:
        """Fields by name; policies stay objects."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}


@dataclass
class PipelineConfig(PipelineConf):
    """Schedule and splitting of a pipeline, for pp_size above 1.

    loss_fn: a callable, or its class path. round_virtual_stages_to_pp_multiple: "up", "down" or None.
    """

    round_virtual_stages_to_pp_multiple: Optional[str] = None  # type: ignore[assignment]
    module_fqns_per_model_part: Optional[List[List[str]]] = None
    dtype: Optional[torch.dtype] = None  # type: ignore[assignment]
    loss_fn: Optional[Callable[..., Any]] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        lower_config(self, "pipeline")
        if isinstance(self.loss_fn, str):
            self.loss_fn = _import(self.loss_fn)

    def to_dict(self) -> Dict[str, Any]:
        """Fields by name."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}


def _import(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        found = None
    if not callable(found):
        key = "pipeline.loss_fn"
        what = f"{key}: {path!r} is not an importable function"
        raise ConfigError(Problem(what, f"{key}={path}", "package.module.function, or null", f"{key}=null"))
    return found
