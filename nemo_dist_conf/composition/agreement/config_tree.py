"""A config as it is written and as it reads, and the one time that all ranks read."""

from __future__ import annotations

import datetime
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_dist_conf.composition.agreement.drawn_values import can_be_sent, rank_variables_open
from nemo_dist_conf.composition.hydra_inside import is_missing, is_null, written_at
from nemo_dist_conf.composition.store import register_resolver
from nemo_dist_conf.wording import typed

__all__ = ["as_ranks_read", "different_keys", "flat_config", "same_now"]


def as_ranks_read(config: DictConfig) -> Any:
    """The tree as plain containers: values where one process can say them for all, else what is written there."""
    with rank_variables_open():
        return _read(config)


def _read(node: Any) -> Any:
    if is_null(node) or is_missing(node):
        return None if is_null(node) else "???"
    keys: Any = list(node) if isinstance(node, DictConfig) else range(len(node))
    values = [_read_value(node, key) for key in keys]
    return dict(zip(keys, values)) if isinstance(node, DictConfig) else values


def _read_value(node: Any, key: Any) -> Any:
    try:
        value = node[key]
    except (OmegaConfBaseException, LookupError, ValueError, TypeError, AttributeError):
        return written_at(node, key)
    if OmegaConf.is_config(value):
        return _read(value)
    return value if can_be_sent(value) else written_at(node, key)


def same_now(now: datetime.datetime, *configs: DictConfig) -> None:
    """``${now:...}`` gives this time from here on, also in configs that have asked for it before."""
    register_resolver("now", lambda pattern: now.strftime(pattern), use_cache=True)
    for config in configs:
        OmegaConf.clear_cache(config)


def flat_config(config: DictConfig) -> dict[str, str]:
    """Dotted key -> value as it is typed, without Hydra's own node; interpolations are not resolved."""
    tree: Any = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    return dict(_flatten({key: value for key, value in tree.items() if key != "hydra"}))


def different_keys(mine: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """Keys that do not hold the same in both."""
    return sorted(key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key))


def _flatten(tree: Any, path: str = "") -> Any:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _flatten(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, typed(tree)
