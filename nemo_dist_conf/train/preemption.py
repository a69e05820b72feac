"""SIGTERM, which a queue or a launcher sends before it kills: noticed between two steps, by all ranks at the same."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

from nemo_dist_conf.runtime.process_group import host_group

__all__ = ["Preemption"]


class Preemption:
    """A context in which SIGTERM ends nothing; ``begin_step`` and ``is_due`` go around each step, on all ranks.

    Whether some rank was told is asked while the step runs, so that no step waits for the answer; a rank that is told
    during a step is heard in the next one.
    """

    def __init__(self, enabled: bool) -> None:
        """enabled: false: SIGTERM ends the process as ever, and ``is_due`` is false."""
        self._enabled = enabled and threading.current_thread() is threading.main_thread()
        self._told = False
        self._group = host_group() if enabled else None
        self._is_alone = not dist.is_initialized() or dist.get_world_size() == 1
        self._word = torch.zeros((), dtype=torch.uint8)
        self._asked: Any = None
        self._active = enabled

    def __enter__(self) -> Preemption:
        if self._enabled:
            self._before = signal.signal(signal.SIGTERM, self._hear)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._enabled:
            signal.signal(signal.SIGTERM, self._before if self._before is not None else signal.SIG_DFL)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def begin_step(self) -> None:
        """Ask all ranks; the answer is there when the step ends."""
        if self._active and not self._is_alone:
            self._word.fill_(self._told)
            self._asked = dist.all_reduce(self._word, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def is_due(self) -> bool:
        """Whether some rank was told to end before the step began; the same on all ranks."""
        if not self._active:
            return False
        if self._is_alone:
            return self._told
        self._asked.wait()
        return bool(self._word)
