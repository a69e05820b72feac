"""What a training run shows: a header, progress, and a closing summary; on the main rank only."""

from __future__ import annotations

import os
import resource
import sys
import time
from types import TracebackType
from typing import Any, Callable, Mapping, TextIO

import torch

__all__ = ["Console", "duration", "peak_memory_bytes"]

#: In a log file: a line at least every so many seconds, and about so many lines over a run.
_QUIET_S = 30.0
_LINES_PER_RUN = 10


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this rank held: the process's resident set on a CPU, torch's allocations on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def duration(seconds: float) -> str:
    """0:07, 12:30 or 1:02:03."""
    minutes, second = divmod(int(seconds + 0.5), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


class Console:
    """Progress that suits where it goes: a live bar on a terminal, now and then a line in a file or a pipe.

    A file gets about ten lines over a run, the first and the last step among them, and one at least every 30
    seconds. Use it as a context manager: leaving it, also by an exception, gives the terminal back.
    """

    def __init__(
        self,
        steps: int,
        *,
        enabled: bool = True,
        first_step: int = 1,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """steps: number of the last step. first_step: the first that this run makes, above 1 when it resumes.

        enabled: false on all ranks but the main one: nothing is printed. stream None: standard output.
        """
        self._steps = steps
        self._enabled = enabled
        self._first_step = first_step
        self._stream = sys.stdout if stream is None else stream
        self._clock = clock
        self._line_every = max(1, round((steps - first_step + 1) / _LINES_PER_RUN))
        self._last_line_at = -float("inf")
        self._tokens = 0  # since the first step of this run, which is left out: it allocates and compiles
        self._seconds = 0.0
        self._bar: Any = None
        self._task: Any = None

    # ------------------------------------------------------------------------------------------------ parts

    def header(self, facts: Mapping[str, str]) -> None:
        """What is about to run, a fact a line."""
        if self._enabled:
            self._write(_table(facts))

    def step(self, *, step: int, loss: float, grad_norm: float, tokens: int, seconds: float) -> None:
        """Show a finished step, counted from 1; tokens of the global batch, seconds of this step."""
        if not self._enabled:
            return
        if step > self._first_step or self._steps == self._first_step:
            self._tokens += tokens
            self._seconds += seconds
        rate = self.tokens_per_second or tokens / max(seconds, 1e-9)
        left = (self._steps - step) * (tokens / rate)
        if self._bar is not None:
            numbers = f"loss {loss:.3f}  grad norm {grad_norm:.2f}  {rate:,.0f} tokens/s"
            self._bar.update(self._task, completed=step, numbers=numbers, left=duration(left))
            return
        if not self._is_due(step):
            return
        self._last_line_at = self._clock()
        width = len(str(self._steps))
        self._write(
            f"step {step:>{width}}/{self._steps}  loss {loss:.3f}  grad norm {grad_norm:.2f}  "
            f"{rate:,.0f} tokens/s  {duration(left)} left"
        )

    def summary(self, facts: Mapping[str, str]) -> None:
        """The closing table; ends the progress bar."""
        self.close()
        if self._enabled:
            self._write(_table(facts))

    @property
    def tokens_per_second(self) -> float:
        """Throughput of all steps but the first of this run; 0 before there is one."""
        return self._tokens / self._seconds if self._seconds else 0.0

    # ------------------------------------------------------------------------------------------------ life

    def __enter__(self) -> Console:
        if self._enabled and _is_terminal(self._stream):
            self._bar = _progress_bar(self._stream)
        if self._bar is not None:
            self._task = self._bar.add_task(
                "step", total=self._steps, completed=self._first_step - 1, numbers="", left="-:--"
            )
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the progress bar, leaving its last state on the terminal."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    # ------------------------------------------------------------------------------------------------ inside

    def _is_due(self, step: int) -> bool:
        if step in (self._first_step, self._steps) or step % self._line_every == 0:
            return True
        return self._clock() - self._last_line_at >= _QUIET_S

    def _write(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


def _table(facts: Mapping[str, str]) -> str:
    width = max((len(name) for name in facts), default=0)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in facts.items())


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM", "") != "dumb"


def _progress_bar(stream: TextIO) -> Any:
    """rich's bar, which fits 80 columns, or None where rich is not installed: plain lines do the same then."""
    try:
        from rich.console import Console as RichConsole
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        return None
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}"),
        TextColumn("{task.fields[left]} left"),
        console=RichConsole(file=stream),
        refresh_per_second=2,
    )
