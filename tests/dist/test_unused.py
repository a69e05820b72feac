"""DDP with parameters that a step does not use: refused with their names before a gradient is used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.gradients import accumulate, clip_grad_norm_
from nemo_dist_conf.instantiate import instantiate
from tests.dist.kinds import Stack, difference
from tests.dist.layouts import composed
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist


class TwoTowers(Stack):
    """Uses its second tower where it is asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Linear(8, 8)

    def forward(self, x: Tensor, with_vision: bool) -> Tensor:  # type: ignore[override]
        return super().forward(x) + (self.vision(x) if with_vision else 0)


def made(*words: str) -> tuple[Any, Any]:
    optimizer = lambda parameters: torch.optim.SGD(parameters, 0.1)  # noqa: E731
    return instantiate(composed("strategy=ddp", *words), TwoTowers(), optimizer)[1:]


def stepped(words: tuple[str, ...], used: tuple[bool, ...], end: str) -> list[str]:
    """What each step came to; the weights are those from before it where it was refused."""
    model, optimizer = made(*words)
    found = []
    for index, with_vision in enumerate(used):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        try:
            with accumulate(model, last=True):
                model(torch.ones(2, 8), with_vision).square().mean().backward()
            if end == "clip":
                clip_grad_norm_(model, 1.0)
            if end != "forward":
                optimizer.step()
            found.append("done")
        except ConfigError as error:
            assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
            found.append(str(error))
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("end", ["clip", "step", "forward"])
def test_the_error_names_the_parameters_and_the_switch(end: str) -> None:
    """forward: of a loop with an optimizer that the hook did not see, which learns of it in the next forward."""
    for found in run_ranks(2, stepped, (), (False, False), end):
        said = found[end == "forward"]
        assert "2 of 16 parameters (vision.weight, vision.bias) got no gradient" in said
        assert "type     strategy.find_unused_parameters=true" in said
        assert end != "forward" or found[0] == "done"


def test_with_the_switch_steps_are_made() -> None:
    words = ("strategy.find_unused_parameters=true",)
    assert run_ranks(2, stepped, words, (False, True, False), "clip") == [["done"] * 3] * 2


def test_a_graph_that_changes_although_it_was_promised_not_to() -> None:
    for first, second in run_ranks(2, stepped, ("strategy.static_graph=true",), (True, False), "step"):
        assert first == "done" and "static_graph=false strategy.find_unused_parameters=true" in second


def test_parameters_that_no_step_uses_are_no_matter_of_microbatches() -> None:
    """A vision-language model that is given text alone, as in one process."""
    words = ("strategy=ddp", "strategy.find_unused_parameters=true")
    assert difference(2, "gemma3_text_alone", *words, microbatches=2) < 1e-5


def frozen(strategy: str) -> float:
    model = instantiate(composed(f"strategy={strategy}"), Stack().requires_grad_(False))[1]
    return float(model(torch.ones(2, 8)).sum())


def test_a_model_that_trains_nothing_runs() -> None:
    torch.manual_seed(0)
    expected = float(Stack()(torch.ones(2, 8)).sum())
    for found in run_ranks(2, frozen, "ddp"):
        assert found == pytest.approx(expected)
