"""The typed configs of the API page: each group's schema with torch's objects in place of their names.

Schemas are what OmegaConf types without torch; these classes inherit their fields, order and defaults
(docs/decisions/0001) and restate what torch spells differently.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, TypeVar, Union

import torch
from omegaconf import DictConfig, OmegaConf
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.typed_values import LOWERED, lower_config
from nemo_dist_conf.schema import MixedPrecisionConf, MoEConf, PipelineConf
from nemo_dist_conf.strategies.ddp import DDPConf
from nemo_dist_conf.strategies.fsdp2 import FSDP2Conf
from nemo_dist_conf.strategies.megatron_fsdp import MegatronFSDPConf
from nemo_dist_conf.topology.axes import AXES
from nemo_dist_conf.topology.solve import number_problem
from nemo_dist_conf.wording import assigned, unknown_name

__all__ = [
    "DDPConfig",
    "FSDP2Config",
    "MegatronFSDPConfig",
    "MoEParallelizerConfig",
    "ParallelismSizes",
    "PipelineConfig",
    "typed_config",
    "unknown_options",
]

_Class = TypeVar("_Class", bound=type)

#: Hints of fields that hold what OmegaConf has no type for, or more than the page's type says.
_HINTS: Dict[str, Any] = {
    "activation_checkpointing": Union[bool, str],
    "loss_fn": Any,
    **dict.fromkeys(LOWERED, Any),
}


def _with_hints(config: _Class) -> _Class:
    """The class, with hints that OmegaConf can have where it is read by them: OmegaConf.structured, Hydra, hydra-zen.

    The dataclass fields keep the page's types; ``typing.get_type_hints`` says Any for torch's dtypes and policies,
    which is also what may be handed in: names and mappings.
    """
    config.__annotations__.update({name: hint for name, hint in _HINTS.items() if name in config.__annotations__})
    return config


def _fields(config: Any) -> Dict[str, Any]:
    return {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}


@_with_hints
@dataclass
class DDPConfig(DDPConf):
    """Typed options of ``strategy=ddp``; dtypes may be given by name.

    DDP has data parallelism only: dp_size is the world size.
    """

    activation_checkpointing: bool = False
    autocast_dtype: Optional[torch.dtype] = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        lower_config(self, "strategy")

    def to_dict(self) -> Dict[str, Any]:
        """Fields by name."""
        return _fields(self)


@_with_hints
@dataclass
class FSDP2Config(FSDP2Conf):
    """Typed options of ``strategy=fsdp2``; dtypes and policies may also be given by name or as mappings.

    Sizes of axes are in ParallelismSizes. mp_policy None: no mixed precision.
    """

    tp_plan: Optional[dict] = None
    mp_policy: Optional[MixedPrecisionPolicy] = field(default_factory=MixedPrecisionConf)  # type: ignore[assignment]
    offload_policy: Optional[CPUOffloadPolicy] = None  # type: ignore[assignment]
    autocast_dtype: Optional[torch.dtype] = None  # type: ignore[assignment]
    activation_checkpointing: Union[bool, str] = False

    def __post_init__(self) -> None:
        lower_config(self, "strategy")

    def to_dict(self) -> Dict[str, Any]:
        """Fields by name; policies stay objects."""
        return _fields(self)


@_with_hints
@dataclass
class MegatronFSDPConfig(MegatronFSDPConf):
    """Typed options of ``strategy=megatron_fsdp``. Sizes (dp, tp, cp) are in ParallelismSizes."""

    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        lower_config(self, "strategy")

    def to_dict(self) -> Dict[str, Any]:
        """Fields by name."""
        return _fields(self)


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
        found = (number_problem(axis, getattr(self, axis.size_field)) for axis in AXES)
        ConfigError.raise_if(problem for problem in found if problem is not None)


@_with_hints
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
        return _fields(self)


@_with_hints
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
        return _fields(self)


def _import(path: str) -> Callable[..., Any]:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        found = None
    if not callable(found):
        key = "pipeline.loss_fn"
        what = f"{key}: {path!r} is not an importable function"
        raise ConfigError(
            Problem(
                what=what, asked=assigned(key, path), allowed="package.module.function, or null", instead=f"{key}=null"
            )
        )
    return found


def typed_config(value: Any, config: type, section: str) -> Any:
    """The typed config for one, which stays that object, or for a mapping or composed node of its fields; None is None.

    Raises ConfigError for anything else, and for keys that it does not have.
    """
    if value is None or isinstance(value, config):
        return value
    known = [item.name for item in dataclasses.fields(config)]
    plain = OmegaConf.to_container(value, resolve=True) if isinstance(value, DictConfig) else value
    if not isinstance(plain, Mapping):
        what = f"{section} is {value!r}, which holds no options"
        allowed = f"{config.__name__}, or a mapping with the keys {', '.join(known)}"
        raise ConfigError(
            Problem(what=what, asked=f"{section}={value!r}", allowed=allowed, instead=f"{config.__name__}()")
        )
    fields = {str(key): item for key, item in plain.items() if key != "_target_"}
    unknown = [key for key in fields if key not in known]
    if unknown:
        raise ConfigError(unknown_options(section, section, unknown, fields, known))
    return config(**fields)


def unknown_options(
    section: str, said: str, unknown: Sequence[str], values: Mapping[str, Any], known: Iterable[str]
) -> Problem:
    """The problem of options that a section does not have. said: the section as the finding calls it."""
    return unknown_name(
        unknown[0],
        known,
        what=f"{said} has no option {', '.join(unknown)}",
        asked=assigned(f"{section}.{unknown[0]}", values[unknown[0]]),
        allowed=", ".join(known),
        offer=lambda name: assigned(f"{section}.{name}", values[unknown[0]]),
    )
