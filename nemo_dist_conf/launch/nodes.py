"""The launchers of a sweep over several nodes: the same command runs on each, and they do as one of them says."""

from __future__ import annotations

import atexit
import datetime
import pickle
import threading
import time
from typing import Any, Callable, NoReturn, TypeVar

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.launch.settings import Settings

__all__ = ["Nodes"]

_T = TypeVar("_T")
_BEAT_S = 0.5


class _Raised:
    """In the place of a value: making it failed on the node that leads."""

    def __init__(self, error: Exception) -> None:
        self.error = error if isinstance(error, ConfigError) else RuntimeError(f"{type(error).__name__}: {error}")


class Nodes:
    """This node among those of the sweep. One leads: its time, its trees and its folder are used by all.

    It is the first to come, or node_rank 0 of a static rendezvous. With a single node nothing is exchanged.
    A node that waits for another does so as long as that one gives signs of life: a job's ranks may end hours apart.
    """

    def __init__(self, settings: Settings) -> None:
        self.count = settings.options.nnodes
        self.number = 0
        self._static = settings.options.rdzv_backend == "static"
        self._patience_s = settings.options.rdzv_timeout_s
        self._endpoint = settings.options.rdzv_endpoint or ""
        self._posted: set[str] = set()
        self._given_up: set[int] = set()
        if self.count == 1:
            return
        self._connection = _connect(settings)
        from torch.distributed import PrefixStore

        self._store = PrefixStore(f"nemo_dist_conf/{settings.options.rdzv_id}", self._connection)
        if self._static:
            self.number = settings.options.node_rank or 0
            if self._store.add(f"joined/{self.number}", 1) > 1:
                self._rank_taken()
        else:
            self.number = self._store.add("joined", 1) - 1
            if self.number >= self.count:
                self._too_many(settings)
        self._ends = threading.Event()
        # A connection of its own: a wait on the other one would hold up the signs of life.
        another = self._store.clone()  # type: ignore[attr-defined]
        self._life = threading.Thread(target=self._show_life, args=(another,), daemon=True)
        self._life.start()
        atexit.register(self._leave)

    @property
    def leads(self) -> bool:
        return self.number == 0

    def agree(self, key: str, make: Callable[[], _T]) -> _T:
        """What ``make`` gives on the node that leads, on every node; an error of it as well."""
        if self.count == 1:
            return make()
        if not self.leads:
            value = self._get(key, 0)
            if isinstance(value, _Raised):
                raise value.error
            return value
        try:
            made = make()
        except Exception as error:
            self._set(key, _Raised(error))
            raise
        self._set(key, made)
        return made

    def gather(self, key: str, mine: _T) -> list[_T]:
        """``mine`` of every node, on every node, in their order."""
        self.post(key, mine)
        if self.count == 1:
            return [mine]
        return [self._get(f"{key}/{number}", number) for number in range(self.count)]

    def post(self, key: str, mine: Any) -> None:
        """This node's part of what the others gather, without waiting for theirs; the first one holds."""
        if self.count > 1 and key not in self._posted:
            self._posted.add(key)
            self._set(f"{key}/{self.number}", mine)

    def endpoint(self, job: int) -> str:
        """Where elastic lets the ranks of this job meet.

        The static rendezvous lends its own store to the ranks, where they would find the keys of the job before: so
        each job gets another one, at a free port of the same host.
        """
        if not self._static:
            return self._endpoint
        from torch.distributed import TCPStore

        host = _host_and_port(self._endpoint)[0]

        def serve() -> int:
            # Elastic's own store shares this server, as both live in one process.
            self._of_job = TCPStore(host, 0, is_master=True, wait_for_workers=False, multi_tenant=True)
            return self._of_job.port

        return f"{host}:{self.agree(f'job{job}/port', serve)}"

    def _set(self, key: str, value: Any) -> None:
        self._store.set(key, pickle.dumps(value))  # type: ignore[arg-type]

    def _get(self, key: str, node: int) -> Any:
        """What that node has put there or will put there."""
        from torch.distributed import DistError

        beats, deadline = 0, time.monotonic() + self._patience_s
        try:
            while not self._store.check([key]):
                if self._store.check([f"left/{node}"]) and not self._store.check([key]):
                    self._refuse("another node of this sweep has ended")
                seen = self._store.add(f"alive/{node}", 0)
                if seen != beats:
                    beats, deadline = seen, time.monotonic() + self._patience_s
                elif time.monotonic() > deadline:
                    self._given_up.add(node)
                    longer = f"hydra.launcher.rdzv_timeout_s={2 * self._patience_s}"
                    self._refuse(f"another node of this sweep did not answer within {self._patience_s} s", longer)
                time.sleep(0.02)
            return pickle.loads(self._store.get(key))
        except DistError:
            self._refuse(f"the node at {self._endpoint}, where the nodes of this sweep meet, has ended")

    def _refuse(self, what: str, instead: str = "") -> NoReturn:
        asked = f"hydra.launcher.nnodes={self.count} hydra.launcher.rdzv_endpoint={self._endpoint}"
        allowed = f"the same command running on {self.count} nodes"
        raise ConfigError(Problem(what=what, asked=asked, allowed=allowed, instead=instead or asked)) from None

    def _too_many(self, settings: Settings) -> NoReturn:
        name = settings.options.rdzv_id
        raise ConfigError(
            Problem(
                what=f"{self.count} nodes have joined the sweep {name!r} at {self._endpoint} before this one",
                asked=f"hydra.launcher.nnodes={self.count} hydra.launcher.rdzv_id={name}",
                allowed="one launcher on each node, and a name of its own for each sweep at an endpoint",
                instead=f"hydra.launcher.rdzv_id={name}2",
            )
        )

    def _rank_taken(self) -> NoReturn:
        raise ConfigError(
            Problem(
                what=f"another node has joined this sweep as node_rank={self.number}",
                asked=f"hydra.launcher.node_rank={self.number}",
                allowed=f"0 to {self.count - 1}, another one on each node",
                instead=f"hydra.launcher.node_rank={(self.number + 1) % self.count}",
            )
        )

    def _show_life(self, store: Any) -> None:
        try:
            store.add(f"alive/{self.number}", 1)
            while not self._ends.wait(_BEAT_S):
                store.add(f"alive/{self.number}", 1)
        except Exception:  # the node that served the store is gone: whoever waits for one notices
            return

    def _has_joined(self, number: int) -> bool:
        """Whether it takes part already; it may not have shown a sign of life yet."""
        if self._static:
            return self._store.add(f"joined/{number}", 0) > 0
        return self._store.add("joined", 0) > number

    def _leave(self) -> None:
        """Wait shortly for the others: the store ends with the process that serves it."""
        self._ends.set()
        self._life.join()  # a thread inside torch must not meet the end of the interpreter
        try:
            self._store.set(f"left/{self.number}", "1")
            deadline = time.monotonic() + 10
            others = set(range(self.count)) - self._given_up
            everyone = [f"left/{number}" for number in others if self._has_joined(number)]
            while not self._store.check(everyone) and time.monotonic() < deadline:
                time.sleep(0.05)
        except Exception:  # the node that served the store is gone: nothing to wait for
            return


def _host_and_port(endpoint: str) -> tuple[str, int]:
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    return parse_rendezvous_endpoint(endpoint, 29400)


def _connect(settings: Settings) -> Any:
    """The store at the endpoint, served by whichever launcher runs there; as torch elastic finds it for a job."""
    from torch.distributed import DistError, TCPStore
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend

    options = settings.options
    endpoint = options.rdzv_endpoint or ""
    try:
        if options.rdzv_backend == "static":
            host, port = _host_and_port(endpoint)
            return TCPStore(
                host,
                port,
                is_master=options.node_rank == 0,
                timeout=datetime.timedelta(seconds=options.rdzv_timeout_s),
                wait_for_workers=False,
                multi_tenant=True,
            )
        parameters = RendezvousParameters(
            "c10d", endpoint, options.rdzv_id, options.nnodes, options.nnodes, read_timeout=options.rdzv_timeout_s
        )
        return create_backend(parameters)[1]
    except (RendezvousError, DistError, RuntimeError, ValueError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(
            Problem(
                what=f"the nodes cannot meet at {endpoint}: {reason}",
                asked=f"hydra.launcher.rdzv_endpoint={endpoint}",
                allowed="an address of one of the nodes and a free port, and that node's launcher running",
                instead="hydra.launcher.rdzv_endpoint=HOST:29400",
            )
        ) from None
