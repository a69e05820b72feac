"""Real gloo ranks for tests: processes that start once per world size and serve every test of the session.

    losses = run_ranks(2, train_five_steps, config)   # one result per rank, in rank order

The first call for a world size costs a few seconds (torch and transformers are imported once, in the fork server),
later calls cost milliseconds. Nothing listens on a port: ranks meet in a file.
"""

from __future__ import annotations

import atexit
import contextlib
import faulthandler
import gc
import importlib
import inspect
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Callable

__all__ = ["PRELOAD", "RankTraceback", "close_pools", "run_ranks"]

#: Imported once in the fork server, inherited by every rank.
PRELOAD = [
    "torch",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral",
    "transformers.models.qwen3.modeling_qwen3",
    "hydra.main",
    "hydra.core.plugins",
    "hydra._internal.hydra",
    "nemo_dist_conf.recipe.checks",
    "nemo_dist_conf.train.loop",
    "tests.dist.ready",
    "nemo_dist_conf.launch.frozen",  # the last, see there
]
_START_TIMEOUT_S = 120.0
#: How long the other ranks may go on after one failed; a rank in a collective would wait for ever.
_GRACE_S = 1.0


class RankTraceback(Exception):
    """Where ranks failed; the cause of the exception that a test sees."""


def run_ranks(
    world_size: int, fn: Callable[..., Any], *args: Any, timeout_s: float = 120.0, **kwargs: Any
) -> list[Any]:
    """What fn(*args, **kwargs) returned on each of world_size ranks, in rank order.

    fn: a function at the top of an importable module. On a rank torch.distributed is initialised with gloo on the
    CPU, torch has one thread and seed 0, and RANK, WORLD_SIZE and their like are set as torchrun sets them.
    Arguments and results are pickled. Process groups that fn leaves behind are used again by the next call.
    Raises the first exception of any rank, caused by a RankTraceback with the traceback of each rank that failed;
    TimeoutError with every stack after timeout_s. Either way these ranks are replaced before the next call.
    """
    pool = _POOLS.get(world_size)
    if pool is None:
        pool = _POOLS[world_size] = _Pool(world_size)
    try:
        return pool.call(pickle.dumps((fn, args, kwargs)), timeout_s)
    except BaseException:
        _POOLS.pop(world_size, None)
        pool.close()
        raise


def close_pools() -> None:
    """End every rank now; a later run_ranks starts fresh ones."""
    while _POOLS:
        _POOLS.popitem()[1].close()


_POOLS: dict[int, _Pool] = {}
atexit.register(close_pools)


class _Pool:
    """The test's side: one connection and one process per rank."""

    def __init__(self, world_size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.folder = Path(tempfile.mkdtemp(prefix="ranks-"))
        self.connections: list[Connection] = []
        self.processes: list[Any] = []
        try:
            for rank in range(world_size):
                ours, theirs = context.Pipe()
                # daemon: ends with this process even where atexit does not run.
                process = context.Process(
                    target=_serve, args=(rank, world_size, self.folder, theirs), name=f"rank{rank}", daemon=True
                )
                process.start()
                theirs.close()
                self.connections.append(ours)
                self.processes.append(process)
            self._gather(_START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def call(self, task: bytes, timeout_s: float) -> list[Any]:
        message = pickle.dumps((list(sys.path), task))
        for connection in self.connections:
            with contextlib.suppress(OSError):  # a rank that died is reported by _gather
                connection.send_bytes(message)
        return self._gather(timeout_s)

    def _gather(self, timeout_s: float) -> list[Any]:
        """One result per rank; raises as run_ranks says."""
        results: dict[int, Any] = {}
        failures: dict[int, tuple[BaseException, str]] = {}
        ranks = {connection: rank for rank, connection in enumerate(self.connections)}
        deadline = time.monotonic() + timeout_s
        while ranks:
            ready = wait(list(ranks), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                assert isinstance(connection, Connection)
                rank = ranks.pop(connection)
                try:
                    ok, value = pickle.loads(connection.recv_bytes())
                except (EOFError, OSError):
                    self.processes[rank].join(5)
                    died = RuntimeError(f"rank {rank} died, exit code {self.processes[rank].exitcode}")
                    ok, value = False, (died, f"{died}\n{self._written([rank])}")
                if ok:
                    results[rank] = value
                else:
                    failures[rank] = value
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        if failures:
            error, _ = next(iter(failures.values()))
            texts = [f"rank {rank}:\n{text}" for rank, (_, text) in sorted(failures.items())]
            raise error from RankTraceback("\n" + "\n".join(texts))
        if ranks:
            stuck = sorted(ranks.values())
            raise TimeoutError(f"ranks {stuck} not done after {timeout_s:g} s\n{self._stacks(stuck)}")
        return [results[rank] for rank in sorted(results)]

    def _stacks(self, ranks: list[int]) -> str:
        for rank in ranks:
            with contextlib.suppress(OSError):
                os.kill(self.processes[rank].pid, signal.SIGUSR1)
        time.sleep(0.5)
        return self._written(ranks)

    def _written(self, ranks: list[int]) -> str:
        """Stacks that ranks wrote when they were asked, or when a signal like SIGSEGV ended them."""
        files = [(rank, self.folder / f"stack{rank}") for rank in ranks]
        return "\n".join(f"rank {rank}:\n{file.read_text()}" for rank, file in files if file.exists())

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.kill()  # nothing of a rank outlives a test, and a polite end could wait for a collective
        for process in self.processes:
            process.join(10)
        shutil.rmtree(self.folder, ignore_errors=True)


def _serve(rank: int, world_size: int, folder: Path, connection: Connection) -> None:
    """A rank's side: answer calls until the test's side closes the connection."""
    stacks = (folder / f"stack{rank}").open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    faulthandler.enable(file=stacks, all_threads=True)
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have children
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the test's side, which ends the ranks
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    environ = {**os.environ, **{name: str(value) for name, value in place.items()}}
    try:
        _join(rank, world_size, folder)
        _answer(connection, True, None)
    except BaseException as error:
        _answer(connection, False, error)
        return
    while True:
        try:
            path, task = pickle.loads(connection.recv_bytes())
        except (EOFError, OSError):
            break
        sys.path.extend(entry for entry in path if entry not in sys.path)
        importlib.invalidate_caches()
        try:
            _reset(environ)
            fn, args, kwargs = pickle.loads(task)
            value = fn(*args, **kwargs)
            del fn, args, kwargs
            _leave_groups()
            answer = (True, value)
        except BaseException as error:  # SystemExit too: the test wants to see it
            answer = (False, error)
        _answer(connection, *answer)
        del answer
    os._exit(0)  # no teardown: the other ranks end as well


def _join(rank: int, world_size: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    from nemo_dist_conf.runtime.engines import fsdp2

    fsdp2._SMALL_ELEMENTS = 0  # the tests' models are small, and are to be built as large ones are
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(minutes=10))
    dist.barrier()
    _keep_groups()


def _reset(environ: dict[str, str]) -> None:
    """The same start for every call: environment, seeds, and what a test may have switched globally."""
    import torch

    os.environ.clear()
    os.environ.update(environ)
    random.seed(0)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)


#: By the world that they are of, how they were asked for, and how often that was in one call.
_GROUPS: dict[tuple[Any, tuple[str, ...], int], Any] = {}
_ASKED: Counter[tuple[str, ...]] = Counter()


def _keep_groups() -> None:
    """Each call gets the groups of the calls before it where it makes the same ones in the same order.

    Making them takes a while, and what DTensor has learnt on a mesh, which is half of a short call, it knows again on
    an equal mesh only while that one's groups exist. Within a call every group is one of its own, as without this.
    """
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    make = c10d._new_group_with_tag
    signature = inspect.signature(make)

    def new_group(*args: Any, **options: Any) -> Any:
        asked = signature.bind(*args, **options)
        asked.apply_defaults()
        words = tuple(repr(value) for value in asked.arguments.values())
        number = _ASKED[words] = _ASKED[words] + 1
        key = (dist.group.WORLD, words, number)
        if key not in _GROUPS:
            _GROUPS[key] = make(*args, **options)
        return _GROUPS[key]

    c10d._new_group_with_tag = new_group


def _leave_groups() -> None:
    """Let go of what the function left behind, but for the groups, which the next call finds."""
    import torch.distributed as dist

    if not dist.is_initialized():
        raise AssertionError("the function destroyed the world's process group: run it in processes of its own")
    _ASKED.clear()
    gc.collect()


def _answer(connection: Connection, ok: bool, value: Any) -> None:
    """Send a result, or an exception with its traceback; what cannot be pickled becomes a RuntimeError."""
    if not ok:
        text = "".join(traceback.format_exception(type(value), value, value.__traceback__))
        with contextlib.suppress(Exception):
            message = pickle.dumps((False, (value, text)))
            pickle.loads(message)  # some exceptions pickle but do not unpickle
            connection.send_bytes(message)
            return
        value = (RuntimeError(f"{type(value).__name__}: {value}"), text)
    try:
        message = pickle.dumps((ok, value))
    except Exception as error:
        return _answer(connection, False, error)
    connection.send_bytes(message)
