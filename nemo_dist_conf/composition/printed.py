"""What a command prints, into a pipe that its reader may close. No torch."""

from __future__ import annotations

import os
import signal
import sys

__all__ = ["show"]


def show(text: str) -> None:
    """Print a text; where the reader has seen enough (``| head``), end without a word, as tools of a shell do.

    Raises SystemExit there, with the status of a process that SIGPIPE ends.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes once more at its end, and would tell of the same pipe there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None
