"""Averaged weights under every layout: those of torch's AveragedModel in one process."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import nemo_dist_conf
from nemo_dist_conf.errors import ConfigError, DataError
from nemo_dist_conf.instantiate import instantiate
from tests.dist.cuda_shim import cuda_shim
from tests.dist.kinds import Scale, Stack
from tests.dist.layouts import MODELS, composed, full_tensor
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist

FP32 = "strategy.mp_policy=null"


def model_of_one(scalar: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return Stack(Scale() if scalar else None, None)


def run(words: tuple[str, ...], decay: float | None, gathers: bool = True) -> dict[str, Tensor]:
    """Output of the model with its averages after three steps; gathers: also the averages in full."""
    setup, model, optimizer = instantiate(composed(*words), model_of_one(gathers), lambda p: torch.optim.SGD(p, 0.5))
    ema = nemo_dist_conf.EMA(model, decay)
    for _ in range(3):
        model(torch.ones(2, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update()
    before = model(torch.ones(2, 8)).detach()  # leaves the root's parameters whole under fsdp2
    with ema.applied(), torch.no_grad():
        averaged = model(torch.ones(2, 8))
    assert torch.equal(model(torch.ones(2, 8)), before)
    state = ema.state_dict()
    if not gathers:
        ema.load_state_dict(state)
        return {"output": averaged}
    other = nemo_dist_conf.EMA(model, decay)
    other.load_state_dict(copy.deepcopy({**state, "averages": whole(state)}))
    averages = other.state_dict()["averages"].values()
    assert all(torch.equal(full_tensor(a), b) for a, b in zip(averages, whole(state).values()))
    ema.load_state_dict(state)
    return {**whole(state), "output": averaged, "updates": torch.tensor(ema.updates)}


def under_megatron() -> dict[str, Tensor]:
    with cuda_shim():
        return run(("strategy=megatron_fsdp", "strategy.zero_dp_strategy=2"), 0.6, gathers=False)


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    return {name: full_tensor(value) for name, value in state["averages"].items()}


def by_torch(decay: float | None, scalar: bool = True) -> dict[str, Tensor]:
    model = model_of_one(scalar)
    ema = AveragedModel(model, multi_avg_fn=None if decay is None else get_ema_multi_avg_fn(decay))
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    if decay is not None:
        ema.update_parameters(model)  # torch's first update copies, ours has the weights from the start
    for _ in range(3):
        model(torch.ones(2, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(model)
    return {**dict(ema.module.named_parameters()), "output": ema(torch.ones(2, 8))}


def test_under_megatron_fsdp_too() -> None:
    expected = by_torch(0.6, scalar=False)
    for found in run_ranks(2, under_megatron):
        torch.testing.assert_close(found["output"], expected["output"].detach())


@pytest.mark.parametrize("decay", [0.6, None])
@pytest.mark.parametrize("words", [("strategy=ddp",), (FP32,)], ids=["ddp", "fsdp2"])
def test_averages_are_those_of_torch(words: tuple[str, ...], decay: float | None) -> None:
    expected = by_torch(decay)
    for found in run_ranks(2, run, words, decay):
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value.detach(), msg=name)
        assert found["updates"] == 3


def under_a_pipeline() -> tuple[list[str], bool]:
    """Names of this rank's averages; whether it computes with them."""
    words = (FP32, "parallelism.pp_size=2", "pipeline.pp_batch_size=4")
    _, model, optimizer = instantiate(composed(*words, model=MODELS["llama"], optimizer={"name": "sgd", "lr": 1.0}))
    ema = nemo_dist_conf.EMA(model, 0.5)
    ids = torch.randint(97, (4, 8), generator=torch.Generator().manual_seed(0))
    first = model.step(ids, ids)
    optimizer.step()
    with ema.applied():
        again = model.step(ids, ids)
    is_same = bool(torch.isclose(first, again)) and not torch.isclose(first, model.step(ids, ids))
    return list(ema.state_dict()["averages"]), is_same


def test_each_stage_has_its_own() -> None:
    (first, one), (last, other) = run_ranks(2, under_a_pipeline)
    assert "model.embed_tokens.weight" in first and "lm_head.weight" in last and set(first).isdisjoint(last)
    assert one and other


def test_what_is_no_decay_and_what_are_other_averages() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="decay=1.5"):
        nemo_dist_conf.EMA(model, 1.5)
    with pytest.raises(DataError, match="bias is missing"):
        nemo_dist_conf.EMA(model).load_state_dict({"updates": 1, "averages": {"weight": torch.zeros(2, 2)}})
