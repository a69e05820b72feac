"""One side in its own environment: imports its framework once, then forks the ranks of each job.

    python rank.py SIDE ADDRESS

Talks to the program that compares: this process takes jobs, each rank it forks takes turns (wrap, steps, peak), so
that sides of different environments can alternate on one machine.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import resource
import sys
import time
import traceback
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent / "sides")]

import work  # noqa: E402  (the line above is what finds it)

__all__ = ["main"]


def main() -> None:
    side, address = sys.argv[1:]
    connection = Client(address)
    start = time.perf_counter()
    module = importlib.import_module(side)
    wall = time.perf_counter() - start
    usage = resource.getrusage(resource.RUSAGE_SELF)  # of the whole process: the interpreter's start is in it
    connection.send({"import_wall_s": wall, "import_cpu_s": usage.ru_utime + usage.ru_stime})
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        if job is None:
            return
        children = []
        for rank in range(job["job"]["world"]):
            child = os.fork()
            if child == 0:
                _as_rank(module, rank, **job)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)


def _as_rank(module: Any, rank: int, job: dict[str, Any], folder: str) -> None:
    connection = Client(f"{folder}/rank{rank}")
    try:
        connection.send(None)
        _serve(connection, module, work.Job(**job), rank, folder)
    except EOFError:
        pass  # the program that compares has gone
    except BaseException:
        with contextlib.suppress(OSError):
            connection.send({"error": traceback.format_exc()})
    # Not through the interpreter's end: a process group that ends there can abort the process (torch 2.13, gloo).
    os._exit(0)


def _serve(connection: Connection, module: Any, job: work.Job, rank: int, folder: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # What torchrun sets: Accelerate and Fabric look for it.
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job.world, "LOCAL_WORLD_SIZE": job.world}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", GROUP_RANK="0", TORCHELASTIC_RUN_ID="peers")
    backend = "nccl" if job.device == "cuda" else "gloo"
    if job.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, store=dist.FileStore(f"{folder}/store", job.world), rank=rank, world_size=job.world
    )
    make = module.prepare(job)
    model: Any = None
    step: Any = None
    stream = work.batches(job, rank // job.tp)
    while (word := connection.recv())[0] != "end":
        if word[0] == "wrap":
            model = step = None
            gc.collect()
            gc.enable()
            dist.barrier(device_ids=[rank] if job.device == "cuda" else None)
            start = time.perf_counter()
            model, step = make()
            connection.send((work.synchronize(job.device) - start, work.held(model)))
            work.fill(model)
            gc.collect()
            gc.disable()
        elif word[0] == "steps":
            connection.send(_turn(step, stream, word[1], job.device))
        elif word[0] == "peak":
            connection.send(work.peak_mb(job.device))


def _turn(step: Any, stream: Any, count: int, device: str) -> list[tuple[float, float, float]]:
    """Steps while the other sides wait. On a GPU all sides' memory is there at once: what is free goes back after a
    turn, and a step that takes it again comes before the timed ones.
    """
    if device == "cpu":
        return [_timed(step, next(stream), device) for _ in range(count)]
    import torch

    step(next(stream))
    timed = [_timed(step, next(stream), device) for _ in range(count)]
    torch.cuda.empty_cache()
    return timed


def _timed(step: Any, batch: Any, device: str) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, loss) of a step."""
    wall, cpu = work.synchronize(device), time.process_time()
    loss = step(batch)
    return work.synchronize(device) - wall, time.process_time() - cpu, loss


if __name__ == "__main__":
    main()
