"""Where a model's blocks are found, in which order, and what is no block."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.runtime.model.blocks import find_blocks
from tests.dist.layouts import plain_model


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(2, 4), nn.Linear(4, 2)


class Other(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)


class Model(nn.Module):
    """Takes its parts by name; ``declares`` becomes the attribute distributed_blocks."""

    def __init__(self, declares: Any = None, no_split: Any = None, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        if declares is not None:
            self.distributed_blocks = declares
        if no_split is not None:
            self._no_split_modules = no_split


def repeated(count: int, kind: type[nn.Module] = Inner) -> nn.ModuleList:
    return nn.ModuleList(kind() for _ in range(count))


def names(model: nn.Module, declared: Any = None) -> list[str]:
    blocks = find_blocks(model, declared)
    assert all(model.get_submodule(name) is module for name, module in blocks.items())
    return list(blocks)


@pytest.mark.parametrize(
    "model, expected",
    [
        (Model(layers=repeated(3), head=nn.Linear(2, 2)), ["layers.0", "layers.1", "layers.2"]),
        (Model(body=nn.Sequential(Inner(), Inner())), ["body.0", "body.1"]),
        (nn.Sequential(Inner(), Inner()), ["0", "1"]),
        (
            Model(encoder=repeated(2), decoder=repeated(2, Other)),
            ["encoder.0", "encoder.1", "decoder.0", "decoder.1"],
        ),
        # A stage holds blocks of its own; they are inside, not beside it.
        (
            Model(stages=nn.ModuleList([nn.Sequential(Inner(), Inner()), nn.Sequential(Inner(), Inner())])),
            ["stages.0", "stages.1"],
        ),
        (Model(trunk=Model(layers=repeated(2))), ["trunk.layers.0", "trunk.layers.1"]),
    ],
    ids=["list", "sequential", "root", "two stacks", "stages", "below"],
)
def test_repeated_layers_are_the_blocks(model: nn.Module, expected: list[str]) -> None:
    assert names(model) == expected


def test_what_holds_no_parameters_is_no_block() -> None:
    """The last of the blocks matters: it alone stays gathered after forward."""
    model = Model(body=nn.Sequential(Inner(), nn.Dropout(), Inner(), nn.Dropout()))
    assert names(model) == ["body.0", "body.2"]


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        Model(layers=repeated(1)),
        Model(mlp=nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))),
        Model(mlp=nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))),
        Model(parts=nn.ModuleList([Inner(), Other()])),
        Model(a=Inner(), b=Inner()),
        Model(layers=nn.ModuleList([Inner()] * 3)),
    ],
    ids=["layer", "one", "linears", "mlp", "two classes", "attributes", "one module three times"],
)
def test_without_repetition_there_are_no_blocks(model: nn.Module) -> None:
    assert names(model) == []


def test_a_transformers_models_declaration_is_used() -> None:
    assert names(plain_model("llama")) == ["model.layers.0", "model.layers.1", "model.layers.2"]
    # Not what repeats: the class that is declared.
    parts: Any = {"layers": repeated(2), "tail": Other(), "no_split": ["Other"]}
    assert names(Model(**parts)) == ["tail"]
    parts["no_split"] = {"NotThere"}
    assert names(Model(**parts)) == ["layers.0", "layers.1"]


@pytest.mark.parametrize(
    "declared, expected",
    [
        ("layers", ["layers.0", "layers.1", "layers.2"]),
        ("layers.*", ["layers.0", "layers.1", "layers.2"]),
        ("layers.1", ["layers.1"]),
        (["layers.0", "tail"], ["layers.0", "tail"]),
        ("layers.*.up", ["layers.0.up", "layers.1.up", "layers.2.up"]),
        ("*.up", ["layers.0.up", "layers.1.up", "layers.2.up", "named.a.up", "tail.up"]),
        (["named", "tail"], ["named.a", "named.b", "tail"]),
        # In the order of forward, which prefetching follows, and never one inside another.
        (["tail", "layers.1", "layers.0"], ["layers.0", "layers.1", "tail"]),
        (["layers.0.up", "layers.0"], ["layers.0"]),
        (["layers", "layers.0.up"], ["layers.0", "layers.1", "layers.2"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("by", ["argument", "model"])
def test_declared_paths_come_first(declared: Any, expected: list[str], by: str) -> None:
    named = nn.ModuleDict({"a": Inner(), "b": Other()})
    model = Model(
        declares=declared if by == "model" else "tail",
        no_split=["Other"],
        layers=repeated(3),
        named=named,
        tail=Inner(),
    )
    assert names(model, declared if by == "argument" else None) == expected


def test_paths_may_come_from_a_generator() -> None:
    assert names(Model(layers=repeated(3)), (f"layers.{index}" for index in (2, 0))) == ["layers.0", "layers.2"]


@pytest.mark.parametrize(
    "declared, near",
    [("layer", "layers"), ("model.layers.*", "layers"), (["layers", "tial"], "tail"), ("", "layers")],
    ids=str,
)
def test_a_path_that_names_nothing_is_refused_with_one_that_does(declared: Any, near: str) -> None:
    model = Model(layers=repeated(2), tail=Inner())
    with pytest.raises(ConfigError) as error:
        find_blocks(model, declared)
    wrong = declared if isinstance(declared, str) else declared[-1]
    assert error.value.what == f"blocks: no module of Model is named {wrong}"
    assert error.value.type.startswith("blocks=") and near in error.value.allowed
    assert names(model, error.value.type.removeprefix("blocks="))  # what it says to type works


def test_a_tower_in_which_nothing_is_declared_gives_its_repeated_layers() -> None:
    """Beside one that is declared; there, what is not declared is no block."""
    text = Model(layers=repeated(2), extra=repeated(2, Other))
    model = Model(text=text, vision=Model(layers=repeated(2, Other)), no_split=["Inner"])
    assert names(model) == ["text.layers.0", "text.layers.1", "vision.layers.0", "vision.layers.1"]
