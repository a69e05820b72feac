"""What ends all ranks is told once: by rank 0, or by the only rank that it happened to."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import time
from typing import Any, NoReturn, TextIO

from nemo_dist_conf.composition.agreement.rendezvous import is_started_by_agent, open_store
from nemo_dist_conf.errors import ConfigError, NemoDistConfError
from nemo_dist_conf.topology.launched_ranks import Launched, launched

__all__ = ["another_rank_told", "end", "install", "tell", "wants_everything"]

#: How long a rank waits for rank 0 to tell the same: ranks are seldom further apart when they refuse a config.
_PATIENCE_S = 10.0
_LOOK_S = 0.05


def end(error: NemoDistConfError) -> NoReturn:
    """End this rank with the message alone."""
    tell(error)
    raise SystemExit(1) from None


def tell(error: BaseException, file: TextIO | None = None) -> None:
    """Print the message of this rank's error (file None: to stderr), unless another rank has printed the same.

    Ranks above 0 wait for rank 0: a launcher stops all ranks as soon as one ends, and rank 0 might not have printed
    yet. A rank that is still there then is the only one with this error, and prints it.
    """
    text = str(error)
    place, store = _place(), open_store()
    key = f"{_told()}/{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if place.rank > 0 and _told_within_patience(store, key):
        return
    print(text, file=file or sys.stderr, flush=True)
    if place.world_size > 1 and store is not None:
        try:
            store.set(key, "")
            store.set(_told(), "")
        except RuntimeError:  # torch's DistError: the rank that served it is gone
            return
        if place.rank == 0 and not is_started_by_agent():
            time.sleep(10 * _LOOK_S)  # the store ends with this process; the others look there


def another_rank_told() -> bool:
    """Whether a rank has told why it ends: what this one meets then comes of that."""
    store = open_store()
    try:
        return store is not None and bool(store.check([_told()]))
    except RuntimeError:  # torch's DistError: it is gone
        return False


def wants_everything() -> bool:
    """HYDRA_FULL_ERROR=1: tracebacks too, of every rank."""
    return os.environ.get("HYDRA_FULL_ERROR") == "1"


def install() -> None:
    """From here on an error of ours that nobody catches is its message alone, in a rank and in a single process."""
    if sys.excepthook is not _excepthook:
        global _other_hook
        _other_hook = sys.excepthook
        sys.excepthook = _excepthook


_other_hook: Any = sys.excepthook


def _excepthook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if wants_everything():
        _other_hook(kind, error, trace)
    elif isinstance(error, NemoDistConfError):
        # A process group has a hook of its own, which collects what this one prints and puts the rank before each line.
        tell(error, sys.__stderr__ if isinstance(sys.stderr, io.StringIO) else sys.stderr)
    elif not (issubclass(kind, Exception) and another_rank_told()):
        _other_hook(kind, error, trace)


def _told() -> str:
    """The key that says so; ranks that are started again have one of their own."""
    return f"told{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def _told_within_patience(store: Any, key: str) -> bool:
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        try:
            if store is not None and store.check([key]):
                return True
        except RuntimeError:  # torch's DistError: rank 0 served the store, and is gone
            return False
        time.sleep(_LOOK_S)
    return False


def _place() -> Launched:
    try:
        return launched()
    except ConfigError:  # it is what cannot be read that is told
        return Launched()
