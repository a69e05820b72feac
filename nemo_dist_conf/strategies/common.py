"""Rules that more than one strategy has."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any, Mapping

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.wording import Spelling

__all__ = ["autocast_problems", "has_module", "lazy_attribute", "off_but_changed", "unknown_class"]


def autocast_problems(conf: Mapping[str, Any], spelling: Spelling) -> list[Problem]:
    """torch.autocast in float32 does nothing, so asking for it is a mistake."""
    if getattr(conf["autocast_dtype"], "name", conf["autocast_dtype"]) != "float32":
        return []
    return [
        Problem(
            what="strategy.autocast_dtype=float32 would change nothing",
            asked=spelling.set("strategy.autocast_dtype", "float32"),
            allowed="bfloat16, float16, or null for no autocast",
            instead=spelling.set("strategy.autocast_dtype", None),
        )
    ]


def lazy_attribute(module: str, name: str, **homes: str) -> Any:
    """For a module's ``__getattr__``: what holds torch's objects, imported from its home when it is asked for."""
    if name not in homes:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return getattr(importlib.import_module(homes[name]), name)


def off_but_changed(node: Mapping[str, Any] | None, default: Any, name: str, spelling: Spelling) -> list[Problem]:
    """A policy that is off while one of its values was changed: which of the two was meant?"""
    if node is None or node["enabled"]:
        return []
    changed = [key for key, value in node.items() if key != "enabled" and value != getattr(default, key)]
    if not changed:
        return []
    key = f"{name}.{changed[0]}"
    value = getattr(node[changed[0]], "name", node[changed[0]])
    return [
        Problem(
            what=f"{key} was changed, but the policy is off",
            asked=spelling.set(key, value),
            allowed=f"{spelling.set(f'{name}.enabled', True)} with it, or its default",
            instead=f"{spelling.set(f'{name}.enabled', True)} {spelling.set(key, value)}",
        )
    ]


def has_module(path: str) -> bool:
    """Whether a module is installed, told from the files of its package. Imports nothing."""
    top, *inner = path.split(".")
    spec = importlib.util.find_spec(top)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        place = Path(folder, *inner)
        if place.with_suffix(".py").is_file() or (place / "__init__.py").is_file():
            return True
    return False


def unknown_class(path: str) -> str | None:
    """Why no class can have this path, told from the files of its package; None where one may. Imports nothing."""
    parts = path.split(".")
    if len(parts) < 2 or not all(part.isidentifier() for part in parts):
        return "is not a class path"
    top, *inner = parts
    if top == "__main__":
        return None
    spec = importlib.util.find_spec(top)
    if spec is None:
        return f"is in no module that is installed: there is no {top}"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    file = Path(spec.origin) if spec.origin and not folders else None
    for number, part in enumerate(inner[:-1]):
        if file is not None:
            break  # a class inside a class
        file = next((f / f"{part}.py" for f in folders if (f / f"{part}.py").is_file()), None)
        if file is None:
            folders = [f / part for f in folders if (f / part).is_dir()]
            if not folders:
                return f"is in no module: {'.'.join(parts[: number + 1])} has no {part}"
    if file is None:
        file = next((f / "__init__.py" for f in folders if (f / "__init__.py").is_file()), None)
    if file is None or file.suffix != ".py":
        return None
    text = file.read_text(encoding="utf-8", errors="replace")
    if re.search(rf"\b{parts[-1]}\b|import \*|__getattr__|_LazyModule", text):
        return None
    return f"names no class: {file.name} has no {parts[-1]}"
