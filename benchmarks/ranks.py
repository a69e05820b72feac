"""Gloo ranks of this machine for benchmarks, what a piece of work takes on the slowest of them, and peak memory."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Iterator

__all__ = ["SIDES", "joined", "largest", "on_ranks", "pair_ratio", "peak_mb", "timed"]

SIDES = ("hand", "ours")
_GROUPS: list[Any] = []
_PRELOAD = [
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "transformers.models.llama.modeling_llama",
]


@contextlib.contextmanager
def joined(rank: int, folder: str, world_size: int) -> Iterator[None]:
    """This process as a rank of a gloo group that meets in a file, so no port is taken."""
    import torch
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    # Held to the end: a DDP model that is freed after its group would end the group itself, under the GIL, and can
    # deadlock with gloo's thread (torch 2.13).
    _GROUPS.append(dist.group.WORLD)
    try:
        yield
    finally:
        dist.destroy_process_group()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the slowest rank; the ranks start together."""
    import torch.distributed as dist

    dist.barrier()
    start = time.perf_counter()
    result = work()
    return largest(time.perf_counter() - start), result


def largest(value: float) -> float:
    """The largest of all ranks' values."""
    import torch
    import torch.distributed as dist

    everywhere = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(everywhere, dist.ReduceOp.MAX)
    return float(everywhere)


def peak_mb() -> float:
    """VmHWM, not getrusage: its maximum survives exec, so it could be the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def on_ranks(world_size: int, work: Callable[..., None], *args: Any) -> Any:
    """What rank 0 wrote into found.json. work: called with the rank, a folder for all ranks, and ``args``.

    Each rank is a new process, a fork of one that has imported torch and transformers' Llama: no side's cost.
    """
    import torch.multiprocessing as mp

    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOAD)
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(_one_rank, (folder, work, *args), nprocs=world_size, start_method="forkserver")
        return json.loads(Path(folder, "found.json").read_text())


def _one_rank(rank: int, folder: str, work: Callable[..., None], *args: Any) -> None:
    work(rank, folder, *args)
    # Not through the interpreter's end: a gloo group that ends there can abort the process (torch 2.13, with DDP).
    sys.stdout.flush()
    os._exit(0)


def pair_ratio(times: dict[str, list[float]]) -> float:
    """Median of the ratios of neighbours: both met the same load of the machine."""
    return statistics.median(ours / hand for ours, hand in zip(times["ours"], times["hand"], strict=True))
