"""A finished program ends well: gloo's threads let go of their last tensors while the interpreter is still there.

A thread of gloo frees the tensors of a collective after it has told that the collective is done, and needs the
interpreter's lock for those that Python made and has let go of. Where the program ends meanwhile, Python ends the
thread in the middle of C++, and that ends the process with SIGABRT, after all its work was done. So the interpreter
waits until these threads rest. One that waits for another rank rests too: nothing waits here for a rank that is gone.
"""

from __future__ import annotations

import atexit
import time
from pathlib import Path

from nemo_dist_conf.runtime.torch_inside import gloo_threads

__all__ = ["let_gloo_rest"]

#: Longer than Python's switch interval: a thread that wants the lock gets it within this time.
_WINDOW_S = 0.006
_PATIENCE_S = 2.0


def let_gloo_rest() -> None:
    """Give the lock away until no thread of gloo has anything left to do with it."""
    threads = gloo_threads()
    before: list[tuple[str, ...]] = []
    deadline = time.monotonic() + _PATIENCE_S
    while threads and time.monotonic() < deadline:
        time.sleep(_WINDOW_S)  # without the lock
        now = [_activity(thread) for thread in threads]
        # A thread that waited for the lock could have had it, so one that has not run at all waits for something else.
        if now == before and all(state == "S" for state, *_ in now):
            return
        before = now


def _activity(thread: Path) -> tuple[str, ...]:
    """State of a thread (S: it sleeps), and how often it has been put aside since it began."""
    try:
        lines = thread.joinpath("status").read_text().splitlines()
    except OSError:  # it has ended
        return ("S",)
    fields = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    return fields["State"][0], fields["voluntary_ctxt_switches"], fields["nonvoluntary_ctxt_switches"]


# At import: what is registered first is called last, after whatever leaves its process groups at the exit.
atexit.register(let_gloo_rest)
