"""Fields of DDPConfig that are DDP's own."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_dist_conf.config import DDPConfig
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.instantiate import instantiate
from tests.dist.fields import net, shows
from tests.dist.layouts import Operators, batch, composed, loss_sum
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist


class Counting(nn.Module):
    """Has a buffer that each rank sets on its own, and says what it held in forward."""

    mine: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("mine", torch.full((), float(dist.get_rank() + 1)))

    def forward(self, x_BH: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(x_BH), self.mine.clone()


def buffer_in_forward(*words: str) -> tuple[float, float]:
    model = instantiate(composed("strategy=ddp", *words), Counting())[1]
    first = float(model(torch.ones(2, 4))[1])
    model.module.mine.fill_(10.0 * (dist.get_rank() + 1))
    return first, float(model(torch.ones(2, 4))[1])


@shows("broadcast_buffers", DDPConfig)
def test_broadcasting_gives_every_forward_rank_0s_buffers() -> None:
    """Without it, wrapping makes them equal once and each rank keeps its own afterwards."""
    assert run_ranks(2, buffer_in_forward) == [(1.0, 10.0), (1.0, 20.0)]
    assert run_ranks(2, buffer_in_forward, "strategy.broadcast_buffers=true") == [(1.0, 10.0), (1.0, 10.0)]


class Branching(nn.Module):
    """Uses one of its branches, by number, so that the other gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x_BH: Tensor, branch: int) -> Tensor:
        return self.branches[branch](x_BH)


def branch_steps(branches: tuple[int, ...], *words: str) -> list[list[bool]] | str:
    """For each step, which branches have a gradient after it; what is said where one is refused."""
    model = instantiate(composed("strategy=ddp", *words), Branching)[1]
    found = []
    try:
        for branch in branches:
            model.zero_grad()
            model(torch.ones(2, 4), branch).sum().backward()
            weights = [layer.weight.grad for layer in model.module.branches]
            found.append([gradient is not None and bool(gradient.any()) for gradient in weights])
    except ConfigError as error:
        return str(error)
    return found


@shows("find_unused_parameters", DDPConfig)
def test_a_model_with_unused_parameters_trains_only_where_they_are_looked_for() -> None:
    found = run_ranks(2, branch_steps, (0, 1, 0), "strategy.find_unused_parameters=true")
    assert found == [[[True, False], [False, True], [True, False]]] * 2
    for text in run_ranks(2, branch_steps, (0, 1, 0)):
        assert isinstance(text, str) and "strategy.find_unused_parameters=true" in text


@shows("static_graph", DDPConfig)
def test_a_static_graph_learns_in_the_first_step_which_parameters_are_used() -> None:
    """Without the promise the same unused parameters stop the second step."""
    found = run_ranks(2, branch_steps, (0, 0, 0), "strategy.static_graph=true")
    assert found == [[[True, False]] * 3] * 2
    assert all(isinstance(text, str) for text in run_ranks(2, branch_steps, (0, 0, 0)))


def buckets(*words: str) -> tuple[int, set[bool]]:
    """(reductions in the second step, whether gradients share the buckets' memory)."""
    model = net("strategy=ddp", *words)
    for _ in range(2):  # torch rebuilds its buckets after the first backward
        model.zero_grad()
        with Operators() as operators:
            loss_sum(model, *batch()).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    memory = [gradient.untyped_storage().data_ptr() for gradient in gradients]
    return operators.count("allreduce"), {memory.count(pointer) > 1 for pointer in memory}


@shows("bucket_cap_mb", DDPConfig)
def test_the_size_of_buckets_sets_how_many_reductions_there_are() -> None:
    """Net has 74 KiB of gradients."""
    one, several = run_ranks(2, buckets), run_ranks(2, buckets, "strategy.bucket_cap_mb=0.01")
    assert [count for count, _ in one] == [1, 1]
    assert all(5 <= count <= 12 for count, _ in several)


@shows("gradient_as_bucket_view", DDPConfig)
def test_gradients_live_in_the_buckets_if_asked_to() -> None:
    assert run_ranks(2, buckets) == [(1, {False})] * 2
    assert run_ranks(2, buckets, "strategy.gradient_as_bucket_view=true") == [(1, {True})] * 2
