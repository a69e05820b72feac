"""Ctrl-C reaches each rank of torchrun twice, from the terminal and from torchrun. No torch."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

__all__ = ["BEFORE", "end_at_once", "hear_once", "is_heard_here", "was_heard"]

_heard = False
_is_first = True

#: What is said where no step was made.
BEFORE = "stopped by Ctrl-C before the first step"


def hear_once() -> None:
    """From here on the first Ctrl-C is a KeyboardInterrupt, and the second one does not meet the program as it ends."""
    if is_heard_here():
        signal.signal(signal.SIGINT, _first)


def end_at_once() -> None:
    """Until ``hear_once``, a rank that is stopped has nothing to save: it ends, and rank 0 says so.

    What else a KeyboardInterrupt meets there (imports, Hydra, ranks that wait for each other) has words of its own.
    """
    from nemo_dist_conf.errors import ConfigError
    from nemo_dist_conf.topology.launched_ranks import launched

    global _is_first
    try:
        place = launched()
    except ConfigError:  # told when the ranks meet
        return
    if place.world_size > 1 and is_heard_here():
        _is_first = place.rank == 0
        signal.signal(signal.SIGINT, _before)


def is_heard_here() -> bool:
    """Whether nobody else hears Ctrl-C, such as the launcher of a sweep or an app around the recipe."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    return in_main_thread and signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _first, _before)


def was_heard() -> bool:
    """Whether ``hear_once`` has heard one: an import that it interrupts may end in any error."""
    return _heard


def _before(number: int, frame: FrameType | None) -> None:
    if _is_first:
        os.write(2, f"{BEFORE}\n".encode())  # print may be what is interrupted
    os._exit(128 + number)


def _first(number: int, frame: FrameType | None) -> None:
    global _heard
    _heard = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
