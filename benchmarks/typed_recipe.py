"""The recipe's config groups as a user of plain Hydra would type them: dataclasses in a ConfigStore, all in one module.

Written from the groups themselves, so that both hold the same fields, types and defaults.
"""

from __future__ import annotations

import dataclasses
import enum
import types
import typing
from typing import Any

from nemo_dist_conf.composition.groups import config_groups

__all__ = ["typed_groups"]

_HEAD = """\
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Dict, List, Union

from hydra.core.config_store import ConfigStore

store = ConfigStore.instance()
"""


def typed_groups() -> str:
    """Source of a module that registers every group when it is imported: a class for each schema, no option twice."""
    classes: dict[type, str] = {}
    entries: list[str] = []
    for group, options in config_groups().items():
        for name, make in options.items():
            node = make()
            if type(node) not in classes:
                first, text = node, _class(node, classes)
                classes[type(node)] = text
            changed = [f.name for f in _fields(node) if getattr(node, f.name) != getattr(first, f.name)]
            given = ", ".join(f"{key}={_plain(getattr(node, key))}" for key in changed)
            entries.append(f"store.store(group={group!r}, name={name!r}, node={type(node).__name__}({given}))")
    return "\n\n".join([_HEAD, *classes.values(), "\n".join(entries)]) + "\n"


def _fields(node: Any) -> list[Any]:
    """All but what switches on the check of this package, which plain Hydra has not."""
    return [item for item in dataclasses.fields(node) if item.name != "defaults"]


def _class(node: Any, classes: dict[type, str]) -> str:
    hints = typing.get_type_hints(type(node))
    lines = ["@dataclass", f"class {type(node).__name__}:"]
    for item in _fields(node):
        lines.append(f"    {item.name}: {_type(hints[item.name], classes)} = {_default(getattr(node, item.name))}")
    return "\n".join(lines)


def _type(hint: Any, classes: dict[Any, str]) -> str:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return f"Union[{', '.join(_type(one, classes) for one in inner)}]"
    if origin in (list, dict):
        return f"{origin.__name__.title()}[{', '.join(_type(one, classes) for one in inner)}]"
    if hint is Any or hint is type(None):
        return "Any" if hint is Any else "None"
    if hint not in classes and dataclasses.is_dataclass(hint) and isinstance(hint, type):
        classes[hint] = _class(hint(), classes)
    if hint not in classes and issubclass(hint, enum.Enum):
        members = [f"    {member.name} = {member.value!r}" for member in hint]
        classes[hint] = "\n".join([f"class {hint.__name__}(Enum):", *members])
    return str(hint.__name__)


def _default(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        given = ", ".join(f"{f.name}={_plain(getattr(value, f.name))}" for f in dataclasses.fields(value))
        return f"field(default_factory=lambda: {type(value).__name__}({given}))"
    return f"field(default_factory=lambda: {value!r})" if isinstance(value, (list, dict)) else _plain(value)


def _plain(value: Any) -> str:
    return f"{type(value).__name__}.{value.name}" if isinstance(value, enum.Enum) else repr(value)
