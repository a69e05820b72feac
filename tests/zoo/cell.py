"""A cell of the zoo's table: a tiny model of a family, trained along an axis, beside plain torch in one process.

Weights are enlarged (tests/conformance/of_context.py), so that soft caps, sinks and windows matter.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.instantiate import instantiate
from tests.conformance.case import Case, Outcome, outcome_of
from tests.conformance.of_context import enlarge
from tests.dist.kinds import TOWERS, difference
from tests.dist.layouts import SGD, Trajectory, composed, full_state, take_plain_steps, take_steps
from tests.dist.pool import run_ranks
from tests.tiny_configs import tiny_config
from tests.zoo.axes import Axis

__all__ = [
    "LAYERS",
    "LENGTH",
    "STEPS",
    "TIMEOUT_S",
    "TOLERANCE",
    "Reference",
    "apart",
    "measure",
    "measure_kind",
    "reference",
    "tolerance",
]

#: Two for each stage, so that a stage holds all kinds of layers of most families.
LAYERS = 4
#: Rows that split evenly over the ranks of a sequence, and are longer than the windows.
LENGTH = 16
STEPS = 3
TOLERANCE = 1e-5
#: Losses are float32 there, too.
TOLERANCE_FLOAT64 = 1e-6
#: The highest tolerance of a family whose rounding errors grow.
MOST = 1e-3
TIMEOUT_S = 300.0

#: Gates that stay nearly closed: wide open, the layers divide by sums near 0, and a step of one process in float32 is
#: 1e-2 apart from one in float64.
_CLOSED = {"xlstm": "igate_preact.bias"}


@dataclass(frozen=True)
class Reference:
    """What one process has: losses and norms of each step, and every parameter before the first and after the last.

    rounding: how far apart one process is from itself when it sums the gradients of four parts of the batch.
    """

    steps: Trajectory
    before: dict[str, Tensor]
    after: dict[str, Tensor]
    rounding: float


def model_of(family: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The same in every process."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    # torch has no grouped products in float64
    options = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model = AutoModelForCausalLM.from_config(tiny_config(family, LAYERS), dtype=dtype, **options)
    enlarge(model)
    if family in _CLOSED:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(_CLOSED[family]):
                    parameter.sub_(4)
    return model.train()


@functools.lru_cache(maxsize=2)  # cells of a family come after one another
def reference(family: str, dtype: torch.dtype = torch.float32) -> Reference:
    """Plain transformers and torch on the whole batch. Raises what a family raises there; ValueError: not finite."""
    model = model_of(family, dtype)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    steps = take_plain_steps(model, SGD, STEPS, LENGTH)
    if not torch.tensor([*steps.losses, *steps.norms]).isfinite().all():
        raise ValueError(f"loss or norm is not finite: {steps.losses}, {steps.norms}")
    want = Reference(steps, before, _values(model), 0.0)
    parts = model_of(family, dtype)
    summed = take_plain_steps(parts, SGD, STEPS, LENGTH, microbatches=4)
    return dataclasses.replace(want, rounding=apart(summed.losses, summed.norms, _values(parts), want))


def _values(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.named_parameters()}


def tolerance(family: str) -> float:
    """What ranks may be apart by: more than TOLERANCE where the order of a sum alone does as much in one process."""
    return max(TOLERANCE, min(10 * reference(family).rounding, MOST))


def measure(family: str, axis: Axis) -> Outcome:
    """``equal``, ``different`` or ``died``, or ``refused`` with what was found.

    What is apart by as little as rounding may grow to is computed once more in float64, where nothing of that is left;
    what does not run in float64 is held against one process that does.
    """
    found = _outcome(family, axis, torch.float32, tolerance(family))
    if found.kind == "different" and found.difference <= max(MOST, 10 * reference(family).rounding):
        # Some layers compute in float32 all the same.
        most = max(TOLERANCE_FLOAT64, min(10 * reference(family, torch.float64).rounding, TOLERANCE))
        again = _outcome(family, axis, torch.float64, most)
        if again.kind == "refused":
            again = _outcome(family, axis, torch.float32, tolerance(family), torch.float64)
        return again if again.kind == "equal" else found
    return found


def _outcome(
    family: str, axis: Axis, dtype: torch.dtype, most: float, of_process: torch.dtype | None = None
) -> Outcome:
    """dtype: that ranks compute in. of_process: that the process does which they are held against; None: the same."""
    run = functools.partial(_run, family, axis, dtype, of_process or dtype)
    return outcome_of(Case("", family, axis.name, run, tolerance=most))


def _run(family: str, axis: Axis, dtype: torch.dtype, of_process: torch.dtype) -> float:
    want = reference(family, of_process)
    found = run_ranks(axis.ranks, _on_rank, family, axis, dtype, timeout_s=TIMEOUT_S)
    for refusal in found:
        if isinstance(refusal, ConfigError):
            raise refusal
    each = [apart(losses, norms, found[0][2], want) for losses, norms, _ in found]
    return max(each) if not any(map(math.isnan, each)) else math.nan


def apart(losses: list[float], norms: list[float], after: dict[str, Tensor], want: Reference) -> float:
    """The worst relative difference of a loss, a norm, or of what a parameter has moved by."""
    pairs = [*zip(losses, want.steps.losses, strict=True), *zip(norms, want.steps.norms, strict=True)]
    found = [abs(one - other) / abs(other) for one, other in pairs]
    moved = {name: float((value - want.before[name]).norm()) for name, value in want.after.items()}
    least = 1e-3 * max(moved.values())  # of parameters that hardly move, only rounding is left
    for name, value in want.after.items():
        rounded = 3e-2 * float(value.norm())  # float32 keeps 1e-7 of a value, however little is added to it
        found.append(float((after[name] - value).norm()) / max(moved[name], least, rounded))
    return max(found) if not any(map(math.isnan, found)) else math.nan


def _on_rank(family: str, axis: Axis, dtype: torch.dtype = torch.float32) -> Any:
    """(losses, norms, every parameter of rank 0 in the end), or the refusal.

    A refusal is returned, so that the ranks serve the next cell too.
    """
    with axis.around():
        try:
            setup, model, optimizer = instantiate(composed(*axis.words, optimizer=SGD), model=model_of(family, dtype))
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


def measure_kind(name: str, axis: Axis) -> Outcome:
    """``measure`` for one of tests/dist/kinds, which brings its own batch and loss."""
    state = functools.partial(_weights, axis=axis)
    frozen = TOWERS[name] if axis.freezes else None
    run = functools.partial(difference, axis.ranks, name, *axis.words, around=axis.around, state=state, frozen=frozen)
    return outcome_of(Case("", name, axis.name, run))
