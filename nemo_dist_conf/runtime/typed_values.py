"""Names and mappings become torch's objects: dtypes, precision and offload policies, typed configs."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any, Mapping

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.names import DType, checkpointing_mode
from nemo_dist_conf.schema import MixedPrecisionConf, OffloadConf
from nemo_dist_conf.topology.checkpointing_modes import mode_problem
from nemo_dist_conf.wording import assigned, unknown_name

__all__ = [
    "LOWERED",
    "lower_config",
    "lower_dtype",
]


def lower_dtype(value: Any, path: str = "dtype") -> torch.dtype | None:
    """torch.dtype for a dtype, a DType, or a name such as ``bfloat16`` or ``torch.bfloat16``; None stays None.

    Raises ConfigError for anything else, at ``path``.
    """
    if value is None or isinstance(value, torch.dtype):
        return value
    name = value.value if isinstance(value, DType) else str(value).removeprefix("torch.")
    if name not in DType.__members__:
        raise ConfigError(
            unknown_name(
                name,
                DType.__members__,
                what=f"{path}: {value!r} is not a dtype",
                asked=assigned(path, value),
                allowed=", ".join(DType.__members__),
                offer=lambda known: assigned(path, known),
                otherwise=assigned(path, DType.bfloat16),
            )
        )
    return getattr(torch, name)


def _lower_mapping(value: Any, schema: type, path: str) -> dict[str, Any] | None:
    """A node's fields typed as its schema, from a mapping or a schema object; None where it is off.

    Raises ConfigError for unknown keys and wrong types.
    """
    if value is None:
        return None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        defaults = value == schema()
        value = dataclasses.asdict(value)
        if defaults:  # typed already; OmegaConf would take a millisecond of every build
            return value if value.pop("enabled", True) else None
    if isinstance(value, (Mapping, DictConfig)):
        typed = OmegaConf.structured(schema)
        given: Any = value
        for key in given:
            if key == "_target_":
                continue
            _set(typed, str(key), given[key], path)
        fields = OmegaConf.to_container(typed)
        if not isinstance(fields, dict):
            raise AssertionError(f"{schema} is not a mapping")
        values = {str(name): item for name, item in fields.items()}
        return values if values.pop("enabled", True) else None
    raise ConfigError(
        Problem(
            what=f"{path} is {value!r}, not a policy",
            asked=assigned(path, value),
            allowed="null, or the keys " + ", ".join(item.name for item in dataclasses.fields(schema)),
            instead=f"{path}=null",
        )
    )


def _set(typed: DictConfig, key: str, value: Any, path: str) -> None:
    if isinstance(value, torch.dtype):
        value = str(value).removeprefix("torch.")
    if key not in typed:
        raise ConfigError(
            unknown_name(
                key,
                map(str, typed),
                what=f"{path}.{key} is not an option",
                asked=assigned(f"{path}.{key}", value),
                allowed=", ".join(map(str, typed)),
                offer=lambda known: assigned(f"{path}.{known}", value),
                hint=True,
            )
        )
    try:
        typed[key] = value
    except OmegaConfBaseException as error:
        what = f"{path}.{key}: {str(error).splitlines()[0]}"
        asked, instead = assigned(f"{path}.{key}", value), assigned(f"{path}.{key}", typed[key])
        raise ConfigError(Problem(what=what, asked=asked, allowed="a value of its type", instead=instead)) from None


def _lower_mp_policy(value: Any, path: str = "strategy.mp_policy") -> MixedPrecisionPolicy | None:
    """MixedPrecisionPolicy for one, a schema node or a mapping of dtype names; None where it is off."""
    if isinstance(value, MixedPrecisionPolicy):
        return value
    fields = _lower_mapping(value, MixedPrecisionConf, path)
    if fields is None:
        return None
    dtypes = {name: lower_dtype(fields[name], f"{path}.{name}") for name in fields if name.endswith("_dtype")}
    return MixedPrecisionPolicy(**dtypes, cast_forward_inputs=fields["cast_forward_inputs"])


def _lower_offload_policy(value: Any, path: str = "strategy.offload_policy") -> CPUOffloadPolicy | None:
    """CPUOffloadPolicy for one, a schema node or a mapping; None where it is off."""
    if isinstance(value, CPUOffloadPolicy):
        return value
    if isinstance(value, Mapping) and "enabled" not in value:
        value = {**value, "enabled": True}  # a mapping in Python says what it wants; the switch is for the command line
    fields = _lower_mapping(value, OffloadConf, path)
    return None if fields is None else CPUOffloadPolicy(**fields)


#: Fields whose torch type the schema spells differently, with what makes the one from the other.
LOWERED = {
    "mp_policy": _lower_mp_policy,
    "offload_policy": _lower_offload_policy,
    "autocast_dtype": lower_dtype,
    "dtype": lower_dtype,
    "lm_head_precision": lower_dtype,
}


def lower_config(config: Any, section: str) -> None:
    """Convert a typed config's fields in place, from names, mappings or composed nodes.

    section: the node that the config stands for. The schema class that it inherits from says each field's type. What
    has that type already stays the object that was given. Raises ConfigError with all problems.
    """
    schema = type(config).__mro__[1]
    typed: DictConfig | None = None
    problems: list[Problem] = []
    for item in dataclasses.fields(config):
        path, value = f"{section}.{item.name}", getattr(config, item.name)
        try:
            if item.name == "activation_checkpointing":
                setattr(config, item.name, _lower_mode(value, path))
            elif item.name in LOWERED:
                setattr(config, item.name, LOWERED[item.name](value, path))
            elif item.name == "tp_plan":
                setattr(config, item.name, _plain_mapping(value, path))
            elif item.name != "loss_fn" and not _is_plain(value, item.default):
                typed = OmegaConf.structured(schema) if typed is None else typed
                _set(typed, item.name, value, section)
                plain = _plain(typed[item.name])
                setattr(config, item.name, value if type(plain) is type(value) and plain == value else plain)
        except ConfigError as error:
            problems += error.problems
    ConfigError.raise_if(problems)


def _is_plain(value: Any, default: Any) -> bool:
    """Whether a value is of its field's type already, so that OmegaConf need not be asked."""
    return value is default or (type(value) is type(default) and isinstance(value, (bool, int, float, str)))


def _plain(value: Any) -> Any:
    if isinstance(value, (DictConfig, ListConfig)):
        return OmegaConf.to_container(value, resolve=True)
    return value.value if isinstance(value, Enum) else value


def _lower_mode(value: Any, path: str) -> bool | str:
    problem = mode_problem(path, value)
    if problem is not None:
        raise ConfigError(problem)
    return checkpointing_mode(value) or False


def _plain_mapping(value: Any, path: str) -> dict[str, Any] | None:
    """A plain dict for a mapping or a composed node; None and a dict stay as they are.

    Raises ConfigError for anything else.
    """
    if value is None or (type(value) is dict and all(isinstance(key, str) for key in value)):
        return value
    if isinstance(value, DictConfig):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    raise ConfigError(
        Problem(
            what=f"{path} is {value!r}, not a mapping from module names to styles",
            asked=assigned(path, value),
            allowed="{module.name:style,...}, or null for the model's own plan",
            instead=f"{path}=null",
        )
    )
