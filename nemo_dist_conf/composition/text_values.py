"""Values that are texts where something else was meant: what ``${oc.env:...}`` gives always is one."""

from __future__ import annotations

import copy
import re
from typing import Any, Callable, Iterable

from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from nemo_dist_conf.composition.command_line import WITHOUT, raw_words
from nemo_dist_conf.composition.hydra_inside import (
    full_key,
    is_missing,
    is_null,
    node_at,
    read_in_place,
    root_of,
    written,
    written_at,
)
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.wording import assigned, for_shell

__all__ = ["text_problems", "told_as_texts", "unread_problems"]


def told_as_texts(error: ConfigError, cfg: Any, check: Callable[[Any], Any]) -> ConfigError:
    """The error, in which a value that would fit if it were read, and is a text, is told to be one.

    cfg: what was checked, with the keys that the problems name. check: checks it again, with such values read.
    """
    if not isinstance(cfg, DictConfig):
        return error
    asked = list(map(_key_of, error.problems))
    texts = {key: found for key in dict.fromkeys(asked) if (found := _text_at(cfg, key)) is not None}
    if not texts:
        return error
    rest: tuple[Problem, ...] = ()
    read = _read(cfg, {key: raw for key, (raw, _) in texts.items()})
    try:
        check(read)
    except ConfigError as other:  # what these values hid may be texts again
        rest = told_as_texts(other, read, check).problems
    before = {_without_quotes(problem.what) for problem in error.problems}
    # What is said of the value that was read is not that it was a text.
    still = {_key_of(problem) for problem in rest if _without_quotes(problem.what) in before}
    allowed = dict(zip(reversed(asked), (problem.allowed for problem in reversed(error.problems))))
    told = [_problem(cfg, key, *found, allowed[key]) for key, found in texts.items() if key not in still]
    others = [problem for problem in rest if _key_of(problem) not in texts or _key_of(problem) in still]
    return ConfigError(*told, *others) if told or others else error


def _key_of(problem: Problem) -> str:
    """The first key that a problem's words set."""
    return problem.asked.lstrip("+'\"").partition("=")[0]


def _without_quotes(text: str) -> str:
    return text.replace('"', "").replace("'", "")


def text_problems(node: Any) -> Iterable[Problem]:
    """Problems of values below a node that come from elsewhere, are texts and say a number, a bool or null."""
    if not isinstance(node, DictConfig) or is_null(node) or is_missing(node):
        return
    for name in map(str, node):
        child = node_at(node, name)
        if isinstance(child, DictConfig) and not OmegaConf.is_interpolation(child):
            yield from text_problems(child)
            continue
        raw = written(child) if child is not None else None
        if not isinstance(raw, str) or "${" not in raw:
            continue
        key = full_key(node, name)
        found = _text_at(node, key)
        if found is not None:
            yield _problem(node, key, *found, "a value that is read: a number, true, false, null")


def unread_problems(node: DictConfig, names: Iterable[str] | None = None) -> Iterable[Problem]:
    """Problems of values below a node that refer to what is not there. names: of its keys; None: all."""
    for name in map(str, node) if names is None else names:
        child = node_at(node, name) if name in node else None
        if isinstance(child, DictConfig) and not OmegaConf.is_interpolation(child) and not is_null(child):
            yield from unread_problems(child)
            continue
        try:
            if OmegaConf.is_config(child):
                OmegaConf.to_container(child, resolve=True)
            elif child is not None and OmegaConf.is_interpolation(child):
                node[name]
        except OmegaConfBaseException as error:
            yield _unread(node, full_key(node, name), str(error).splitlines()[0])


def _unread(node: DictConfig, key: str, why: str) -> Problem:
    holder: Any = OmegaConf.to_container(node)
    raw = holder[key.rpartition(".")[2]]
    words = raw_words(OmegaConf.select(root_of(node), "hydra.overrides.task"))
    typed = [word for word in words if f"{key}.".startswith(word.lstrip("+").partition("=")[0] + ".")]
    variable = re.search(r"\$\{oc\.env:(\w+)\}", str(raw))
    way_out = f"export {variable[1]}=VALUE" if variable else f"{key}=null"
    asked = " ".join(map(for_shell, typed)) if typed else assigned(key, raw)
    allowed = "values, and references to what is there"
    return Problem(
        what=f"{key} cannot be read: {why}",
        asked=asked,
        allowed=allowed,
        instead=f"{WITHOUT}{asked}" if typed else way_out,
    )


def _problem(node: DictConfig, key: str, raw: str, text: str, allowed: str) -> Problem:
    what = f"{key} is the text {text!r}"
    overrides = raw_words(OmegaConf.select(root_of(node), "hydra.overrides.task"))
    key = f"+{key}" if any(word.startswith(f"+{key}=") for word in overrides) else key
    if "${" not in raw:
        return Problem(what=what, asked=assigned(key, text), allowed=allowed, instead=for_shell(f"{key}={text}"))
    if "oc.env:" in raw:
        what += ": an environment variable holds nothing else"
    return Problem(what=what, asked=assigned(key, raw), allowed=allowed, instead=assigned(key, _decoded(raw)))


def _decoded(raw: str) -> str:
    return f"${{oc.decode:{raw}}}"


def _text_at(cfg: DictConfig, key: str) -> tuple[str, str] | None:
    """(what is written, the text that it gives) where that text says something else than a text."""
    place = _place(cfg, key)
    raw = written_at(*place) if place is not None else None
    if place is None or not isinstance(raw, str):
        return None
    try:  # not by the node itself, which may be of a type that the text does not fit
        text, _ = read_in_place(raw, *place)
        reader = OmegaConf.create({"value": _decoded("${.text}"), "text": str(text)})
        says_more = not isinstance(reader.value, str)
    except OmegaConfBaseException:
        return None
    return (raw, text) if isinstance(text, str) and says_more else None


def _place(cfg: DictConfig, key: str) -> tuple[DictConfig, str] | None:
    """The node and the name in it that a key means, which is spelt from the root of the tree."""
    here = full_key(cfg, None)
    *path, name = key.removeprefix(f"{here}.").split(".")
    node: Any = cfg
    for part in path:
        node = node_at(node, part) if isinstance(node, DictConfig) and not is_null(node) and part in node else None
    known = isinstance(node, DictConfig) and not is_null(node) and name in node
    return (node, name) if known and not isinstance(node_at(node, name), DictConfig) else None


def _read(cfg: DictConfig, texts: dict[str, str]) -> DictConfig:
    """A copy of the tree in which these keys hold what their texts say."""
    copied = copy.deepcopy(cfg)
    with flag_override(copied, ["readonly", "struct"], False):
        for key, raw in texts.items():
            place = _place(copied, key)
            if place is not None:
                place[0][place[1]] = _decoded(raw if "${" in raw else f"'{raw}'")
    return copied
