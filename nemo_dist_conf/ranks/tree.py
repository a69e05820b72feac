"""A config resolved once, so that every rank reads the same values; what belongs to a single rank stays lazy."""

from __future__ import annotations

import datetime
import re
from contextlib import contextmanager
from typing import Any, Iterator

from omegaconf import DictConfig, ListConfig, OmegaConf, flag_override
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import OmegaConfBaseException

from nemo_dist_conf.store import register_resolver
from nemo_dist_conf.topology.world import is_rank_variable

__all__ = ["different_keys", "flat_config", "replace_tree", "resolve_for_ranks", "same_now"]

#: ``${key}``, other than ``${resolver:...}``.
_REFERENCE = re.compile(r"\$\{[^:{}]*\}")
#: What stands before the name, with the backslashes before it.
_INTERPOLATION = re.compile(r"(\\*)\$\{")


def resolve_for_ranks(cfg: DictConfig) -> None:
    """Put the value in the place of every interpolation of ``cfg``, except those that only a rank can answer.

    Left as they are: what reads a variable that differs by rank (``${oc.env:LOCAL_RANK}``, with a default too), what
    refers to such a value, and what cannot be resolved here at all: a rank then gets the value or Hydra's own error.
    A resolver that answers differently each time (random numbers) is asked once for each place where it stands; what
    refers to such a place comes after it.
    """
    with _rank_variables_stay_open(), flag_override(cfg, ["readonly", "struct"], False):
        _resolve(cfg, references=False)
        _resolve(cfg, references=True)


def _resolve(node: Any, references: bool) -> None:
    keys: Any = list(node) if isinstance(node, DictConfig) else range(len(node))
    for key in keys:
        if OmegaConf.is_interpolation(node, key):
            if references or not _REFERENCE.search(str(node._get_node(key)._value())):
                _resolve_value(node, key)
        child = node._get_node(key)
        if isinstance(child, (DictConfig, ListConfig)) and not _is_leaf(child):
            readonly = child._metadata.flags.get("readonly") if child._metadata.flags else None
            if readonly:  # a flag of its own stands above the one that was lifted at the root
                with flag_override(child, "readonly", False):
                    _resolve(child, references)
            else:
                _resolve(child, references)


def _is_leaf(node: DictConfig | ListConfig) -> bool:
    return node._is_none() or node._is_missing() or node._is_interpolation()


def _resolve_value(node: Any, key: Any) -> None:
    written = node._get_node(key)._value()
    if not _resolve_once(node, key) and isinstance(written, str):
        # "${random:}-${oc.env:LOCAL_RANK}": each part that can be resolved is, so that only the rest differs
        parts = _parts(written)
        if len(parts) > 1:
            for index, part in enumerate(parts):
                if part.startswith("${"):
                    node[key] = part
                    parts[index] = _as_text(node, key) if _resolve_once(node, key) else part
            node[key] = "".join(parts)


def _resolve_once(node: Any, key: Any) -> bool:
    """Put the value in the place of what is written there, if there is one."""
    try:
        value = node[key]
        if isinstance(value, str) and "${" in value:  # text, which would be read as an interpolation
            return _put_escaped(node, key, value)
        node[key] = value
    except (OmegaConfBaseException, _OnlyInARank, LookupError, ValueError, TypeError, AttributeError):
        return False
    return True


def _put_escaped(node: Any, key: Any, text: str) -> bool:
    written = node._get_node(key)._value()
    node[key] = _INTERPOLATION.sub(lambda found: f"{2 * found[1]}\\${{", text)
    if node[key] == text:
        return True
    node[key] = written
    return False


def _as_text(node: Any, key: Any) -> str:
    written = node._get_node(key)._value()
    return written if isinstance(written, str) else str(node[key])


def _parts(text: str) -> list[str]:
    """Text and interpolations in turn: ``a-${b:${c}}`` -> ``a-``, ``${b:${c}}``. One part where text is escaped."""
    if "\\${" in text:
        return [text]
    parts, start, depth = [], 0, 0
    for index, letter in enumerate(text):
        if text.startswith("${", index):
            if depth == 0 and index > start:
                parts.append(text[start:index])
                start = index
            depth += 1
        elif letter == "{" and depth and text[index - 1] != "$":
            depth += 1  # a dictionary among the arguments
        elif letter == "}" and depth:
            depth -= 1
            if depth == 0:
                parts.append(text[start : index + 1])
                start = index + 1
    return [*parts, text[start:]] if start < len(text) else parts


class _OnlyInARank(Exception):
    """A variable was asked for that differs by rank."""


@contextmanager
def _rank_variables_stay_open() -> Iterator[None]:
    original = BaseContainer._resolvers["oc.env"]

    def oc_env(config: Any, parent: Any, node: Any, args: Any, args_str: Any) -> Any:
        if is_rank_variable(str(args[0])):
            raise _OnlyInARank(args[0])
        return original(config, parent, node, args, args_str)

    BaseContainer._resolvers["oc.env"] = oc_env
    try:
        yield
    finally:
        BaseContainer._resolvers["oc.env"] = original


def replace_tree(cfg: DictConfig, other: DictConfig) -> None:
    """Give ``cfg``, which others hold already, the contents of ``other``."""
    with flag_override(cfg, ["readonly", "struct"], False):
        for key in [key for key in cfg if key not in other]:
            del cfg[key]
        for key in other:
            cfg[key] = other._get_node(key)
    OmegaConf.clear_cache(cfg)


def same_now(now: datetime.datetime, *configs: DictConfig) -> None:
    """``${now:...}`` gives this time from here on, also in configs that have asked for it before."""
    register_resolver("now", lambda pattern: now.strftime(pattern), use_cache=True)
    for config in configs:
        OmegaConf.clear_cache(config)


def flat_config(config: DictConfig) -> dict[str, str]:
    """Dotted key -> value as it is written, without Hydra's own node; interpolations are not resolved."""
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
        yield path, {None: "null", True: "true", False: "false"}.get(tree, str(tree)) if _is_word(tree) else str(tree)


def _is_word(value: Any) -> bool:
    return value is None or isinstance(value, bool)
