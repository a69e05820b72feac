"""Ctrl-C reaches each rank of torchrun twice, from the terminal and from torchrun. No torch."""

from __future__ import annotations

import signal
import threading
from types import FrameType

__all__ = ["hear_once", "is_heard_here", "was_heard"]

_heard = False


def hear_once() -> None:
    """From here on the first Ctrl-C is a KeyboardInterrupt, and the second one does not meet the program as it ends."""
    if is_heard_here():
        signal.signal(signal.SIGINT, _first)


def is_heard_here() -> bool:
    """Whether nobody else hears Ctrl-C, such as the launcher of a sweep or an app around the recipe."""
    in_main_thread = threading.current_thread() is threading.main_thread()
    return in_main_thread and signal.getsignal(signal.SIGINT) in (signal.default_int_handler, _first)


def was_heard() -> bool:
    """Whether ``hear_once`` has heard one: an import that it interrupts may end in any error."""
    return _heard


def _first(number: int, frame: FrameType | None) -> None:
    global _heard
    _heard = True
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
