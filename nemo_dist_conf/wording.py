"""Words as a user types them: a value, a key with its value wherever our groups stand in the tree, the name that was
probably meant, and a path. Standard library only: every Hydra app of the environment imports this.
"""

from __future__ import annotations

import enum
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Iterable, Mapping

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.names import nearest

__all__ = ["Spelling", "assigned", "for_shell", "typed", "typed_path", "unknown_name"]

#: What Hydra's grammar takes in a text without quotes: runs of these signs and of references that have no other
#: inside, a space or a colon between them.
_RUN = r"(?:[\w/\-+.%*@?|]|\$\{[^{}'\"\s]+\})+"
_BARE = rf"{_RUN}(?:[ :]{_RUN})*"
#: What it reads as a number, a boolean or null.
_OTHER_THAN_TEXT = r"(?i:[+-]?(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:e[+-]?\d[\d_]*)?|[+-]?(?:inf|nan)|true|false|null)"
#: What bash and zsh leave alone in a word.
_SAFE_IN_SHELL = r"[\w@%+=:,./-]*"


def typed(value: Any) -> str:
    """A value as it is typed after ``key=``, by Hydra's grammar: null, true, 1e-05, [a,b], {a:b}, and a text in quotes
    where it would be read as something else. Members of an enum are typed by their names.

    The word that it stands in is not yet one for a shell: see ``assigned``.
    """
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{_typed_key(key)}:{typed(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(typed, value)) + "]"
    return _typed_text(str(value))


def _typed_text(text: str) -> str:
    if re.fullmatch(_BARE, text, re.ASCII) and not re.fullmatch(_OTHER_THAN_TEXT, text, re.ASCII):
        return text
    quote = "'" if '"' in text and "'" not in text or not text else '"'
    # Of a quoted text only its own quote is escaped, and backslashes only where they stand right before one.
    return quote + re.sub(rf"(\\*)({quote}|\Z)", lambda m: m[1] * 2 + (f"\\{quote}" if m[2] else ""), text) + quote


def _typed_key(key: Any) -> str:
    """A key of a mapping, which cannot be quoted."""
    return re.sub(r"([\\()\[\]{}:=,\s])", r"\\\1", key) if isinstance(key, str) else typed(key)


def for_shell(word: str) -> str:
    """A word as it is typed in a shell, so that bash and zsh hand it on unchanged."""
    if re.fullmatch(_SAFE_IN_SHELL, word, re.ASCII):
        return word
    if "'" not in word:
        return f"'{word}'"
    if not re.search(r'["$`\\!]', word):
        return f'"{word}"'
    import shlex

    return shlex.quote(word)


def assigned(key: str, value: Any) -> str:
    """``key=value`` as it is typed in a shell. key: with the signs that stand before it (``+model.config.x``)."""
    if value == "":  # a shell takes the quotes away, and Hydra reads nothing after the sign as the same
        return f"{key}=''"
    return for_shell(f"{key}={typed(value)}")


@dataclass(frozen=True)
class Spelling:
    """Spells keys below the package where the groups were put ("" at the root, "dist" after ``@dist``)."""

    prefix: str = ""

    def key(self, name: str) -> str:
        return f"{self.prefix}.{name}" if self.prefix else name

    def set(self, name: str, value: Any, signs: str = "") -> str:
        """``parallelism.tp_size=2``, relocated where needed. signs: what stands before the key, ``+`` or ``++``."""
        return assigned(f"{signs}{self.key(name)}", value)

    def choose(self, group: str, option: str) -> str:
        """``strategy=fsdp2``, or ``strategy@dist.strategy=fsdp2`` below a package."""
        return f"{group}@{self.key(group)}={option}" if self.prefix else f"{group}={option}"


def unknown_name(
    name: Any,
    known: Iterable[str],
    *,
    what: str,
    asked: str,
    offer: Callable[[str], str],
    otherwise: str | None = None,
    allowed: str | None = None,
    hint: bool = False,
    meant: Iterable[str] = (),
) -> Problem:
    """The problem of a name that is none of the known ones, with the words for the one that was probably meant.

    offer: the words to type with a known name. otherwise: the words where none is like the one asked; None: the offer
    of the first known. allowed None: all known names, those most like the one asked first. hint: the finding ends in
    the name that was probably meant. meant: known names that the one asked is said to stand for; () is by likeness.
    """
    names = [str(each) for each in known]
    likely = list(meant)
    if not likely and isinstance(name, str):  # null is nobody's slip of the finger
        likely = nearest(name, names) or [each for each in names if name and each.startswith(name)]
    if likely and hint:
        what = f"{what}; did you mean {likely[0]}?"
    if allowed is None:
        allowed = ", ".join([*likely, *(each for each in names if each not in likely)])
    instead = offer(likely[0]) if likely else offer(names[0]) if otherwise is None else otherwise
    return Problem(what=what, asked=asked, allowed=allowed, instead=instead)


def typed_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path of one that was typed: ``~`` is the home, and a relative one belongs to the folder in which the
    command was typed, also inside a job that runs in a folder of its own (``hydra.job.chdir=true``).
    """
    from hydra.utils import to_absolute_path

    return Path(to_absolute_path(os.path.expanduser(path)))
