"""``__all__`` is what a module promises: sorted, true, and complete."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for top in ("nemo_dist_conf", "hydra_plugins") for path in (ROOT / top).rglob("*.py"))

#: names that a module may have for itself without an underscore
USUAL = {"log", "logger"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def public_names(path: Path) -> list[str] | None:
    """The module's ``__all__`` as it stands in the file; None without one."""
    for node in ast.parse(path.read_text()).body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            return ast.literal_eval(node.value)
    return None


def top_level(body: list[ast.stmt]) -> list[ast.stmt]:
    """Statements that run at import, those in if and try included, the type checker's alone not."""
    found = []
    for node in body:
        found.append(node)
        if isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            found += top_level(node.body) + top_level(node.orelse)
        elif isinstance(node, ast.Try):
            found += top_level(node.body + [s for handler in node.handlers for s in handler.body] + node.orelse)
    return found


def defined_names(path: Path) -> set[str]:
    """Functions, classes and values without an underscore that the module itself makes."""
    names: set[str] = set()
    for node in top_level(ast.parse(path.read_text()).body):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {leaf.id for target in targets for leaf in ast.walk(target) if isinstance(leaf, ast.Name)}
    return {name for name in names if not name.startswith("_")} - USUAL


def passed_on_names(path: Path) -> set[str]:
    """Names without an underscore that a package's __init__ imports from its own modules."""
    imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imports if node.level or (node.module or "").startswith("nemo_dist_conf")]
    return {alias.asname or alias.name for node in ours for alias in node.names if not alias.name.startswith("_")}


LISTED = [path for path in FILES if public_names(path) is not None]


@pytest.mark.parametrize("path", LISTED, ids=module_name)
def test_all_is_sorted_and_every_name_exists(path: Path) -> None:
    names = public_names(path) or []
    assert names == sorted(set(names))
    module = importlib.import_module(module_name(path))
    assert [name for name in names if not hasattr(module, name)] == []


@pytest.mark.parametrize("path", LISTED, ids=module_name)
def test_all_lists_every_public_name(path: Path) -> None:
    """A name that is not for others starts with an underscore."""
    defined = defined_names(path) | (passed_on_names(path) if path.name == "__init__.py" else set())
    assert defined - set(public_names(path) or ()) == set()


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=module_name)
def test_every_package_lists_its_names(path: Path) -> None:
    if defined_names(path) | passed_on_names(path):
        assert public_names(path) is not None, f"{module_name(path)} has no __all__"
