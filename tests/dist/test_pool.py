"""The pool itself: ranks are real, reused, and never hang a test."""

from __future__ import annotations

import ctypes
import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.dist.pool import RankTraceback, run_ranks

pytestmark = pytest.mark.dist


def total(offset: int) -> tuple[int, int, float]:
    value = torch.tensor(float(dist.get_rank() + offset))
    dist.all_reduce(value)
    return dist.get_rank(), os.getpid(), float(value)


def leave_groups(shape: tuple[int, ...]) -> tuple[torch.Tensor, list[str]]:
    """A sharded tensor doubled on a mesh, and the names of that mesh's groups and of an equal mesh's."""
    names: list[str] = []
    for _ in range(2):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("a", "b")[: len(shape)])
        sharded = distribute_tensor(torch.arange(8.0), mesh, [Shard(0)] * len(shape))
        assert isinstance(sharded, DTensor)
        product: Any = nn.functional.relu(sharded * 2)
        doubled = product.full_tensor()
        names += [group.group_name for group in mesh.get_all_groups()]
    return doubled, names


def fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise KeyError(f"rank {rank} says no")
    dist.barrier()


def die(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(7)
    dist.barrier()


def hang() -> None:
    time.sleep(100)


def environment() -> tuple[str, str, float]:
    seen = os.environ["RANK"], os.environ["WORLD_SIZE"], float(torch.rand(()))
    os.environ["RANK"] = "gone"
    return seen


def test_ranks_are_processes_that_stay() -> None:
    first, second = run_ranks(2, total, 1), run_ranks(2, total, offset=2)
    assert [rank for rank, _, _ in first] == [0, 1]
    assert [value for _, _, value in first + second] == [3.0, 3.0, 5.0, 5.0]
    pids = [pid for _, pid, _ in first]
    assert pids == [pid for _, pid, _ in second] and os.getpid() not in pids and len(set(pids)) == 2


def test_every_call_starts_alike() -> None:
    first, second = run_ranks(2, environment), run_ranks(2, environment)
    assert first == second
    assert [place[:2] for place in first] == [("0", "2"), ("1", "2")]


def test_a_call_finds_the_groups_of_the_one_before_and_makes_as_many() -> None:
    calls = []
    for shape in ((2, 2), (2, 2), (4,), (2, 2)):
        found = run_ranks(4, leave_groups, shape)
        assert all(torch.equal(doubled, torch.arange(8.0) * 2) for doubled, _ in found)
        calls.append([names for _, names in found])
    assert calls[0] == calls[1] == calls[3] != calls[2]
    assert all(len(set(names)) == 4 for names in calls[0])


def test_a_failure_is_raised_with_its_rank_and_the_others_do_not_wait() -> None:
    start = time.monotonic()
    with pytest.raises(KeyError, match="rank 1 says no") as caught:
        run_ranks(2, fail_on, 1)
    assert isinstance(caught.value.__cause__, RankTraceback)
    assert "rank 1:" in str(caught.value.__cause__) and "in fail_on" in str(caught.value.__cause__)
    assert time.monotonic() - start < 30
    assert [value for _, _, value in run_ranks(2, total, 1)] == [3.0, 3.0]


def crash(rank: int) -> None:
    if dist.get_rank() == rank:
        ctypes.string_at(0)


def test_a_rank_that_a_signal_ended_shows_where_it_was() -> None:
    with pytest.raises(RuntimeError, match="rank 1 died, exit code -11") as caught:
        run_ranks(2, crash, 1)
    assert "Segmentation fault" in str(caught.value.__cause__) and "in crash" in str(caught.value.__cause__)


def test_a_rank_that_dies_or_hangs_is_replaced() -> None:
    with pytest.raises(RuntimeError, match="rank 0 died, exit code 7"):
        run_ranks(2, die, 0)
    with pytest.raises(TimeoutError, match="in hang"):
        run_ranks(2, hang, timeout_s=2)
    assert [value for _, _, value in run_ranks(2, total, 1)] == [3.0, 3.0]
