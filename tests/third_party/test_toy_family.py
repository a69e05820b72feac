"""A model family of another package: its row alone makes plan, check, tensor and expert parallelism work.

toy_family/ is laid out as pip installs a package: a module and its metadata, whose entry point names the row.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from nemo_dist_conf.composition.check import check
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.families.mixers import HYBRID, OWN_ATTENTION
from nemo_dist_conf.families.shapes import shape_of, weights
from nemo_dist_conf.runtime.techniques.tensor.parallel import apply_tensor_parallel
from tests.dist.layouts import FEWER_STEPS, SGD, Trajectory, composed, single_process, train
from tests.dist.pool import run_ranks

ROOT, PACKAGE = Path(__file__).resolve().parents[2], Path(__file__).resolve().parent / "toy_family"

#: An odd vocabulary, which ranks do not divide.
TOY: dict[str, Any] = {"model_type": "toy", "n_words": 97}
EXPERTS: dict[str, Any] = {**TOY, "n_experts": 4}


def plan(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The plan of a command line that takes the toy's config from its package, with an import of torch an error."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text("raise AssertionError('torch was imported')")
    path = os.pathsep.join(map(str, (folder, PACKAGE, ROOT)))
    search = "hydra.searchpath=[pkg://toy_family.conf]"
    command = [sys.executable, "-m", "nemo_dist_conf.plan", search, "model=toy", *words]
    env = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_a_command_line_plans_it_without_torch(tmp_path: Path) -> None:
    words = ("model.config.n_words=97", "parallelism.tp_size=2", "world_size=4", "plan.json=-")
    done = plan(*words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout)
    assert planned["model"] == {**planned["model"], "type": "toy", "parameters": 23_776}
    calls = {(row["axis"], row["kind"], row["why"]) for row in planned["traffic"]}
    assert ("tp", "all_reduce", "row sums") in calls  # its own names are found in its own plan
    # Of matrices a half, of which each data rank keeps a half; of 97 words 49, then 25; norms are whole under tp.
    matrices = 4 * (32 * 32 // 4) + 3 * (32 * 48 // 4)
    elements = 2 * (matrices + 2 * 16) + 2 * 25 * 32 + 16
    assert planned["memory_bytes"][0]["parameters"] == 4 * elements


def test_an_attention_of_its_own_is_planned_on_whole_rows(tmp_path: Path) -> None:
    done = plan("parallelism.cp_size=2", "world_size=2", "data.seq_len=64", "plan.json=-", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    traffic = json.loads(done.stdout)["traffic"]
    assert "keys and values" not in {row["why"] for row in traffic}
    found = {(row["kind"], row["when"]): row for row in traffic if row["why"] == "whole rows"}
    forward, backward = found["all_gather", "forward"], found["reduce_scatter", "backward"]
    assert forward["calls"] == backward["calls"] and forward["calls"] % 2 == 0  # of two layers, one each


def test_a_config_chooses_the_layers_that_mix_otherwise() -> None:
    assert OWN_ATTENTION.layers({}, 2) == (True, True)
    assert HYBRID.layers({"layer_types": ["linear_attention", "full_attention"]}, 2) == (True, False)
    assert HYBRID.layers({"full_attention_interval": 4}, 2) == (True, True)


def test_a_command_line_refuses_what_its_sizes_do_not_allow(tmp_path: Path) -> None:
    done = plan("parallelism.tp_size=3", "world_size=3", folder=tmp_path)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("tp_size=3 does not divide the model's 4 attention heads")


@pytest.mark.parametrize(
    ("config", "sizes", "what"),
    [
        ({**TOY, "heads": 3}, {"tp_size": 2}, "does not divide the model's 3 attention heads"),
        (TOY, {"ep_size": 2}, r"the model \(toy\) has no experts"),
        ({**EXPERTS, "n_experts": 3}, {"ep_size": 2}, "does not divide the model's 3 experts"),
    ],
)
def test_check_knows_what_its_fields_mean(
    config: dict[str, Any], sizes: dict[str, int], what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(PACKAGE)
    cfg = composed(*(f"parallelism.{key}={size}" for key, size in sizes.items()), model={"config": config})
    with pytest.raises(ConfigError, match=what):
        check(cfg, 2)


def with_toy(fn: Callable[..., Any], *args: Any) -> Any:
    sys.path.insert(0, str(PACKAGE))
    try:
        return fn(*args)
    finally:
        sys.path.remove(str(PACKAGE))


def both_weights(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Names and shapes of all weights: of its row, and of its model."""
    from toy_family.modeling import ToyConfig, ToyForCausalLM

    with torch.device("meta"):
        model = ToyForCausalLM(ToyConfig(**config))
    built = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return {name: weight.shape for name, weight in weights(shape_of(config))}, built


@pytest.mark.dist
@pytest.mark.parametrize("config", [TOY, EXPERTS], ids=["dense", "experts"])
def test_the_plans_weights_are_those_of_its_model(config: dict[str, Any]) -> None:
    for planned, built in run_ranks(2, with_toy, both_weights, config):
        assert planned == built


def trained(words: tuple[str, ...], config: dict[str, Any]) -> tuple[Trajectory, Trajectory]:
    cfg = composed("strategy.mp_policy=null", *words, model={"config": config}, optimizer=SGD)
    found = train(cfg, steps=FEWER_STEPS, whole=True)
    single = single_process(config, SGD, found.weights) if dist.get_rank() == 0 else found
    return found, single


@pytest.mark.dist
@pytest.mark.parametrize(
    ("words", "config"),
    [
        (("parallelism.tp_size=2",), TOY),
        (("parallelism.tp_size=2", "strategy.sequence_parallel=true"), TOY),
        (("parallelism.ep_size=2",), EXPERTS),
        (("parallelism.tp_size=2", "parallelism.ep_size=2"), EXPERTS),
        (("parallelism.tp_size=2", "parallelism.ep_size=2", "strategy.sequence_parallel=true"), EXPERTS),
    ],
    ids=["tp", "sp", "ep", "tp x ep", "sp x ep"],
)
def test_training_equals_one_process(words: tuple[str, ...], config: dict[str, Any]) -> None:
    found, single = run_ranks(2, with_toy, trained, words, config)[0]
    assert found.losses == pytest.approx(single.losses[:FEWER_STEPS], rel=1e-5)
    assert found.norms == pytest.approx(single.norms[:FEWER_STEPS], rel=1e-4)
    assert found.gradients.keys() == single.gradients.keys()
    for name, gradient in single.gradients.items():
        torch.testing.assert_close(found.gradients[name], gradient, rtol=1e-4, atol=1e-6)


def plain_module() -> tuple[float, set[str]]:
    """How far the logits of the toy that is of no library are apart, and the modules that were split."""
    from toy_family.modeling import PlainToy

    torch.manual_seed(0)
    single = PlainToy()
    torch.manual_seed(0)
    model = PlainToy()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    styles = apply_tensor_parallel(model, mesh["tp"])
    ids = torch.randint(96, (2, 7), generator=torch.Generator().manual_seed(1))
    return float((single(ids) - model(ids)).abs().max()), set(styles)


@pytest.mark.dist
def test_a_module_of_no_library_is_known_by_its_config() -> None:
    for far, split in run_ranks(2, with_toy, plain_module):
        assert far < 1e-5
        assert {"trunk.stack.0.mix.query", "trunk.stack.1.feed.narrow", "trunk.words", "to_words"} <= split
