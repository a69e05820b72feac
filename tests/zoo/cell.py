"""A cell of the zoo's table: a tiny model of a family, trained along an axis, beside plain torch in one process.

Weights are enlarged (tests/conformance/of_context.py), so that soft caps, sinks and windows matter.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.instantiate import instantiate
from tests.conformance.case import Case, Outcome, outcome_of
from tests.conformance.of_context import enlarge
from tests.dist.layouts import SGD, Trajectory, composed, full_state, take_plain_steps, take_steps
from tests.dist.pool import run_ranks
from tests.tiny_configs import tiny_config
from tests.zoo.axes import Axis

__all__ = ["LAYERS", "LENGTH", "STEPS", "TIMEOUT_S", "TOLERANCE", "Reference", "measure", "reference"]

#: Two for each stage, so that a stage holds all kinds of layers of most families.
LAYERS = 4
#: Rows that split evenly over the ranks of a sequence, and are longer than the windows.
LENGTH = 16
STEPS = 3
TOLERANCE = 1e-5
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Reference:
    """What one process has: losses and norms of each step, and every parameter before the first and after the last."""

    steps: Trajectory
    before: dict[str, Tensor]
    after: dict[str, Tensor]


def model_of(family: str) -> nn.Module:
    """The same in every process."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, LAYERS), dtype=torch.float32)
    enlarge(model)
    return model.train()


@functools.lru_cache(maxsize=1)  # cells of a family come after one another
def reference(family: str) -> Reference:
    """Plain transformers and torch on the whole batch. Raises what a family raises there; ValueError: not finite."""
    model = model_of(family)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    steps = take_plain_steps(model, SGD, STEPS, LENGTH)
    if not torch.tensor([*steps.losses, *steps.norms]).isfinite().all():
        raise ValueError(f"loss or norm is not finite: {steps.losses}, {steps.norms}")
    return Reference(steps, before, {name: value.detach() for name, value in model.named_parameters()})


def measure(family: str, axis: Axis) -> Outcome:
    """``equal``, ``different`` or ``died``, or ``refused`` with what was found."""
    return outcome_of(Case("", family, axis.name, functools.partial(_apart, family, axis), tolerance=TOLERANCE))


def _apart(family: str, axis: Axis) -> float:
    """The worst relative difference of a loss, a norm, or of what a parameter has moved by."""
    want = reference(family)
    found = run_ranks(axis.ranks, _on_rank, family, axis, timeout_s=TIMEOUT_S)
    for refusal in found:
        if isinstance(refusal, ConfigError):
            raise refusal
    apart = []
    for losses, norms, _ in found:
        pairs = [*zip(losses, want.steps.losses, strict=True), *zip(norms, want.steps.norms, strict=True)]
        apart += [abs(one - other) / abs(other) for one, other in pairs]
    weights = found[0][2]
    moved = {name: float((value - want.before[name]).norm()) for name, value in want.after.items()}
    least = 1e-3 * max(moved.values())  # of parameters that hardly move, only rounding is left
    for name, value in want.after.items():
        rounded = 1e-2 * float(value.norm())  # float32 keeps 1e-7 of a value, whatever is added to it
        apart.append(float((weights[name] - value).norm()) / max(moved[name], least, rounded))
    return max(apart) if all(number == number for number in apart) else float("nan")


def _on_rank(family: str, axis: Axis) -> Any:
    """(losses, norms, every parameter of rank 0 in the end), or the refusal.

    A refusal is returned, so that the ranks serve the next cell too.
    """
    with axis.around():
        try:
            setup, model, optimizer = instantiate(composed(*axis.words, optimizer=SGD), model=model_of(family))
            steps = take_steps(setup, model, optimizer, 1, STEPS, False, LENGTH)
        except ConfigError as refusal:
            return refusal.with_traceback(None)
        weights = _weights(model, axis)
    return steps.losses, steps.norms, weights if dist.get_rank() == 0 else {}


def _weights(model: Any, axis: Axis) -> dict[str, Tensor]:
    if "strategy=megatron_fsdp" in axis.words:
        from tests.dist.test_megatron_fsdp import whole_weights

        return whole_weights(model)
    return full_state(model)
