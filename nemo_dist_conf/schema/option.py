"""A config field with its help text, and the help texts of a whole schema class as rows."""

from __future__ import annotations

import dataclasses
from typing import Any, Iterator, NamedTuple

from nemo_dist_conf.wording import typed

__all__ = ["Documented", "documented", "option"]


def option(default: Any, help: str) -> Any:
    """A dataclass field whose help text a user can read from the command line.

    default: an immutable value, or a class or function that makes a fresh one (nested nodes, lists).
    """
    metadata = {"help": help}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class Documented(NamedTuple):
    """One line of help: the dotted name, its default as it is typed, and what it does."""

    name: str
    default: str
    help: str


def documented(schema: Any, prefix: str = "") -> Iterator[Documented]:
    """The fields of a schema class in order, nested nodes flattened to dotted names.

    schema: the class, or an object of it, whose values then stand for the defaults.
    """
    values = schema() if isinstance(schema, type) else schema
    for item in dataclasses.fields(schema):
        name, value = f"{prefix}{item.name}", getattr(values, item.name)
        text = item.metadata.get("help", "")
        if dataclasses.is_dataclass(value):
            yield Documented(name, "", text)
            yield from documented(value, f"{name}.")
        else:
            yield Documented(name, typed(value), text)
