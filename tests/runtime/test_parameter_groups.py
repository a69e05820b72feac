"""Parameters by name: what a pattern means, what is frozen, and which settings of the optimizer each one has."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from torch import nn

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.runtime.model.trained import choose_trained
from nemo_dist_conf.runtime.optimizer import build_optimizer, named_groups
from nemo_dist_conf.schema.parameter_names import meant
from nemo_dist_conf.train.learning_rate import LearningRate

NAMES = [
    *("embed.weight", "layers.0.norm.weight", "layers.0.up.weight", "layers.0.up.bias"),
    *("layers.1.norm.weight", "layers.1.up.weight", "layers.1.up.bias", "head.weight"),
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4, bias=False)
        self.up = nn.Linear(4, 4)


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.layers = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(4, 6, bias=False)
        self.register_parameter("table", nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False))
        if tied:
            self.head.weight = self.embed.weight


def trained_of(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    "pattern, names",
    [
        ("embed.weight", NAMES[:1]),
        ("embed", NAMES[:1]),
        ("layers.1", NAMES[4:7]),
        ("layers.*.norm", [NAMES[1], NAMES[4]]),
        ("*.bias", [NAMES[3], NAMES[6]]),
        ("*norm*", [NAMES[1], NAMES[4]]),
        ("layers.[1]", NAMES[4:7]),
        ("layers.?.up", [*NAMES[2:4], *NAMES[5:7]]),
        ("*", NAMES),
        ("layer", []),
        ("Embed", []),
        ("0.up", []),
        ("layers.", []),
    ],
)
def test_a_pattern_means_parameters_by_their_names_and_modules(pattern: str, names: list[str]) -> None:
    assert meant(pattern, NAMES) == names


@pytest.mark.parametrize(
    "freeze, train, left",
    [
        (["embed", "layers.0"], [], NAMES[4:]),
        ([], ["head", "*.bias"], [NAMES[3], NAMES[6], NAMES[7]]),
        (["layers"], ["layers.1.norm"], [NAMES[0], NAMES[4], NAMES[7]]),
        (["*"], ["layers.*.norm"], [NAMES[1], NAMES[4]]),
        (["embed"], ["head"], NAMES[1:]),
    ],
)
def test_what_is_trained(freeze: list[str], train: list[str], left: list[str]) -> None:
    model = Model()
    choose_trained(model, {"freeze": freeze, "train": train})
    assert sorted(trained_of(model)) == sorted(left)


def test_what_is_left_to_train_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        choose_trained(Model(), {"freeze": "layers", "train": None})
        choose_trained(Model(), {"freeze": [], "train": []})
    assert caplog.messages == ["trained: 48 of 99 parameters (48.5%), 2 of 9 tensors"]


def test_a_tie_is_one_parameter_by_any_of_its_names() -> None:
    model = Model(tied=True)
    choose_trained(model, {"freeze": ["head"], "train": []})
    assert trained_of(model) == NAMES[1:7]
    choose_trained(model, {"freeze": [], "train": ["head"]})
    assert trained_of(model) == NAMES[:1]


def test_what_the_model_itself_has_frozen_stays_so_unless_train_names_it() -> None:
    model = Model()
    model.embed.requires_grad_(False)
    choose_trained(model, {"freeze": ["head"], "train": []})
    assert trained_of(model) == NAMES[1:7]
    choose_trained(model, {"freeze": ["head"], "train": ["embed"]})
    assert sorted(trained_of(model)) == sorted(NAMES[:7])


@pytest.mark.parametrize(
    "freeze, train, what, instead",
    [
        (["embd"], [], "trainable.freeze: no parameter or module of the model is named embd", "[embed]"),
        (
            ["layers.*.nrm"],
            [],
            "trainable.freeze: no parameter or module of the model is named layers.*.nrm",
            "[layers.*.norm]",
        ),
        (
            ["layers.0.nrm"],
            [],
            "trainable.freeze: no parameter or module of the model is named layers.0.nrm",
            "[layers.0.norm]",
        ),
        (["embed", "xyz"], [], "trainable.freeze: no parameter or module of the model is named xyz", "[embed]"),
        (
            ["embed", "head"],
            ["e*", "layers"],
            "trainable.freeze: trainable.train names all that embed means, so that it freezes nothing",
            "[head]",
        ),
        (["embed", "layers", "*"], [], "trainable.freeze leaves no parameter to train", "[]"),
    ],
)
def test_a_choice_that_cannot_be_is_refused(freeze: list[str], train: list[str], what: str, instead: str) -> None:
    model = Model()
    with pytest.raises(ConfigError) as error:
        choose_trained(model, {"freeze": freeze, "train": train})
    assert (error.value.what, error.value.type) == (what, f"'trainable.freeze={instead}'")
    OverridesParser.create().parse_override(*shlex.split(error.value.type))
    assert len(trained_of(model)) == len(NAMES)


def test_an_unknown_name_of_train_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        choose_trained(Model(), {"freeze": [], "train": ["heat"]})
    assert error.value.type == "'trainable.train=[head]'"


# ------------------------------------------------------------------------------------------------------ groups


def optimizer_of(model: nn.Module, groups: list[Any], **settings: Any) -> torch.optim.Optimizer:
    node = {"name": "adamw", "lr": 0.1, "weight_decay": 0.2, "groups": groups, **settings}
    built = build_optimizer(node, model.named_parameters(), group_of=named_groups(node, model))
    assert built is not None
    return built


def settings_of(model: nn.Module, optimizer: torch.optim.Optimizer, *keys: str) -> dict[str, tuple[Any, ...]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = optimizer.param_groups
    return {names[id(p)]: tuple(group[key] for key in keys) for group in groups for p in group["params"]}


def test_each_parameter_has_the_settings_of_its_first_group_and_else_the_optimizers() -> None:
    model = Model()
    groups = [
        {"params": "layers.0", "lr": 0.3, "betas": [0.5, 0.6]},
        {"params": ["*.up", "embed"], "weight_decay": 0.4, "decay_1d": True},
    ]
    found = settings_of(model, optimizer_of(model, groups), "lr", "weight_decay", "betas")
    usual = (0.9, 0.999)
    assert found == {
        "embed.weight": (0.1, 0.4, usual),
        "layers.0.norm.weight": (0.3, 0.0, (0.5, 0.6)),
        "layers.0.up.weight": (0.3, 0.2, (0.5, 0.6)),
        "layers.0.up.bias": (0.3, 0.0, (0.5, 0.6)),
        "layers.1.norm.weight": (0.1, 0.0, usual),
        "layers.1.up.weight": (0.1, 0.4, usual),
        "layers.1.up.bias": (0.1, 0.4, usual),
        "head.weight": (0.1, 0.2, usual),
    }


def test_a_schedule_scales_each_groups_own_rate_and_tells_the_optimizers() -> None:
    model = Model()
    optimizer = optimizer_of(model, [{"params": "*", "lr": 0.3}])
    assert LearningRate("constant", steps=9, warmup_steps=4).apply(optimizer, 0) == pytest.approx(0.1 / 4)
    assert {rate for (rate,) in settings_of(model, optimizer, "lr").values()} == {0.3 / 4}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter) if parameter.requires_grad else None
    optimizer.step()  # torch takes the group without parameters


def test_a_frozen_parameter_is_in_no_group() -> None:
    model = Model()
    choose_trained(model, {"freeze": ["layers"], "train": ["layers.1.up"]})
    found = settings_of(model, optimizer_of(model, [{"params": "layers", "lr": 0.3}]), "lr")
    assert found == {name: (0.3 if ".1.up." in name else 0.1,) for name in trained_of(model)}


@pytest.mark.parametrize(
    "groups, what, instead",
    [
        (
            [{"params": "haed", "lr": 1}],
            "optimizer.groups[0].params: no parameter or module of the model is named haed",
            "[{params:head,lr:1}]",
        ),
        (
            [{"params": ["head", "q"]}],
            "optimizer.groups[0].params: no parameter or module of the model is named q",
            "[{params:[head]}]",
        ),
        (
            [{"params": "q", "lr": 1}],
            "optimizer.groups[0].params: no parameter or module of the model is named q",
            "[]",
        ),
        (
            [{"params": "layers"}, {"params": "*.norm", "lr": 1}],
            "optimizer.groups[1]: all parameters of *.norm are in groups before it, so that it has none",
            "[{params:layers}]",
        ),
        ([{"params": "embed", "lr": 1}], "optimizer.groups[0].params: all that embed means is frozen", "[]"),
        (
            [{"params": "*.norm", "weight_decay": 0.3}],
            "optimizer.groups[0].weight_decay=0.3 would spare all parameters of the group",
            "[{params:*.norm,weight_decay:0.3,decay_1d:true}]",
        ),
        ("head", "optimizer.groups is not a list of groups", "[{params:*.bias,weight_decay:0.0}]"),
        (["head"], "optimizer.groups is not a list of groups", "[{params:*.bias,weight_decay:0.0}]"),
        ([{"lr": 1}], "optimizer.groups[0] has no params", "[{lr:1,params:*.bias}]"),
        ([{"params": []}], "optimizer.groups[0].params=[] names no parameters", "[{params:*.bias}]"),
        ([{"params": "head", "lr": -1}], "optimizer.groups[0].lr=-1 does not fit", "[{params:head,lr:0.001}]"),
        (
            [{"params": "head", "momentum": 0.5}],
            "optimizer.groups[0].momentum: adamw has no such setting",
            "[{params:head}]",
        ),
        (
            [{"params": "head", "beta": [0.5, 0.5]}],
            "optimizer.groups[0].beta: adamw has no such setting",
            "[{params:head,betas:[0.5,0.5]}]",
        ),
        (
            [{"params": "head", "fused": True}],
            "optimizer.groups[0].fused is said of the whole optimizer, not of a group",
            "[{params:head}]",
        ),
    ],
)
def test_a_group_that_cannot_be_is_refused(groups: Any, what: str, instead: str) -> None:
    model = Model()
    choose_trained(model, {"freeze": ["embed"], "train": []})
    with pytest.raises(ConfigError) as error:
        optimizer_of(model, groups)
    assert (error.value.what, shlex.split(error.value.type)) == (what, [f"optimizer.groups={instead}"])
    OverridesParser.create().parse_override(*shlex.split(error.value.type))


def test_a_groups_momentum_is_held_against_nesterov() -> None:
    settings = {"name": "sgd", "momentum": 0.9, "nesterov": True}
    with pytest.raises(ConfigError, match=r"optimizer.groups\[0\]: nesterov=true needs a momentum") as error:
        optimizer_of(Model(), [{"params": "head", "momentum": 0.0}], **settings)
    assert "nesterov:false" in error.value.type


def test_a_misspelt_key_for_groups_is_told() -> None:
    with pytest.raises(ConfigError) as error:
        build_optimizer({"name": "sgd", "lr": 0.1, "group": [{"params": "head"}]}, Model().named_parameters())
    assert shlex.split(error.value.type) == ["optimizer.groups=[{params:head}]"]
