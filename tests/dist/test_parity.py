"""On every layout, with every option, fp32 steps have the losses and gradient norms of one plain process."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch

from tests.dist.layouts import (
    ADAMW,
    FEWER_STEPS,
    MAX_NORM,
    MODELS,
    SGD,
    STEPS,
    Trajectory,
    composed,
    single_process,
    train,
)
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist

FP32 = "strategy.mp_policy=null"
#: name -> (ranks, the words that choose it)
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ddp 1": (1, ("strategy=ddp",)),
    "ddp 2": (2, ("strategy=ddp",)),
    "ddp 4": (4, ("strategy=ddp",)),
    "fsdp2 1": (1, (FP32,)),
    "fsdp2 2": (2, (FP32,)),
    "fsdp2 4": (4, (FP32,)),
    "hsdp 2x2": (4, (FP32, "parallelism.dp_replicate_size=2")),
    "tp 2": (2, (FP32, "parallelism.tp_size=2")),
    "tp 2 x dp 2": (4, (FP32, "parallelism.tp_size=2")),
}


@dataclass(frozen=True)
class Case:
    """One run: options in words, microbatches, the model of MODELS, its optimizer.

    whole: weights and every gradient are compared too, not only losses and norms.
    """

    words: tuple[str, ...] = ()
    microbatches: int = 1
    model: str = "llama"
    sgd: bool = False
    whole: bool = False

    @property
    def steps(self) -> int:
        return STEPS if self.microbatches == 1 else FEWER_STEPS


CHECKPOINT = "activation_checkpointing=true"
SELECTIVE = "activation_checkpointing=selective"
SEQUENCE = "strategy.sequence_parallel=true"
PREFETCH = "strategy.enable_fsdp2_prefetch=true"
OFFLOAD = "strategy.offload_policy.enabled=true"
NOT_DEFERRED = "strategy.defer_fsdp_grad_sync=false"
RESHARD, KEEP = "strategy.reshard_after_forward=true", "strategy.reshard_after_forward=false"
PLAN = "strategy.tp_plan={blocks.*.up:colwise,blocks.*.down:rowwise}"
SEQUENCE_PLAN = (
    "strategy.tp_plan={embed:embedding_rowwise_scatter_output,blocks.*.norm:sequence_parallel,blocks.*.up:colwise,"
    "blocks.*.down:rowwise_scatter_output,head:colwise_gather_output}"
)

DDP = {
    "plain": Case(whole=True),
    "sgd, 4 microbatches": Case((), 4, sgd=True),
    "full checkpointing": Case((CHECKPOINT,)),
    "selective checkpointing": Case((SELECTIVE,)),
    "4 microbatches": Case((), 4),
    "tied": Case(model="tied", sgd=True, whole=True),
    "user's module": Case((CHECKPOINT,), 4, model="module", whole=True),
}
#: Four microbatches with one optimizer, where a run takes ten times as long.
ONCE = {name: case for name, case in DDP.items() if name != "4 microbatches"}
#: One option at a time, on two ranks.
FSDP2 = {
    **DDP,
    "prefetch": Case((PREFETCH,)),
    "offload": Case((OFFLOAD,)),
    "reshard": Case((RESHARD,)),
    "keep": Case((KEEP,)),
    "4 microbatches, each reduced": Case((NOT_DEFERRED,), 4, sgd=True),
}
#: Embedding and head in units of their own.
WIDE = {
    "wide": Case(model="wide", whole=True),
    "wide, prefetch, offload, reshard": Case((PREFETCH, OFFLOAD, RESHARD), model="wide"),
    "wide, keep, 4 microbatches, each reduced": Case((KEEP, NOT_DEFERRED), 4, model="wide", sgd=True),
    "wide, prefetch, 4 microbatches": Case((PREFETCH,), 4, model="wide"),
}
#: The rest of FSDP2's, several at a time: with tensor parallelism there are twice as many runs.
PAIRED = {
    "prefetch, offload, reshard": Case((PREFETCH, OFFLOAD, RESHARD)),
    "keep, 4 microbatches, each reduced": Case((KEEP, NOT_DEFERRED), 4, sgd=True),
}
#: Four ranks are slow on a small machine: every option, several at a time.
COMBINED = {
    "plain": Case(whole=True),
    "sgd, prefetch, full checkpointing, reshard, 4 microbatches": Case((PREFETCH, CHECKPOINT, RESHARD), 4, sgd=True),
    "selective checkpointing, offload, keep": Case((SELECTIVE, OFFLOAD, KEEP)),
    "tied, 4 microbatches, each reduced": Case((NOT_DEFERRED,), 4, model="tied"),
    "user's module, sgd, prefetch, offload": Case((PREFETCH, OFFLOAD), model="module", sgd=True),
}


def _with_tensor_parallel(cases: dict[str, Case], both: set[str]) -> dict[str, Case]:
    """Each case with sequence parallelism, and those of ``both`` without; a user's module says how its layers are
    split.
    """
    found = {}
    for name, case in cases.items():
        for sequence in (False, True) if name in both else (True,):
            words = (SEQUENCE,) * sequence
            if case.model == "module":
                words += (SEQUENCE_PLAN if sequence else PLAN,)
            key = f"{name}, sequence parallel" if sequence else name
            found[key] = Case((*case.words, *words), case.microbatches, case.model, case.sgd, case.whole)
    return found


CASES: dict[str, dict[str, Case]] = {
    "ddp 1": DDP,
    "ddp 2": DDP,
    "ddp 4": DDP,
    "fsdp2 1": COMBINED,
    "fsdp2 2": {**FSDP2, **WIDE, "sequence parallel with nothing to split": Case((SEQUENCE,))},
    "fsdp2 4": COMBINED,
    "hsdp 2x2": COMBINED,
    "tp 2": _with_tensor_parallel({**ONCE, **PAIRED}, {"plain", "full checkpointing", "tied", "user's module"}),
    "tp 2 x dp 2": _with_tensor_parallel({**COMBINED, "wide": Case(model="wide", whole=True)}, {"plain", "wide"}),
}


def run_cases(layout: str, names: tuple[str, ...]) -> dict[str, Trajectory]:
    """On a rank: one run after the other."""
    found = {}
    for name in names:
        case = CASES[layout][name]
        cfg = composed(*LAYOUTS[layout][1], *case.words, model=MODELS[case.model], optimizer=SGD if case.sgd else ADAMW)
        found[name] = train(cfg, case.microbatches, case.steps, case.whole)
    return found


@functools.cache
def batched(layout: str) -> list[dict[str, Trajectory]] | None:
    """Every case of a layout in one call, which is quicker; None where one of them fails, and must be run alone."""
    try:
        return run_ranks(LAYOUTS[layout][0], run_cases, layout, tuple(CASES[layout]))
    except Exception:
        return None


@functools.cache
def ranks_of(layout: str, name: str) -> list[Trajectory]:
    found = batched(layout) or run_ranks(LAYOUTS[layout][0], run_cases, layout, (name,))
    return [rank[name] for rank in found]


@functools.cache
def initial_weights(model: str) -> dict[str, torch.Tensor]:
    cfg = composed("strategy=ddp", model=MODELS[model], optimizer=SGD)
    return run_ranks(1, train, cfg, steps=0, whole=True)[0].weights


@functools.cache
def expected(model: str, sgd: bool) -> Trajectory:
    return run_ranks(1, single_process, model, SGD if sgd else ADAMW, initial_weights(model))[0]


EVERY = [(layout, name) for layout, cases in CASES.items() for name in cases]
WHOLE = [(layout, name) for layout, name in EVERY if CASES[layout][name].whole]


@pytest.mark.parametrize("layout, name", EVERY, ids=[f"{layout}-{name}" for layout, name in EVERY])
def test_equals_one_process(layout: str, name: str) -> None:
    case = CASES[layout][name]
    want = expected(case.model, case.sgd)
    first, *others = ranks_of(layout, name)
    assert first.losses == pytest.approx(want.losses[: case.steps], rel=1e-5)
    # Of 2^18 elements in one tensor a float32 norm on one process is itself no more exact.
    assert first.norms == pytest.approx(want.norms[: case.steps], rel=2e-5 if case.model == "wide" else 1e-5)
    # Every rank has to decide alike on what it sees.
    assert all((rank.losses, rank.norms) == (first.losses, first.norms) for rank in others)


@pytest.mark.parametrize("layout, name", WHOLE, ids=[f"{layout}-{name}" for layout, name in WHOLE])
def test_every_gradient_of_the_first_step_is_the_single_process_one(layout: str, name: str) -> None:
    case = CASES[layout][name]
    want, got = expected(case.model, case.sgd).gradients, ranks_of(layout, name)[0].gradients
    assert got.keys() == want.keys()
    off = {name: float((got[name] - want[name]).norm() / want[name].norm()) for name in want}
    assert all(distance < 1e-5 for distance in off.values()), max(off.items(), key=lambda entry: entry[1])


@pytest.mark.parametrize("layout, name", WHOLE, ids=[f"{layout}-{name}" for layout, name in WHOLE])
def test_training_starts_from_the_same_weights(layout: str, name: str) -> None:
    """Bit by bit: they depend on the seed and the parameter's name only."""
    want, got = initial_weights(CASES[layout][name].model), ranks_of(layout, name)[0].weights
    assert got.keys() == want.keys()
    assert [key for key in want if not torch.equal(got[key], want[key])] == []


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("sgd", [False, True])
def test_what_is_compared_tells_runs_apart(model: str, sgd: bool) -> None:
    """Training moves the losses by far more than the tolerance, and clipping scales every step."""
    run, untrained = expected(model, sgd), {**SGD, "lr": 0.0}
    still = run_ranks(1, single_process, model, untrained, initial_weights(model))[0]
    assert min(run.norms) > 1.2 * MAX_NORM
    moved = [abs(a - b) / b for a, b in zip(run.losses[1:], still.losses[1:], strict=True)]
    assert min(moved) > 1e-3
