"""What a function looks at while it answers: the clock, or a variable that belongs to one rank."""

from __future__ import annotations

import datetime
import os
import sys
from dataclasses import dataclass
from typing import Any, Callable

from nemo_dist_conf.topology.launched_ranks import is_rank_variable

__all__ = ["Sources", "observed"]

_CLOCK = frozenset("time time_ns localtime gmtime ctime asctime strftime".split())
_TODAY = frozenset("now utcnow today".split())
_READ_VARIABLE = type(os.environ).__getitem__.__code__  # os.getenv and os.environ.get come here too


@dataclass
class Sources:
    """clock: the time of day or the date was asked for. rank: a variable that differs by rank was."""

    clock: bool = False
    rank: bool = False


#: Of the functions that are being observed; each may call the next.
_observed: list[Sources] = []


def observed(function: Callable[..., Any], *args: Any) -> tuple[Any, Sources]:
    """(what the function returns, what it looked at), seen by Python's profiling hook.

    Log lines ask for the time too, which does not count. Where a profiler runs already, nothing is seen.
    """
    if sys.getprofile() not in (None, _see):
        return function(*args), Sources()
    _observed.append(Sources())
    sys.setprofile(_see)
    try:
        return function(*args), _observed[-1]
    finally:
        _observed.pop()
        sys.setprofile(_see if _observed else None)


def _see(frame: Any, event: str, called: Any) -> None:
    if not _observed:
        return
    if event == "c_call":
        logs = frame.f_globals.get("__name__", "").startswith("logging")
        _observed[-1].clock |= _asks_the_clock(called) and not logs
    elif event == "call" and frame.f_code is _READ_VARIABLE:
        _observed[-1].rank |= is_rank_variable(str(frame.f_locals.get("key")))


def _asks_the_clock(called: Any) -> bool:
    owner = getattr(called, "__self__", None)
    if isinstance(owner, type):
        return issubclass(owner, datetime.date) and called.__name__ in _TODAY
    return getattr(called, "__module__", None) == "time" and called.__name__ in _CLOCK
