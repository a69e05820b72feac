"""Strategies in the plan: by their rows alone, so that one of another package is planned, or refused by name."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest

import nemo_dist_conf.plan
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.families.shapes import shape_of
from nemo_dist_conf.names import STRATEGY_NAMES
from nemo_dist_conf.plan import Job, make_plan, search, table
from nemo_dist_conf.plan import strategy_costs as costs_module
from nemo_dist_conf.plan.from_config import update_of
from nemo_dist_conf.plan.text_report import found_table
from nemo_dist_conf.schema.hardware import PROFILES, HardwareConf
from nemo_dist_conf.strategies import STRATEGIES, Strategy
from nemo_dist_conf.topology.solve import MeshSpec
from tests.plan.test_command import composed
from tests.plan.toy_costs import toy_strategy

FOLDER = Path(nemo_dist_conf.plan.__file__).parent
FILES = sorted(path for path in FOLDER.rglob("*.py") if "strategies" not in path.relative_to(FOLDER).parts)
NAMES = {name for strategy, aliases in STRATEGY_NAMES.items() for name in (strategy, *aliases)}
WHOLE = "nemo_dist_conf.plan.strategies.base:WHOLE_MODEL"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_no_name_of_a_strategy_stands_in_the_plan(path: Path) -> None:
    """So none can be compared; nor can a strategy's classes, whose modules are not imported. Texts may hold names."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    named = [node.value for node in nodes if isinstance(node, ast.Constant) and node.value in NAMES]
    imported = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    assert named == [] and [module for module in imported if module.rpartition(".")[2] in NAMES] == []


def test_every_strategy_names_its_costs() -> None:
    for strategy in STRATEGIES:
        assert type(costs_module.costs_of(strategy)).__module__ == f"nemo_dist_conf.plan.strategies.{strategy.name}"


def job(strategy: Strategy, cp: int = 1, **changed: Any) -> Job:
    """Eight ranks with a model of 1.1 B parameters, without mixed precision."""
    mesh = MeshSpec(8, ("dp", "cp"), (8 // cp, cp), (("dp_cp", ("dp", "cp")),))
    config = {"model_type": "llama", "num_hidden_layers": 4, "tie_word_embeddings": False}
    planned = Job(strategy, {}, mesh, shape_of(config), HardwareConf(**PROFILES["h100"]))
    return dataclasses.replace(planned, **changed)


@pytest.mark.parametrize("cp, axis", [(1, "dp"), (2, "dp_cp"), (8, "cp")])
def test_by_itself_a_strategy_has_the_whole_model_and_reduces_gradients_once(cp: int, axis: str) -> None:
    planned = make_plan(job(toy_strategy(WHOLE), cp, microbatches=4))
    whole = 4 * planned.job.model.parameters
    memory = planned.most
    assert (memory.parameters, memory.gradients, memory.gathered) == (whole, whole, 0)
    reduced = [entry for entry in planned.traffic if entry.kind == "all_reduce"]
    assert {entry.axis for entry in reduced} == {axis}
    assert sum(entry.bytes for entry in reduced) == whole
    assert "toy, " in table(planned) and planned.to_dict()["strategy"] == "toy"


def test_costs_of_another_package_are_asked() -> None:
    toy = toy_strategy("tests.plan.toy_costs:COSTS")
    small = dataclasses.replace(HardwareConf(**PROFILES["h100"]), memory_gib=4)
    planned = make_plan(job(toy, hardware=small))
    assert planned.most.gradients == 2 * planned.job.model.parameters
    assert planned.ways_out() == ["activation_checkpointing=true strategy.toy_offload=true"]
    assert "not counted  strategy.toy_offload: a toy" in table(planned)


def test_a_strategy_that_says_nothing_of_its_costs_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="does not know what strategy=toy costs") as refused:
        make_plan(job(toy_strategy(None)))
    assert refused.value.asked == "strategy=toy"
    assert set(refused.value.allowed.split(", ")) == {strategy.name for strategy in STRATEGIES}
    assert refused.value.type == f"strategy={STRATEGIES[0].name}"


def test_a_search_plans_what_has_costs_and_says_what_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    known = search(composed(), 2, top=50)
    assert known.left_out == () and "not searched" not in found_table(known)
    monkeypatch.setattr(costs_module, "STRATEGIES", (*STRATEGIES, toy_strategy(None)))
    silent = search(composed(), 2, top=50)
    assert silent.allowed == known.allowed
    assert "not searched  strategy=toy: the plan does not know what it costs" in found_table(silent)
    monkeypatch.setattr(costs_module, "STRATEGIES", (*STRATEGIES, toy_strategy(WHOLE)))
    found = search(composed(), 2, top=50)
    assert found.allowed == known.allowed + 1 and found.left_out == ()
    assert "strategy=toy" in [one.words for one in found.best]


@pytest.mark.parametrize(
    ("node", "states", "unsaid"),
    [
        ({"name": "adamw", "lr": 1.0}, 2, []),
        ({"name": "adamw", "lr": 1.0, "amsgrad": True}, 3, []),
        ({"name": "sgd", "lr": 1.0, "groups": [{"params": "head", "momentum": 0.9}]}, 0, ["momentum"]),
        ({"name": "adam", "lr": 1.0, "groups": [{"params": "head", "amsgrad": True}, {"params": "*"}]}, 2, ["amsgrad"]),
    ],
)
def test_states_of_an_optimizer_are_counted_and_those_of_a_group_alone_are_said(node, states, unsaid):
    update = update_of(node)
    assert update.states == states and list(update.of_groups) == unsaid
