"""strategy=ddp on one rank: DDP to the code around it, without what it costs in a step."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from nemo_dist_conf.gradients import accumulate
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.runtime.engines.base import unwrapped
from tests.dist.layouts import ADAMW, MODELS, Operators, batch, composed, loss_sum
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist


def made(*words: str) -> tuple[Any, Any]:
    return instantiate(composed("strategy=ddp", *words, model=MODELS["module"], optimizer=ADAMW))[1:]


def losses(model: Any, optimizer: Any) -> list[float]:
    """Of three steps in two microbatches each."""
    ids_BS, labels_BS = batch()
    found = []
    for _ in range(3):
        for number, part in enumerate(zip(ids_BS.chunk(2), labels_BS.chunk(2))):
            with accumulate(model, last=number == 1):
                loss = loss_sum(model, *part)
                loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def beside_torchs_own() -> tuple[list[float], list[float], int]:
    """(losses of ours, losses under torch's DDP, collectives of a step of ours)."""
    model, optimizer = made()
    with Operators() as operators:
        ours = losses(model, optimizer)
    other, optimizer = made()
    return ours, losses(DistributedDataParallel(other.module), optimizer), operators.count("allreduce")


def test_losses_are_those_of_torchs_wrapper_and_nothing_is_reduced() -> None:
    ((ours, torchs, reductions),) = run_ranks(1, beside_torchs_own)
    assert ours == torchs and reductions == 0


def as_the_code_around_sees_it() -> dict[str, Any]:
    model, _ = made()
    called: list[object] = []
    model.register_comm_hook(None, lambda *args: called.append(args))
    with model.no_sync():
        inside = model.require_backward_grad_sync
        loss_sum(model, *batch()).backward()
    copies = {"deepcopy": copy.deepcopy(model), "pickle": pickle.loads(pickle.dumps(model))}
    ids_BS, _ = batch()
    return {
        "is DDP": isinstance(model, DistributedDataParallel),
        "no_sync": (inside, model.require_backward_grad_sync),
        "hook": called,
        "names": list(model.state_dict()) == [f"module.{name}" for name in model.module.state_dict()],
        "DCP's names": list(get_model_state_dict(model)) == list(model.module.state_dict()),
        "unwrapped": unwrapped(model) is model.module,
        "copies": [name for name, one in copies.items() if torch.equal(one(ids_BS), model(ids_BS))],
        "without a reducer": not hasattr(model, "reducer"),
        "modes": (model.eval().module.training, model.train().module.training),
    }


def test_a_loop_written_for_ddp_runs() -> None:
    assert run_ranks(1, as_the_code_around_sees_it) == [
        {
            "is DDP": True,
            "no_sync": (False, True),
            "hook": [],
            "names": True,
            "DCP's names": True,
            "unwrapped": True,
            "copies": ["deepcopy", "pickle"],
            "without a reducer": True,
            "modes": (False, True),
        }
    ]


def nothing_given() -> float:
    class Constant(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value = torch.nn.Parameter(torch.ones(()))

        def forward(self) -> torch.Tensor:
            return 2 * self.value

    return float(instantiate(composed("strategy=ddp"), Constant())[1]())


def test_forward_may_take_nothing() -> None:
    assert run_ranks(1, nothing_given) == [2.0]
