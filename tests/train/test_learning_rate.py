"""The learning rate is a function of the step, for each group of the optimizer."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.train.learning_rate import FINAL_FRACTION, LearningRate


def parameter() -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.ones(1))


def test_constant_without_warmup_is_always_one() -> None:
    rate = LearningRate("constant", steps=10)
    assert [rate.factor(step) for step in range(10)] == [1.0] * 10


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_the_warmup_rises_linearly_and_never_from_zero(schedule: str) -> None:
    rate = LearningRate(schedule, steps=10, warmup_steps=4)
    assert [rate.factor(step) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize("steps, warmup", [(10, 0), (10, 4), (2, 1), (2, 0), (1, 0), (3, 3), (1000, 20)])
def test_the_cosine_falls_to_its_end(steps: int, warmup: int) -> None:
    rate = LearningRate("cosine", steps=steps, warmup_steps=warmup)
    factors = [rate.factor(step) for step in range(warmup, steps)]
    assert factors == sorted(factors, reverse=True)
    if len(factors) > 1:
        assert factors[0] == 1.0
        assert factors[-1] == pytest.approx(FINAL_FRACTION)


def test_after_its_last_step_the_cosine_stays_at_its_end() -> None:
    assert LearningRate("cosine", steps=10).factor(50) == pytest.approx(FINAL_FRACTION)


def test_a_warmup_longer_than_the_run_just_rises() -> None:
    rate = LearningRate("cosine", steps=2, warmup_steps=20)
    assert [rate.factor(0), rate.factor(1)] == [0.05, 0.1]


def test_each_group_keeps_its_own_rate() -> None:
    groups = [{"params": [parameter()], "lr": 0.1}, {"params": [parameter()], "lr": 0.01}]
    optimizer = torch.optim.SGD(groups)
    rate = LearningRate("constant", steps=10, warmup_steps=2)
    for _ in range(3):  # applying it again changes nothing: it is not a product of steps
        assert rate.apply(optimizer, 0) == pytest.approx(0.05)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.05, 0.005])
    rate.apply(optimizer, 9)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.01]


def test_a_resumed_optimizer_goes_on_from_the_same_rate() -> None:
    """A checkpoint is taken in the middle of the schedule, when the group's rate is below its own."""
    rate = LearningRate("cosine", steps=10)
    first = torch.optim.SGD([parameter()], lr=0.1)
    rate.apply(first, 6)
    second = torch.optim.SGD([parameter()], lr=0.1)
    second.load_state_dict(first.state_dict())
    assert rate.apply(second, 7) == rate.apply(first, 7)


def test_a_rate_that_is_a_tensor_is_changed_in_place() -> None:
    optimizer = torch.optim.AdamW([parameter()], lr=torch.tensor(0.1), capturable=False, foreach=False)
    tensor = optimizer.param_groups[0]["lr"]
    rate = LearningRate("constant", steps=4, warmup_steps=2)
    rate.apply(optimizer, 0)
    assert tensor.item() == pytest.approx(0.05)
    rate.apply(optimizer, 3)
    assert optimizer.param_groups[0]["lr"] is tensor and tensor.item() == pytest.approx(0.1)


@pytest.mark.parametrize(
    "schedule, warmup, asked, type_",
    [
        ("cosin", 0, "train.schedule=cosin", "train.schedule=cosine"),
        ("step", 0, "train.schedule=step", "train.schedule=constant"),
        (None, 0, "train.schedule=null", "train.schedule=constant"),
        ("cosine", -1, "train.warmup_steps=-1", "train.warmup_steps=10"),
        ("cosine", 2.5, "train.warmup_steps=2.5", "train.warmup_steps=10"),
        ("cosine", True, "train.warmup_steps=true", "train.warmup_steps=10"),
    ],
)
def test_wrong_settings_are_refused(schedule: Any, warmup: Any, asked: str, type_: str) -> None:
    with pytest.raises(ConfigError) as error:
        LearningRate(schedule, steps=100, warmup_steps=warmup)
    assert (error.value.asked, error.value.type) == (asked, type_)


def test_both_wrong_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        LearningRate("x", steps=100, warmup_steps=-1)
    assert len(error.value.problems) == 2
