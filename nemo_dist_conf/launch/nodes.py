"""The launchers of a sweep over several nodes: the same command runs on each, and they do as one of them says."""

from __future__ import annotations

import atexit
import datetime
import pickle
import time
from typing import Any, Callable, TypeVar

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.launch.settings import Settings

__all__ = ["Nodes"]

_T = TypeVar("_T")


class Nodes:
    """This node among those of the sweep. The first to come leads: its time, its trees and its folder are used by all.

    With a single node nothing is exchanged.
    """

    def __init__(self, settings: Settings) -> None:
        self.count = settings.options.nnodes
        self.number = 0
        self._patience = datetime.timedelta(seconds=settings.options.rdzv_timeout_s)
        self._endpoint = settings.options.rdzv_endpoint
        if self.count == 1:
            return
        self._connection = _connect(settings)
        from torch.distributed import PrefixStore

        self._store = PrefixStore(f"nemo_dist_conf/{settings.options.rdzv_id}", self._connection)
        self.number = self._store.add("nodes", 1) - 1
        if self.number >= self.count:
            self._too_many(settings)
        atexit.register(self._leave)

    @property
    def leads(self) -> bool:
        return self.number == 0

    def agree(self, key: str, make: Callable[[], _T]) -> _T:
        """What ``make`` gives on the node that leads, on every node."""
        if self.count == 1:
            return make()
        if self.leads:
            made = make()
            self._store.set(key, pickle.dumps(made))  # type: ignore[arg-type]
            return made
        return self._get(key)

    def gather(self, key: str, mine: _T) -> list[_T]:
        """``mine`` of every node, on every node, in their order."""
        self.post(key, mine)
        if self.count == 1:
            return [mine]
        return [self._get(f"{key}/{number}") for number in range(self.count)]

    def post(self, key: str, mine: Any) -> None:
        """This node's part of what the others gather, without waiting for theirs."""
        if self.count > 1:
            self._store.set(f"{key}/{self.number}", pickle.dumps(mine))  # type: ignore[arg-type]

    def _get(self, key: str) -> Any:
        from torch.distributed import DistError

        try:
            self._store.wait([key], self._patience)
            return pickle.loads(self._store.get(key))
        except DistError:
            raise ConfigError(
                Problem(
                    f"another node of this sweep did not answer within {self._patience.total_seconds():g} s",
                    f"hydra.launcher.nnodes={self.count} hydra.launcher.rdzv_endpoint={self._endpoint}",
                    f"the same command running on {self.count} nodes",
                    f"hydra.launcher.rdzv_timeout_s={int(2 * self._patience.total_seconds())}",
                )
            ) from None

    def _too_many(self, settings: Settings) -> None:
        name = settings.options.rdzv_id
        raise ConfigError(
            Problem(
                f"{self.count} nodes have joined the sweep {name!r} at {self._endpoint} before this one",
                f"hydra.launcher.nnodes={self.count} hydra.launcher.rdzv_id={name}",
                "one launcher on each node, and a name of its own for each sweep at an endpoint",
                f"hydra.launcher.rdzv_id={name}2",
            )
        )

    def _leave(self) -> None:
        """Wait shortly for the others: the store ends with the process that serves it."""
        try:
            gone = self._store.add("left", 1)
            deadline = time.monotonic() + 10
            while gone < self.count and time.monotonic() < deadline:
                time.sleep(0.05)
                gone = self._store.add("left", 0)
        except Exception:  # the node that served the store is gone: nothing to wait for
            return


def _connect(settings: Settings) -> Any:
    """The store at the endpoint, served by whichever launcher runs there; as torch elastic finds it for a job."""
    from torch.distributed import DistError, TCPStore
    from torch.distributed.elastic.rendezvous import RendezvousParameters
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import create_backend
    from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

    options = settings.options
    endpoint = options.rdzv_endpoint or ""
    try:
        if options.rdzv_backend == "static":
            host, port = parse_rendezvous_endpoint(endpoint, 29400)
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
                f"the nodes cannot meet at {endpoint}: {reason}",
                f"hydra.launcher.rdzv_endpoint={endpoint}",
                "an address of one of the nodes and a free port, and that node's launcher running",
                "hydra.launcher.rdzv_endpoint=HOST:29400",
            )
        ) from None
