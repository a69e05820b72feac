"""What torch does not publish of a backward that runs."""

from __future__ import annotations

from typing import Callable

import torch

__all__ = [
    "after_backward",
    "number_of_backward",
]


def after_backward(call: Callable[[], None]) -> None:
    """Call something when the backward that runs now has ended; to be asked for from inside of one.

    torch 2.11 to 2.13: hooks are called for a tensor or a node, none for the end; DDP and FSDP2 use the same.
    Test: tests/dist/test_entries.py.
    """
    torch.autograd.Variable._execution_engine.queue_callback(call)


def number_of_backward() -> int:
    """Number of the backward that runs now; -1 outside of one.

    torch 2.11 to 2.13: nothing else tells one from the next.
    Test: tests/dist/test_entries.py.
    """
    return torch._C._current_graph_task_id()
