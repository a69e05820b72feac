"""Training in float16: gradients that would be zero or overflow without a scale of the loss, on any layout."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from nemo_dist_conf import DDPConfig, DistributedSetup, MeshContext
from nemo_dist_conf.gradients import clip_grad_norm_
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.train.loop import _loss_scale
from nemo_dist_conf.train.loss_scale import LossScale
from nemo_dist_conf.train.step import train_step
from tests import warm
from tests.dist.layouts import MODELS, batch, composed, loss_sum
from tests.dist.pool import run_ranks
from tests.train.test_recipe import TINY

FLOAT16 = ["strategy.mp_policy.param_dtype=float16", "strategy.mp_policy.output_dtype=float32"]
LAYOUTS = {
    "ddp": ["strategy=ddp", "strategy.autocast_dtype=float16"],
    "fsdp2": FLOAT16,
    "tp": [*FLOAT16, "parallelism.tp_size=2"],
    "pp": [*FLOAT16, "parallelism.pp_size=2", "pipeline.pp_batch_size=16", "pipeline.pp_microbatch_size=4"],
}


def test_the_scale_falls_when_gradients_overflow_and_rises_after_many_steps():
    scale = LossScale()
    assert scale.value == 2.0**16 and scale.lower() and scale.value == 2.0**15
    for _ in range(2000):
        scale.made_step()
    assert (scale.value, scale.steps) == (2.0**16, 0)
    scale.made_step()
    other = LossScale()
    other.load_state_dict(json.loads(json.dumps(scale.state_dict())))
    assert (other.value, other.steps) == (scale.value, 1)
    scale.value = 1.0
    assert not scale.lower()  # the reason is another


def test_the_loss_is_scaled_whatever_says_that_float16_is_computed_in():
    def scale(dtype=None, **options):
        return _loss_scale(DistributedSetup(MeshContext(), DDPConfig(**options)), dtype)

    assert scale() is None and scale(torch.bfloat16) is None
    assert scale(autocast_dtype="float16") is not None
    assert scale(torch.float16) is not None  # the recipe's own autocast, for a strategy without an option for it


def trained(words: list[str], scale: float | None, tokens: int = 16 * 15):
    """Three steps of SGD with momentum: losses, norms, where the scale ends. tokens: what the loss is divided by."""
    sgd = {"name": "sgd", "lr": 0.5, "momentum": 0.9}
    setup, model, optimizer = instantiate(composed(*words, model=MODELS["llama"], optimizer=sgd))
    context, held = setup.mesh_context, None if scale is None else LossScale(scale)
    ids, labels = (part.chunk(context.data_size)[context.data_rank] for part in batch())
    found = []
    for _ in range(3):
        done = train_step(
            model, optimizer, [(ids, labels)], context, global_tokens=tokens, max_grad_norm=1.0, loss_scale=held
        )
        found.append((done.loss, done.grad_norm, done.updated))
    return found, None if held is None else held.value


@pytest.fixture(scope="module")
def in_float32():
    return trained_alone(["strategy.mp_policy=null"], None)


def trained_alone(words, scale, **options):
    return run_ranks(1, trained, words, scale, **options)[0]


@pytest.mark.dist
@pytest.mark.parametrize("layout", LAYOUTS)
def test_steps_are_those_of_float32_also_where_gradients_overflow_first(layout, in_float32):
    ranks = run_ranks(2, trained, LAYOUTS[layout], 2.0**40)
    assert all(found == ranks[0] for found in ranks)
    (steps, scale), (expected, _) = ranks[0], in_float32
    assert 1.0 <= scale < 2.0**40
    for (loss, norm, updated), (right, right_norm, _) in zip(steps, expected):
        assert updated
        assert loss == pytest.approx(right, rel=3e-3) and norm == pytest.approx(right_norm, rel=2e-2)


def own_loop(words: list[str]):
    """Steps of a loop that brings torch's scaler, and the scale at its end."""
    sgd = {"name": "sgd", "lr": 0.5, "momentum": 0.9}
    setup, model, optimizer = instantiate(composed(*words, model=MODELS["llama"], optimizer=sgd))
    context, scaler = setup.mesh_context, torch.amp.GradScaler("cpu", init_scale=2.0**40)
    ids, labels = (part.chunk(context.data_size)[context.data_rank] for part in batch())
    found: list[tuple[float, float]] = []
    while len(found) < 3:
        loss = loss_sum(model, ids, labels)
        scaler.scale(loss * (context.gradient_size / (16 * 15))).backward()
        scaler.unscale_(optimizer)
        norm = clip_grad_norm_(model, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if torch.isfinite(norm):
            found.append((float(context.sum_over_data(loss.detach()) / (16 * 15)), float(norm)))
    return found, scaler.get_scale()


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "tp"])
def test_a_loop_may_bring_torchs_scaler(layout, in_float32):
    ranks = run_ranks(2, own_loop, LAYOUTS[layout])
    assert ranks[0] == ranks[1] and 1.0 <= ranks[0][1] < 2.0**40
    for (loss, norm), (right, right_norm, _) in zip(ranks[0][0], in_float32[0]):
        assert loss == pytest.approx(right, rel=3e-3) and norm == pytest.approx(right_norm, rel=2e-2)


@pytest.mark.dist
def test_small_gradients_are_zero_without_it():
    """As in a global batch of many tokens: each token's share of the mean is below the smallest float16."""
    tokens = 10**10
    expected = trained_alone(["strategy.mp_policy=null"], None, tokens=tokens)[0][0][1]
    assert trained_alone(FLOAT16, 2.0**16, tokens=tokens)[0][0][1] == pytest.approx(expected, rel=2e-2)
    assert trained_alone(FLOAT16, None, tokens=tokens)[0][0][1] < 0.5 * expected


@pytest.mark.slow
def test_the_recipe_goes_on_with_the_scale_that_it_had(tmp_path: Path):
    always = ["train.dtype=float16", "train.warmup_steps=0", "train.schedule=constant", "device=cpu"]

    def train(folder: str, *words: str) -> list[tuple[float, float]]:
        line = ["python", "-m", "nemo_dist_conf.train", *TINY, *always, f"hydra.run.dir={folder}", *words]
        done = warm.run(line, cwd=tmp_path, env={"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr
        lines = map(json.loads, (tmp_path / folder / "metrics.jsonl").read_text().splitlines())
        return [(line["loss"], line["grad_norm"]) for line in lines]

    whole = train("whole", "train.steps=4")
    train("parts", "train.steps=2", "checkpoint.every=2")
    assert train("parts", "train.steps=4", "checkpoint.every=2") == whole
    kept = [path.read_text() for path in (tmp_path / "parts" / "checkpoints").rglob("*.json")]
    found = [re.search(r'"loss_scale":\s*(\{[^}]*\})', text) for text in kept]
    states = [json.loads(match[1]) for match in found if match]
    assert {state["steps"] for state in states} == {2, 4} and {state["value"] for state in states} == {2.0**16}
