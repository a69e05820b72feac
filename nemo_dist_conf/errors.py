"""What can go wrong, in words that a user can act on. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterable

__all__ = ["ConfigError", "DataError", "NemoDistConfError", "Preempted", "Problem", "TrainingError"]


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that cannot work.

    what: the finding in one sentence; asked: the words that the user typed (or would have);
    allowed: the values that work; instead: the words to type in place of what was asked, shown after ``type``.
    """

    what: str
    asked: str
    allowed: str
    instead: str

    def __str__(self) -> str:
        return f"{self.what}\n  asked    {self.asked}\n  allowed  {self.allowed}\n  type     {self.instead}"


class NemoDistConfError(Exception):
    """Root of every exception that this package raises on purpose."""


class ConfigError(NemoDistConfError, ValueError):
    """What was asked for cannot work; carries every problem found, not only the first.

    The attributes what, asked, allowed and instead are those of the first problem; ``type`` is the earlier name of
    ``instead``.
    """

    def __init__(self, *problems: Problem) -> None:
        if not problems:
            raise AssertionError("a ConfigError needs at least one Problem")
        self.problems = tuple(problems)
        super().__init__(self._text())

    def _text(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        parts = [f"{len(self.problems)} problems:"]
        parts += [f"{number}. {problem}" for number, problem in enumerate(self.problems, 1)]
        return "\n".join(parts)

    @property
    def what(self) -> str:
        return self.problems[0].what

    @property
    def asked(self) -> str:
        return self.problems[0].asked

    @property
    def allowed(self) -> str:
        return self.problems[0].allowed

    @property
    def instead(self) -> str:
        return self.problems[0].instead

    @property
    def type(self) -> str:
        return self.problems[0].instead

    @classmethod
    def raise_if(cls, problems: Iterable[Problem]) -> None:
        """Raise when there is at least one problem; return otherwise."""
        found = tuple(problems)
        if found:
            raise cls(*found)

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would pass the text where problems are expected.
        return (type(self), self.problems)


class DataError(ConfigError):
    """The data or the checkpoint folder that the user named cannot be used."""


class TrainingError(NemoDistConfError, RuntimeError):
    """Training cannot go on (a non-finite loss, for example); the run's folder is kept."""


class Preempted(NemoDistConfError):
    """A run was told to end, by SIGTERM or Ctrl-C, and did; the message says how to go on. by: number of the signal."""

    def __init__(self, text: str, by: int) -> None:
        super().__init__(text, by)
        self.text, self.by = text, by

    def __str__(self) -> str:
        return self.text
