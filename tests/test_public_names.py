"""``__all__`` is what a module promises: sorted, true, and complete."""

from __future__ import annotations

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(path for top in ("nemo_dist_conf", "hydra_plugins") for path in (ROOT / top).rglob("*.py"))

#: names that a module may have for itself without an underscore
USUAL = {"log", "logger"}
#: modules whose names are for users, of the page and of the guides; programs; rows, which a registry finds by name
FOR_USERS = re.compile(
    r"nemo_dist_conf(\.(checkpoint|compose|config|explain|gradients|hooks|mesh|pipelining|schema))?"
    r"|nemo_dist_conf\.strategies\.\w+|.*\.__main__"
)
#: names that a row's module has for whoever looks the row up
LOOKED_UP = {"nemo_dist_conf.families": {"FAMILY", "block_weights", "outer_weights"}}
#: folders whose programs and texts count as users of a name
USERS = ("benchmarks", "conf", "docs", "examples", "hydra_plugins", "nemo_dist_conf", "tests")


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


@functools.cache
def imported_names() -> frozenset[tuple[str, str]]:
    """(module, name) of every ``from module import name``."""
    trees = (ast.parse(path.read_text()) for top in USERS for path in (ROOT / top).rglob("*.py"))
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    return frozenset((node.module or "", alias.name) for node in nodes for alias in node.names)


@functools.cache
def used_names() -> frozenset[tuple[str, str]]:
    """(module, name) of every name of a module of ours that a file imports, or asks a module for."""
    found = set(imported_names())
    modules = set(map(module_name, FILES))
    for path in (path for top in USERS for path in (ROOT / top).rglob("*.py")):
        tree, known = ast.parse(path.read_text()), dict[str, str]()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                known.update({alias.asname or alias.name: alias.name for alias in node.names if alias.name in modules})
            elif isinstance(node, ast.ImportFrom) and node.module:
                known.update({alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names})
        attributes = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
        found |= {(known.get(ast.unparse(node.value), ""), node.attr) for node in attributes}
    return frozenset(found)


@functools.cache
def dotted_names() -> frozenset[str]:
    """Dotted names of ours in texts: targets of configs, entry points, programs of guides and of tests."""
    files = [path for top in USERS for path in (ROOT / top).rglob("*") if path.suffix in (".md", ".py", ".yaml")]
    text = "\n".join(path.read_text() for path in (*files, ROOT / "setup.cfg", ROOT / "README.md"))
    dotted = re.findall(r"\b(?:nemo_dist_conf|hydra_plugins)[\w.:]*\w", text)
    programs = re.findall(r"\bfrom (nemo_dist_conf[\w.]*) import ([\w, ]+)", text)
    imported = {f"{module}.{name}" for module, names in programs for name in names.split(", ")}
    return frozenset({found.replace(":", ".") for found in dotted} | imported)


def constants_beside(path: Path) -> set[str]:
    """Values that one statement gives names to, which make sense together."""
    tuples = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Tuple)]
    leaves = [leaf for node in tuples if isinstance(node.ctx, ast.Store) for leaf in node.elts]
    return {leaf.id for leaf in leaves if isinstance(leaf, ast.Name)}


def types_of_signatures(path: Path, listed: list[str]) -> set[str]:
    """Words in annotations and bases of what a module lists: types that users of it are given or give."""
    words: set[str] = set()
    for node in ast.parse(path.read_text()).body:
        if getattr(node, "name", None) in listed or getattr(getattr(node, "target", None), "id", None) in listed:
            leaves = list(ast.walk(node))
            hints = [getattr(leaf, key, None) for leaf in leaves for key in ("annotation", "returns")]
            hints += [base for leaf in leaves for base in getattr(leaf, "bases", ())]
            words |= {word for hint in hints if hint for word in re.findall(r"\w+", ast.unparse(hint))}
    return words


@pytest.mark.parametrize(
    "path", [path for path in FILES if module_name(path) != "nemo_dist_conf.config"], ids=module_name
)
def test_what_other_modules_import_is_listed(path: Path) -> None:
    """A name that a module only imports is imported from where it is made."""
    module, modules = module_name(path), set(map(module_name, FILES))
    ours = {name for owner, name in imported_names() if owner == module and f"{module}.{name}" not in modules}
    assert {name for name in ours if not name.startswith("_")} - set(public_names(path) or []) - {"*"} == set()


@pytest.mark.parametrize(
    "path", [path for path in LISTED if not FOR_USERS.fullmatch(module_name(path))], ids=module_name
)
def test_what_is_listed_is_used_elsewhere(path: Path) -> None:
    """By an import, by its dotted name, as a type of something that is, or beside another value of the same kind."""
    module, listed = module_name(path), public_names(path) or []
    kept = {*types_of_signatures(path, listed), *constants_beside(path)}
    kept |= LOOKED_UP.get(module.rpartition(".")[0], set())
    used = {name for name in listed if (module, name) in used_names() or f"{module}.{name}" in dotted_names()}
    assert set(listed) - used - kept == set()
