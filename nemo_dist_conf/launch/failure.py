"""A job that failed: which rank, why, where it says more."""

from __future__ import annotations

import signal

from hydra.errors import CompactHydraException

from nemo_dist_conf.errors import NemoDistConfError

__all__ = ["Failure", "Interrupted", "JobFailed"]


class Interrupted(SystemExit):
    """The sweep was told to end; the ranks are gone. Its code is the shell's for that signal."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


class Failure(NemoDistConfError):
    """What ended the ranks of a job. rank None: no single one; printed: file with what the rank printed.

    when: seconds of the clock; 0 for what cannot have followed from another failure.
    """

    def __init__(
        self, reason: str, rank: int | None = None, trace: str = "", printed: str = "", when: float = 0.0
    ) -> None:
        super().__init__(reason, rank, trace, printed, when)
        self.reason, self.rank, self.trace, self.printed, self.when = reason, rank, trace, printed, when


class JobFailed(NemoDistConfError, CompactHydraException):
    """A job of a sweep failed; Hydra shows the message alone. reason: in one line, for the table of the sweep."""

    def __init__(self, number: int, words: str, failure: Failure, log_file: str) -> None:
        super().__init__(number, words, failure, log_file)
        self.number, self.rank, self.log_file = number, failure.rank, log_file
        who = "" if failure.rank is None else f"rank {failure.rank}: "
        self.reason = f"{who}{failure.reason}"
        self.failure = failure
        self.words = words

    def __str__(self) -> str:
        lines = [f"job #{self.number} failed: {self.words or '(no overrides)'}", f"  {self.reason}"]
        lines += [f"  {line}" for line in self.failure.trace.splitlines()]
        lines += [f"  its log      {self.log_file}"]
        if self.failure.printed:
            lines.append(f"  its stderr   {self.failure.printed}")
        return "\n".join(lines)
