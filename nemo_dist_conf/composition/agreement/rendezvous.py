"""Where the ranks of one run meet: a key-value store that the launcher serves, or rank 0 where it serves none."""

from __future__ import annotations

import atexit
import os
import re
import shlex
import sys
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Iterator

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.topology.launched_ranks import Launched, launch_command, program

if TYPE_CHECKING:
    from torch.distributed import TCPStore

__all__ = [
    "CannotMeet",
    "NoAddress",
    "all_have_come",
    "export_ranks",
    "is_started_by_agent",
    "master_address",
    "open_store",
    "rank_store",
    "stay_until_read",
    "waiting_for_rank_0",
]

#: Ranks that are started together come within this time, unless some were not started at all.
_AT_ONCE_S = 3.0
#: How long rank 0 of a short program stays for ranks that come later.
_STAY_S = 10.0
#: Stores that this process may serve stay open until it ends: another rank may not have read yet.
_open: list[TCPStore] = []


class CannotMeet(ConfigError):
    """The ranks cannot reach one another, or some of them were not started."""


class NoAddress(CannotMeet):
    """Nothing says where the ranks meet."""


def rank_store(place: Launched) -> TCPStore:
    """A connection to the store of all ranks; rank 0 serves it where torchrun's agent does not.

    A rank may ask several times: the server on a port is shared within a process.
    Raises ConfigError where nobody answers there, or something else holds the port.
    """
    from torch.distributed import DistError, TCPStore

    host, port = master_address(place)
    serves = not is_started_by_agent() and place.rank == 0
    try:
        with waiting_for_rank_0(place):
            store = TCPStore(
                host, port, place.world_size, is_master=serves, wait_for_workers=False, multi_tenant=serves
            )
    except DistError as error:
        reason = str(error).splitlines()[0]
        if serves:
            what = f"rank 0 cannot serve the others at {host}:{port}: {reason}"
            allowed = "an address of this machine and a port that is free; two steps of a job need one each"
            problem = Problem(
                what=what, asked=f"MASTER_PORT={port}", allowed=allowed, instead=f"export MASTER_PORT={port + 1}"
            )
        else:
            problem = _not_there(place, f"rank {place.rank} found nobody at {host}:{port}: {reason}")
        raise CannotMeet(problem) from None
    _open.append(store)
    return store


def open_store() -> TCPStore | None:
    """A store that this rank is connected to already, for what must not wait."""
    return _open[-1] if _open else None


def stay_until_read(place: Launched, store: Any, key: str) -> None:
    """Rank 0, which serves the store, does not end before the others have added to this key, within some seconds.

    Its program may be over before another rank has started, which would then look for a store that is gone.
    """

    def stay() -> None:
        deadline = time.monotonic() + _STAY_S
        try:
            while store.add(key, 0) < place.world_size - 1 and time.monotonic() < deadline:
                time.sleep(0.02)
        except KeyboardInterrupt:
            return

    if place.rank == 0 and not is_started_by_agent():
        atexit.register(stay)


def all_have_come(place: Launched, store: Any, timeout_s: float) -> None:
    """Returns when every rank has called this; rank 0 says which are missing if they do not come at once.

    Raises ConfigError on all that have come, where some have not within that time.
    """
    store.set(f"come/{place.rank}", "")
    if store.add("come", 1) == place.world_size:
        store.set("all have come", "")
    began, pause_s, told = time.monotonic(), 0.001, place.rank != 0
    while not store.check(["all have come"]):  # wait() with a timeout would log two lines for each, and hear no Ctrl-C
        waited_s = time.monotonic() - began
        if waited_s > timeout_s:
            raise CannotMeet(_not_there(place, _waiting(place, store, f"after {timeout_s:g} s")))
        if not told and waited_s > _AT_ONCE_S:
            print(_waiting(place, store, "waiting"), file=sys.stderr, flush=True)
            told = True
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 0.2)


def _waiting(place: Launched, store: Any, state: str) -> str:
    come = [rank for rank in range(place.world_size) if store.check([f"come/{rank}"])]
    missing = [str(rank) for rank in range(place.world_size) if rank not in come]
    more = ", ..." if len(missing) > 8 else ""
    host, port = master_address(place)
    found = f"{len(come)} of {place.world_size} ranks have come to {host}:{port}"
    return f"{state}: {found}; missing: {', '.join(missing[:8])}{more}"


@contextmanager
def waiting_for_rank_0(place: Launched) -> Iterator[None]:
    """Says what this rank waits for, if rank 0 does not do its part at once."""
    if place.rank == 0 or is_started_by_agent():
        yield
        return
    host, port = master_address(place)
    line = f"waiting: rank {place.rank} of {place.world_size} waits for rank 0 at {host}:{port}"
    timer = threading.Timer(_AT_ONCE_S, lambda: print(line, file=sys.stderr, flush=True))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_started_by_agent() -> bool:
    """Whether torchrun's agent started this rank: then it started all, serves the store, and tells who failed."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true"


def _not_there(place: Launched, what: str) -> Problem:
    ranks = place.world_size
    if place.source == "Slurm":
        words = " ".join(["srun", f"--ntasks={ranks}", "python", program(), *map(shlex.quote, sys.argv[1:])])
        asked = f"SLURM_NTASKS={os.environ.get('SLURM_STEP_NUM_TASKS') or os.environ.get('SLURM_NTASKS')}"
        return Problem(what=what, asked=asked, allowed="one process a task, started by srun", instead=words)
    asked = f"WORLD_SIZE={ranks}"
    return Problem(
        what=what, asked=asked, allowed=f"{ranks} ranks, started by one launcher", instead=_by_torchrun(ranks)
    )


def _by_torchrun(ranks: int) -> str:
    return launch_command().format(n=ranks, asked=" ".join(map(shlex.quote, sys.argv[1:]))).strip()


def export_ranks(place: Launched) -> None:
    """Set torchrun's variables where another launcher started the ranks, for code that knows no other.

    torch's own ``init_process_group("nccl")`` is such code. What is set already stays.
    """
    host, port = master_address(place)
    values = {
        "RANK": place.rank,
        "WORLD_SIZE": place.world_size,
        "LOCAL_RANK": place.local_rank,
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
    }
    for name, value in values.items():
        os.environ.setdefault(name, str(value))


def master_address(place: Launched) -> tuple[str, int]:
    """Host and port where the ranks meet. Raises ConfigError where nothing says them."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if place.source == "Slurm":
        host = host or _first_host(os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", ""))
        port = port or _port_of_job(os.environ.get("SLURM_JOB_ID", "0"))
    elif place.source == "submitit":
        host, port = host or "127.0.0.1", port or _port_of_job(os.environ.get("SUBMITIT_LOCAL_JOB_ID", "0"))
    if not host or not port:
        missing = "MASTER_ADDR" if not host else "MASTER_PORT"
        raise NoAddress(
            Problem(
                what=f"{place.world_size} ranks, but {missing} is not set, so they cannot meet",
                asked=f"WORLD_SIZE={place.world_size}",
                allowed="started by torchrun, or with MASTER_ADDR and MASTER_PORT set",
                instead=_by_torchrun(place.world_size),
            )
        )
    if not port.isdigit():
        what = f"the environment variable MASTER_PORT is not a port, so {place.world_size} ranks cannot meet"
        asked, allowed = f"MASTER_PORT={port}", "a free port, such as 29500"
        raise CannotMeet(Problem(what=what, asked=asked, allowed=allowed, instead="export MASTER_PORT=29500"))
    return host, int(port)


def _port_of_job(job: str) -> str:
    """Two jobs on one node differ in their ids, so mostly in their ports."""
    digits = re.sub(r"\D", "", job) or "0"
    return str(15000 + int(digits) % 15000)


def _first_host(nodes: str) -> str:
    """First host of a Slurm node list such as ``rack[1-2]node[003-005,9],other``: of each bracket the first number."""
    first = re.match(r"(?:[^\[\],]|\[[^\]]*\])+", nodes.strip())
    return re.sub(r"\[\s*([^\],-]+)[^\]]*\]", r"\1", first[0]) if first else "127.0.0.1"
