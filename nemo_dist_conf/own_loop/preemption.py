"""What ends a run from outside: SIGTERM, which a queue or a launcher sends before it kills, and Ctrl-C.

A run that saves hears both between two steps, on all ranks at the same one, and saves. One that does not ends at once.
"""

from __future__ import annotations

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any, Callable, NoReturn

import torch
import torch.distributed as dist

from nemo_dist_conf.composition.agreement.rendezvous import is_started_by_agent
from nemo_dist_conf.errors import Preempted
from nemo_dist_conf.own_loop.ctrl_c import is_heard_here
from nemo_dist_conf.runtime.process_group import host_group

__all__ = ["Preemption"]


class Preemption:
    """A context in which SIGTERM ends nothing; ``begin_step`` and ``is_due`` go around each step, on all ranks.

    Whether some rank was told is asked while the step runs, so that no step waits for the answer; a rank that is told
    during a step is heard in the next one. Ctrl-C counts as told; typed a second time, or where the run saves nothing,
    it leaves the context at once, with what ``stopped`` makes of it.
    """

    def __init__(self, enabled: bool = True, stopped: Callable[[int], BaseException] | None = None) -> None:
        """enabled: false: SIGTERM ends the process as ever, and ``is_due`` is false.

        stopped: what to raise for the number of a signal that ends the run at once; None: what ends the program.
        """
        self._hears_term = enabled and threading.current_thread() is threading.main_thread()
        self._hears_int = is_heard_here()
        self._stopped = _ended if stopped is None else stopped
        self._told = False
        self._interrupts = 0
        #: torchrun passes Ctrl-C on to ranks that have heard it already; one more was typed again.
        self._patience = 2 if is_started_by_agent() else 1
        self._group = host_group() if enabled else None
        self._is_alone = not dist.is_initialized() or dist.get_world_size() == 1
        self._word = torch.zeros((), dtype=torch.uint8)
        self._asked: Any = None
        self._active = enabled

    def __enter__(self) -> Preemption:
        if self._hears_term:
            self._before = signal.signal(signal.SIGTERM, self._hear)
        if self._hears_int:
            self._int_before = signal.signal(signal.SIGINT, self._hear_ctrl_c)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._hears_term:
            signal.signal(signal.SIGTERM, self._before if self._before is not None else signal.SIG_DFL)
        if not self._hears_int:
            return
        interrupted = self._interrupts > 0
        ends = interrupted and self._int_before is not signal.default_int_handler  # the recipe does; an own app may not
        signal.signal(signal.SIGINT, signal.SIG_IGN if ends else self._int_before)
        if interrupted and error is not None and not isinstance(error, (Preempted, SystemExit)):
            # KeyboardInterrupt, or what a collective says whose other ranks have heard it first
            raise self._stopped(signal.SIGINT) from None

    @property
    def by(self) -> int:
        """The number of the signal that this rank has heard."""
        return signal.SIGINT if self._interrupts else signal.SIGTERM

    def end(self, text: str) -> NoReturn:
        """End the program as one that a signal has ended, with the status 128 + signal; rank 0 shows the text.

        For a loop of one's own, once ``is_due`` and its state is saved. Every rank calls it.
        """
        raise _ended(self.by, text)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._told = True

    def _hear_ctrl_c(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += 1
        self._told = True
        if self._interrupts == 1 and not self._active or self._interrupts > self._patience:
            raise KeyboardInterrupt

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


def _ended(by: int, text: str = "") -> SystemExit:
    if not dist.is_initialized() or dist.get_rank() == 0:
        name = "Ctrl-C" if by == signal.SIGINT else signal.Signals(by).name
        print(text or f"stopped by {name}", file=sys.stderr, flush=True)
    return SystemExit(128 + by)
