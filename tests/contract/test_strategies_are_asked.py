"""What a strategy does is asked of its row and its engine: nowhere else is one told by its name or by its classes."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Iterator

import pytest

from nemo_dist_conf.strategies import strategy_names

PACKAGE = Path(__file__).parents[2] / "nemo_dist_conf"
#: Where strategies are, and what stands in for torch's own classes, which know their own kind.
HOMES = ("strategies/", "runtime/engines/", "plan/strategies/", "runtime/torch_inside/")
#: Classes by which one could be told.
CLASSES = {
    "DDPConf",
    "DDPConfig",
    "DDPEngine",
    "DDPManager",
    "DistributedDataParallel",
    "FSDP2Conf",
    "FSDP2Config",
    "FSDP2Engine",
    "FSDP2Manager",
    "FSDPModule",
    "MegatronFSDP",
    "MegatronFSDPConf",
    "MegatronFSDPConfig",
    "MegatronFSDPEngine",
    "MegatronFSDPManager",
    "OneRankDDP",
    "SeveralRanksDDP",
}


def tells(source: str) -> Iterator[tuple[int, str]]:
    """(line, what) for each place where a strategy is told by its name or its class."""
    names = {*strategy_names(), "ddp", "fsdp2", "megatron_fsdp"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Compare):
            for part in (node.left, *node.comparators):
                for inner in ast.walk(part):
                    if isinstance(inner, ast.Constant) and inner.value in names:
                        yield node.lineno, f"compares with {inner.value!r}"
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("isinstance", "issubclass")
        ):
            for inner in ast.walk(node.args[1]):
                name = getattr(inner, "id", getattr(inner, "attr", None))
                if name in CLASSES:
                    yield node.lineno, f"asks whether something is a {name}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
            if any(isinstance(arg, ast.Constant) and str(arg.value).startswith("megatron_fsdp") for arg in node.args):
                yield node.lineno, "asks for a module of a strategy's library"
        if isinstance(node, ast.match_case):
            for inner in ast.walk(node.pattern):
                if isinstance(inner, ast.MatchValue) and getattr(inner.value, "value", None) in names:
                    yield inner.lineno, "matches a strategy's name"


def test_no_module_outside_a_strategys_own_tells_it_by_name_or_class() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(HOMES):
            found += [f"{name}:{line} {what}" for line, what in tells(path.read_text())]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "if strategy.name == 'ddp': pass",
        "if name in ('fsdp2', 'other'): pass",
        "isinstance(config, (DDPConfig, FSDP2Config))",
        "isinstance(model, torch.nn.parallel.DistributedDataParallel)",
        "type(model).__module__.startswith('megatron_fsdp.')",
        "match name:\n    case 'mfsdp': pass",
    ],
)
def test_each_way_of_telling_is_found(source: str) -> None:
    assert list(tells(source))
