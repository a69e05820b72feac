"""How far a run of a kind of model on some layout is from plain torch in one process.

Shapes: B rows of the global batch, S tokens, H width.
"""

from __future__ import annotations

import contextlib
import copy
from typing import Any, Callable, Mapping, TypeVar

import numpy
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_dist_conf.gradients import accumulate, clip_grad_norm_
from nemo_dist_conf.instantiate import instantiate
from tests.dist.layouts import composed, full_state
from tests.dist.pool import run_ranks

__all__ = ["KINDS", "ROWS", "TOWERS", "Made", "difference", "ids", "kind", "of_towers"]

ROWS, STEPS = 4, 3

#: (model, arguments of its forward); every tensor among them has B rows.
Made = tuple[nn.Module, dict[str, Any]]
KINDS: dict[str, Callable[[], Made]] = {}
#: Of kinds with several towers, the name of one that is frozen in practice.
TOWERS: dict[str, str] = {}
Make = TypeVar("Make", bound=Callable[..., Made])


def kind(make: Make) -> Make:
    KINDS[make.__name__] = make
    return make


def of_towers(frozen: str) -> Callable[[Make], Make]:
    """``kind`` of a model with several towers. frozen: the name of one of them."""

    def add(make: Make) -> Make:
        TOWERS[make.__name__] = frozen
        return kind(make)

    return add


def ids(highest: int = 80, tokens: int = 16) -> Tensor:
    return torch.randint(3, highest, (ROWS, tokens))


def difference(
    world_size: int,
    name: str,
    *words: str,
    microbatches: int = 1,
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    state: Callable[[nn.Module], dict[str, Tensor]] = full_state,
    frozen: str | None = None,
) -> float:
    """The worst relative difference of losses, gradient norms and final weights from plain torch, on so many ranks.

    name: of KINDS. around: what has to hold on a rank while it runs. state: the whole weights of what was wrapped.
    frozen: name of a module that is not trained.
    """
    return max(run_ranks(world_size, _difference, name, words, microbatches, around, state, frozen))


def _difference(
    name: str,
    words: tuple[str, ...],
    microbatches: int,
    around: Callable[[], contextlib.AbstractContextManager[Any]],
    state: Callable[[nn.Module], dict[str, Tensor]],
    frozen: str | None,
) -> float:
    with around():
        return _on_rank(name, words, microbatches, state, frozen)


def _on_rank(
    name: str,
    words: tuple[str, ...],
    microbatches: int,
    state: Callable[[nn.Module], dict[str, Tensor]],
    frozen: str | None,
) -> float:
    torch.manual_seed(0)
    given, batch = KINDS[name]()
    given.train()
    if frozen is not None:
        given.get_submodule(frozen).requires_grad_(False)
    plain = copy.deepcopy(given)
    words = (*words, *(["strategy.mp_policy=null"] if not any(w.startswith("strategy=") for w in words) else []))
    setup, model, update = instantiate(composed(*words), given, lambda p: torch.optim.SGD(p, 0.05, momentum=0.9))
    context = setup.mesh_context
    reference = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9)
    parts = [_rows(batch, index, context.data_size) for index in range(context.data_size)]
    mine = [_rows(parts[context.data_rank], index, microbatches) for index in range(microbatches)]
    worst = 0.0
    for step in range(STEPS):
        expected = 0.0
        for part in parts:
            for index in range(microbatches):
                seed(100 * step + index)
                loss = _loss(plain, _rows(part, index, microbatches)) / microbatches / len(parts)
                loss.backward()
                expected += float(loss)
        total = torch.zeros(())
        for index, rows in enumerate(mine):
            seed(100 * step + index + 7777 * dist.get_rank())  # what ranks draw is their own
            with accumulate(model, last=index == microbatches - 1):
                loss = _loss(model, rows) / microbatches
                loss.backward()
            total += loss.detach().float()
        found = float(context.sum_over_data(total)) / context.data_size
        norms = float(clip_grad_norm_(model, None)), _norm(plain)
        worst = max(worst, _relative(found, expected), _relative(*norms))
        for optimizer in (update, reference):
            optimizer.step()
            optimizer.zero_grad()
    theirs = plain.state_dict()
    for key, value in state(model).items():
        worst = max(worst, _apart(value, theirs[key]))
    return worst


def seed(number: int) -> None:
    torch.manual_seed(number)
    numpy.random.seed(number)


def _loss(model: nn.Module, rows: dict[str, Any]) -> Tensor:
    output = model(**rows)
    if isinstance(output, Tensor):
        return output.float().square().mean()
    return output["loss"] if isinstance(output, Mapping) and "loss" in output else output[0].float().square().mean()


def _rows(batch: dict[str, Any], index: int, count: int) -> dict[str, Any]:
    return {key: v.chunk(count)[index] if torch.is_tensor(v) else v for key, v in batch.items()}


def _norm(model: nn.Module) -> float:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    dense = [_real(g.to_dense() if g.is_sparse else g) for g in gradients]
    return float(torch.stack([g.double().norm() for g in dense]).norm())


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), 1e-8)


def _apart(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    found, expected = _real(found), _real(expected)
    scale = max(float(expected.double().abs().max()), 1e-3) if expected.numel() else 1.0
    return float((found.double() - expected.double()).abs().max()) / scale if expected.numel() else 0.0
