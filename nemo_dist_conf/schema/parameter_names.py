"""Patterns of parameter names: what one means, and what was probably meant by one that means nothing. No torch."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any, Iterable, NamedTuple, Sequence

from nemo_dist_conf.names import nearest

__all__ = ["NotFound", "are_patterns", "meant", "not_found", "patterns_in"]


def patterns_in(value: Any) -> list[str]:
    """The patterns of an option that takes one, a list of them, or null for none."""
    return [value] if isinstance(value, str) else list(value or ())


def are_patterns(value: Any) -> bool:
    """Whether ``patterns_in`` has something to read: a text that is not empty, or a list of such."""
    if value is None or isinstance(value, str):
        return value != ""
    return isinstance(value, (list, tuple)) and all(isinstance(one, str) and one for one in value)


def meant(pattern: str, names: Iterable[str]) -> list[str]:
    """The names of parameters that a pattern means: itself a name, or that of a module around the parameter.

    Signs as in a shell: ``*`` any characters (also dots), ``?`` one, ``[12]`` one of several. Capitals count.
    """
    inside = f"{pattern}.*"
    return [name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, inside)]


class NotFound(NamedTuple):
    """What is said of a pattern that means no parameter; likely: a pattern that does, None where none is alike."""

    what: str
    allowed: str
    likely: str | None


def not_found(key: str, pattern: str, names: Sequence[str]) -> NotFound:
    """What is said of a pattern that means none of these names. key: of the option that has it."""
    likely = _likely(pattern, names)
    what = f"{key}: no parameter or module of the model is named {pattern}"
    allowed = ", ".join(likely or _outermost(names)) or "names of the model's parameters"
    return NotFound(what, allowed, likely[0] if likely else None)


def _likely(pattern: str, names: Sequence[str]) -> list[str]:
    """Names like a pattern, of parameters and modules; of all repeated layers at once where it tells no layer.

    One that begins with any characters is like the end of a name.
    """
    known = [name.rsplit(".", count)[0] for name in names for count in range(name.count(".") + 1)]
    if not any(sign.isdigit() for sign in pattern):
        known = [_of_all_layers(name) for name in known]
    if not pattern.startswith("*"):
        return nearest(pattern.removesuffix(".*"), dict.fromkeys(known))
    ends = dict.fromkeys(name.split(".", count)[count] for name in known for count in range(name.count(".") + 1))
    return [f"*.{end}" for end in nearest(pattern.strip("*."), ends)]


def _of_all_layers(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _outermost(names: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] for name in names))
