"""The only module that touches what torch, transformers and megatron-fsdp do not publish: what, in which versions, why,
and which test breaks when it changes.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["gloo_threads"]


def gloo_threads() -> list[Path]:
    """The threads of this process that run gloo's collectives, as folders of /proc; none where there is no /proc.

    torch 2.11 to 2.13 name them so (ProcessGroupGloo.cpp, runLoop) and give no other way to them: a process group
    lives on in meshes and models after ``destroy_process_group``, and gloo's has no ``shutdown``.
    tests/runtime/test_ending.py
    """
    found = []
    try:
        for number in os.listdir("/proc/self/task"):
            folder = Path("/proc/self/task", number)
            if folder.joinpath("comm").read_text().strip() == "pt_gloo_runloop":
                found.append(folder)
    except OSError:  # no such system, or a thread that has just ended
        return found
    return found
