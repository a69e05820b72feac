"""What other libraries do not publish is touched in hydra_inside and torch_inside alone, each touch with its test."""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import re
import types
from pathlib import Path
from typing import Iterator

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("nemo_dist_conf", "hydra_plugins")
FILES = sorted(path for top in PACKAGES for path in (ROOT / top).rglob("*.py"))
INSIDE = [path for path in FILES if {"hydra_inside", "torch_inside"} & set(path.with_suffix("").parts)]
OUTSIDE = [path for path in FILES if path not in INSIDE]

#: Names with an underscore that somebody documents as they are.
PUBLISHED = {
    "_target_": "a key of Hydra's configs",
    "_replace": "of named tuples",
    "_fields": "of named tuples",
    "_exit": "os._exit",
    "_getframe": "sys._getframe",
}
#: What is not published although its name does not say so.
NOT_PUBLISHED = (".repo", ".callbacks.callbacks", ".sharded_param", ".fsdp_params", ".default_generators")

_DICTIONARY = re.compile(r"vars\([^()]*\)|.*\.__dict__")
METHODS = (types.FunctionType, staticmethod, classmethod, property)
_LAST_WORDS = {name.rpartition(".")[2] for name in NOT_PUBLISHED}
_ASKED_BY_NAME = {"getattr", "hasattr", "setattr", "delattr"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_private(name: object) -> bool:
    return isinstance(name, str) and name.isidentifier() and name.strip("_") != "" and bool(re.match("_[^_]", name))


def own_names(tree: ast.AST) -> set[str]:
    """Names that a module's own functions, classes and their attributes have."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_self(node.value):
            names.add(node.attr)
    return names


def names_of_imported(tree: ast.AST) -> set[str]:
    """The same of modules of ours that a module imports: a class of theirs may be what one here is made from."""
    names: set[str] = set()
    for node in ast.walk(tree):
        module = ROOT / (node.module or "").replace(".", "/") if isinstance(node, ast.ImportFrom) else ROOT
        if module.with_suffix(".py") in FILES:
            names |= own_names(ast.parse(module.with_suffix(".py").read_text()))
    return names


def is_self(node: ast.AST) -> bool:
    """``self``, ``cls``, ``vars(self)``, ``self.__dict__``, and a call of ``super``."""
    words = {"self", "cls", "vars(self)", "self.__dict__", "super()"}
    return isinstance(node, ast.expr) and ast.unparse(node) in words


def asked_names(node: ast.AST) -> Iterator[tuple[ast.AST, object]]:
    """(of what, name) of what a node asks an object for: attributes, in texts and in dictionaries of an object too."""
    if isinstance(node, ast.Attribute):
        yield node.value, node.attr
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _ASKED_BY_NAME:
        yield from ((node.args[0], word.value) for word in node.args[1:] if isinstance(word, ast.Constant))
    else:
        for owner, words in _in_dictionaries(node):
            if isinstance(owner, (ast.Call, ast.Attribute)) and _DICTIONARY.fullmatch(ast.unparse(owner)):
                yield from ((owner, word.value) for word in words if isinstance(word, ast.Constant))


def _in_dictionaries(node: ast.AST) -> Iterator[tuple[ast.expr, list[ast.expr]]]:
    """(what may be a dictionary, the keys that it is asked for)."""
    if isinstance(node, ast.Subscript):
        yield node.value, [node.slice]
    elif isinstance(node, ast.Compare):
        yield from ((owner, [node.left]) for owner in node.comparators)
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        yield node.func.value, node.args


def touches(path: Path, text: str) -> list[str]:
    """Where a module outside of the two touches what is not published, as ``line: words``."""
    tree = ast.parse(text)
    own = own_names(tree) | names_of_imported(tree)
    classes = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    found = []
    for node in ast.walk(tree):
        names = {name for owner, name in asked_names(node) if not _is_own(owner, name, own, classes)}
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = set(_imported(node))
        if any(is_private(name) and name not in PUBLISHED for name in names):
            found.append(f"{module_name(path)}, line {getattr(node, 'lineno')}: {ast.unparse(node)}")
        elif isinstance(node, ast.Attribute) and node.attr in _LAST_WORDS:
            if ast.unparse(node).endswith(NOT_PUBLISHED):
                found.append(f"{module_name(path)}, line {node.lineno}: {ast.unparse(node)}")
    return found


def _is_own(owner: ast.AST, name: object, own: set[str], classes: set[str]) -> bool:
    """Whether a name belongs to the module that asks for it: of itself, or of a class of its own."""
    return name in own and (is_self(owner) or (isinstance(owner, ast.Name) and owner.id in classes))


def _imported(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    module = node.module or "" if isinstance(node, ast.ImportFrom) else ""
    if module.startswith(PACKAGES):
        return
    for word in (module, *(alias.name for alias in node.names)):
        yield from word.split(".")


@pytest.mark.parametrize("path", OUTSIDE, ids=module_name)
def test_nothing_else_touches_what_is_not_published(path: Path) -> None:
    assert touches(path, path.read_text()) == []


@pytest.mark.parametrize(
    "line",
    [
        "module._parameters",
        "getattr(model, '_no_split_modules', None)",
        "hasattr(config, '_attn_implementation')",
        "vars(module)['_buffers']",
        "module.__dict__.pop('_tp_kept', ())",
        "'_modules' in module.__dict__",
        "import torch._inductor.config as inductor",
        "from torch.utils._pytree import tree_map",
        "from hydra.core.utils import _flush_loggers",
        "ConfigStore.instance().repo",
        "class Mine(Style):\n    def apply(self):\n        self._theirs()",
    ],
)
def test_a_touch_is_found(line: str) -> None:
    assert len(touches(ROOT / "nemo_dist_conf" / "x.py", line)) == 1


@pytest.mark.parametrize(
    "line",
    [
        "class Mine:\n    def __init__(self):\n        self._seen = 0\n    def go(self):\n        return self._seen",
        "class Mine:\n    def _build(self): ...\nMine._build",
        "from nemo_dist_conf.config import _STRATEGY_MAP",
        "from __future__ import annotations",
        "model.__class__.__name__",
        "row._replace(name='x')",
    ],
)
def test_what_is_ones_own_or_published_is_none(line: str) -> None:
    assert touches(ROOT / "nemo_dist_conf" / "x.py", line) == []


def test_no_class_outside_overrides_what_is_not_published() -> None:
    found = []
    for path in OUTSIDE:
        if path.name == "__main__.py":
            continue
        module = importlib.import_module(module_name(path))
        kinds = [kind for kind in vars(module).values() if inspect.isclass(kind) and kind.__module__ == module.__name__]
        for kind in kinds:
            foreign = [base for base in kind.__mro__[1:] if not base.__module__.startswith(PACKAGES)]
            methods = [name for name, value in vars(kind).items() if isinstance(value, METHODS)]
            names = [name for name in methods if is_private(name) and not name.endswith("_")]
            found += [f"{kind.__qualname__}.{name}" for name in names if any(name in vars(base) for base in foreign)]
    assert found == []


def test_every_name_that_is_let_through_is_there() -> None:
    text = "\n".join(path.read_text() for path in OUTSIDE)
    assert [name for name in PUBLISHED if not re.search(rf"\b{name}\b", text)] == []


def explained(path: Path) -> Iterator[tuple[str, str]]:
    """(name, its docstring or the comment above it) of each public name of a module."""
    lines = path.read_text().splitlines()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node.name, ast.get_docstring(node) or ""
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name, above = node.targets[0].id, node.lineno - 2
            while lines[above].partition(" = ")[0].isidentifier():  # one comment for those below it
                above -= 1
            comment: list[str] = []
            while lines[above].startswith("#:"):
                comment.insert(0, lines[above].removeprefix("#:"))
                above -= 1
            if not name.startswith("_"):
                yield name, "\n".join(comment)


ENTRIES = [
    pytest.param(name, text, id=f"{path.stem}.{name}")
    for path in INSIDE
    if path.name != "__init__.py"
    for name, text in explained(path)
]


@pytest.mark.parametrize("name, text", ENTRIES)
def test_every_entry_names_versions_and_a_test_that_exists(name: str, text: str) -> None:
    assert re.search(r"(Hydra|OmegaConf|torch|transformers|peft|megatron-fsdp) \d", text), f"{name}: no version"
    named = re.findall(r"(tests/[\w/]+\.py)(?:,\s+(test_\w+))?", text)
    assert named, f"{name}: no test"
    for file, test in named:
        assert (ROOT / file).is_file(), f"{name}: there is no {file}"
        assert not test or re.search(rf"^def {test}\(", (ROOT / file).read_text(), re.MULTILINE), f"{name}: no {test}"


@pytest.mark.parametrize("path", [path for path in INSIDE if path.name != "__init__.py"], ids=module_name)
def test_every_entry_is_used(path: Path) -> None:
    others = set().union(*(words for other, words in words_of_files().items() if other != path))
    assert [name for name, _ in explained(path) if name not in others] == []


@functools.cache
def words_of_files() -> dict[Path, set[str]]:
    """The words of each module; an ``__init__`` only passes them on."""
    return {path: set(re.findall(r"\w+", path.read_text())) for path in FILES if path.name != "__init__.py"}
