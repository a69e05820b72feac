"""The ranks of one job, started and watched by torch elastic."""

from __future__ import annotations

import dataclasses
import logging
import os
import pickle
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Callable, Iterator

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.elastic.rendezvous.api import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, launch_agent

from nemo_dist_conf.errors import ConfigError, DataError, TrainingError
from nemo_dist_conf.launch.failure import Failure, Interrupted
from nemo_dist_conf.launch.rank_process import RankExit, run_rank
from nemo_dist_conf.launch.settings import Settings

__all__ = ["run_ranks"]

log = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


#: Errors whose text says all that a user needs.
_TOLD_IN_FULL = {kind.__name__ for kind in (ConfigError, DataError, TrainingError, RankExit)}


_HEAD = "Traceback (most recent call last):"


class _Timeout(SignalException):
    """The job took longer than it may; elastic stops the ranks as for a signal."""


def run_ranks(
    settings: Settings, endpoint: str, run_id: str, log_dir: str, blob: bytes, task: Callable[..., Any] | None
) -> tuple[bool, Any]:
    """(whether rank 0 ran on this node, its value). Returns when all ranks of this node have ended.

    endpoint: where the nodes meet. run_id: the same on all nodes, another one for each job.
    task: passed as it is to forked ranks.
    Raises Failure where a rank failed or the job took too long, Interrupted after SIGINT, SIGTERM and the like.
    """
    options = settings.options
    try:
        with _signals_as_before(), _elastic_is_quiet(), _alarm(options.job_timeout_s):
            values = launch_agent(_launch_config(settings, endpoint, run_id, log_dir), run_rank, [blob, task])
    except _Timeout:
        raise Failure(f"took longer than {options.job_timeout_s:g} s (hydra.launcher.job_timeout_s)") from None
    except SignalException as stopped:
        raise Interrupted(int(stopped.sigval)) from None
    except RendezvousError as error:
        raise Failure(f"the nodes of the job did not meet: {error}", when=time.time()) from None
    except ChildFailedError as failed:
        raise _failure(*_earliest(*failed.get_first_failure())) from None
    packed = values.get(0)
    return 0 in values, None if packed is None else pickle.loads(packed)


def _launch_config(settings: Settings, endpoint: str, run_id: str, log_dir: str) -> LaunchConfig:
    options = settings.options
    alone = options.nnodes == 1 and not endpoint
    tee: Any = Std.NONE if options.tee is None else Std.from_str(options.tee)
    rest: dict[str, Any] = {"shutdown_timeout": options.shutdown_timeout_s}
    known = {item.name for item in dataclasses.fields(LaunchConfig)}
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(options.shutdown_timeout_s)  # before torch had the argument
    rendezvous: dict[str, Any] = {"timeout": options.rdzv_timeout_s}
    if options.rdzv_backend == "static":
        rendezvous["rank"] = options.node_rank
    return LaunchConfig(
        min_nodes=options.nnodes,
        max_nodes=options.nnodes,
        nproc_per_node=settings.ranks,
        run_id=run_id,
        rdzv_backend=options.rdzv_backend,
        # Port 0: any free one, so that sweeps on one machine do not meet.
        rdzv_endpoint=endpoint or "localhost:0",
        rdzv_configs=rendezvous,
        max_restarts=options.max_restarts,
        monitor_interval=options.monitor_interval_s,
        start_method=options.start_method.name,
        # Rank 0 keeps the console where it may show a progress bar.
        logs_specs=DefaultLogsSpecs(
            log_dir=log_dir, redirects={rank: Std.ALL for rank in range(settings.ranks) if rank}, tee=tee
        ),
        local_addr=options.local_addr or ("127.0.0.1" if alone else None),
        **{name: value for name, value in rest.items() if name in known},
    )


def _earliest(rank: int, failure: ProcessFailure) -> tuple[int, ProcessFailure]:
    """The rank of this node that raised first, with what it left.

    Elastic names the lowest rank of those it finds ended, which may have ended of another one's end.
    """
    if failure.exitcode < 0 or not os.path.isfile(failure.error_file):
        return rank, failure
    first = min(Path(failure.error_file).parents[1].glob("*/error.json"), key=lambda path: path.stat().st_mtime_ns)
    local = int(first.parent.name)
    return rank - failure.local_rank + local, dataclasses.replace(failure, local_rank=local, error_file=str(first))


def _when(failure: ProcessFailure) -> float:
    """Time of the failure. 0 where a signal killed the rank that no other rank's end sends: that came first."""
    if failure.exitcode < 0 and -failure.exitcode not in (signal.SIGTERM, signal.SIGABRT):
        return 0.0
    return os.stat(failure.error_file).st_mtime if os.path.isfile(failure.error_file) else float(failure.timestamp)


def _failure(rank: int, failure: ProcessFailure) -> Failure:
    message = failure.message
    trace = message.get("extraInfo", {}).get("py_callstack", "") if isinstance(message, dict) else ""
    if failure.exitcode < 0:
        reason = f"was killed by {signal.Signals(-failure.exitcode).name}"
    elif isinstance(message, dict):
        reason = str(message.get("message", ""))
        if reason.partition(":")[0] in _TOLD_IN_FULL:
            trace = ""
    else:
        reason = f"ended with exit code {failure.exitcode}"
    printed = Path(failure.error_file).with_name("stderr.log") if failure.error_file else None
    printed_to = str(printed) if printed and _holds_text(printed) else ""
    return Failure(reason, rank, _users_part(trace), printed_to, _when(failure))


def _holds_text(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _users_part(trace: str) -> str:
    """A traceback without the frames that stand above the task function; of what it was raised from, everything."""
    lines = trace.rstrip().splitlines()
    ours = [index for index, line in enumerate(lines) if f'"{run_rank.__code__.co_filename}"' in line]
    if not ours:
        return "\n".join(lines)
    head = max(index for index in range(ours[-1]) if lines[index] == _HEAD)
    below = ours[-1] + 1
    while below < len(lines) and not lines[below].startswith("  File "):
        if not lines[below].startswith("    "):
            break
        below += 1
    return "\n".join([*lines[:head], _HEAD, *lines[below:]])


@contextmanager
def _elastic_is_quiet() -> Iterator[None]:
    """What elastic logs about a failed rank, a traceback of its own included, the job's report says already."""
    names = ("torch.distributed.elastic", "torch.multiprocessing.spawn")
    loggers = [logging.getLogger(name) for name in logging.root.manager.loggerDict if name.startswith(names)]
    wanted = logging.getLogger().isEnabledFor(logging.DEBUG)  # hydra.verbose=true
    speaking = [logger for logger in loggers if not logger.disabled and not wanted]
    for logger in speaking:
        logger.disabled = True
    try:
        yield
    finally:
        for logger in speaking:
            logger.disabled = False


@contextmanager
def _signals_as_before() -> Iterator[None]:
    """Elastic replaces signal handlers and leaves its own behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _alarm(seconds: float | None) -> Iterator[None]:
    """After that many seconds, end the job in the way in which elastic ends it for a signal."""
    if seconds is None:
        yield
        return

    def too_long(number: int, frame: Any) -> None:
        raise _Timeout(f"the job took longer than {seconds:g} s", signal.SIGTERM)

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
