"""One thing that people bring, the layout it is brought to, and what has to come of it."""

from __future__ import annotations

import importlib
import math
import pkgutil
from dataclasses import dataclass
from typing import Callable

from nemo_dist_conf.errors import ConfigError

__all__ = ["Case", "Outcome", "all_cases", "outcome_of"]


@dataclass(frozen=True)
class Case:
    """A row of docs/conformance.md, and a test where ``in_suite``.

    area: heading of the table. name: what is brought. layout: how it is run, in words.
    run: tries it, on ranks of its own (tests/dist/pool.py), and returns the worst relative difference from plain torch
    in one process, 0 where there is nothing to measure and its own assertions hold; a refusal leaves it as ConfigError.
    refused: text that the refusal has to contain; None: it has to be equal, up to ``tolerance``.
    """

    area: str
    name: str
    layout: str
    run: Callable[[], float]
    refused: str | None = None
    tolerance: float = 1e-5
    in_suite: bool = True

    def __str__(self) -> str:
        return f"{self.area}: {self.name}, {self.layout}"


@dataclass(frozen=True)
class Outcome:
    """What came of a case. kind: ``equal``, ``refused``, or what is never right: ``different``, ``died``.

    difference: nan where there is none. reason: first line of a refusal or an error.
    """

    kind: str
    difference: float = math.nan
    reason: str = ""

    def is_right(self, case: Case) -> bool:
        if case.refused is not None:
            return self.kind == "refused" and case.refused in self.reason
        return self.kind == "equal"


def outcome_of(case: Case) -> Outcome:
    """Runs the case; whatever it raises is an outcome too."""
    try:
        difference = case.run()
    except ConfigError as refusal:
        return Outcome("refused", reason=" ".join(str(refusal).split()))
    except Exception as error:
        return Outcome("died", reason=f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")
    return Outcome("equal" if difference <= case.tolerance else "different", difference)  # nan is different


def all_cases() -> list[Case]:
    """Of every module of tests/conformance whose name starts with ``of_``, in the order of the names."""
    package = importlib.import_module(__package__)
    names = sorted(found.name for found in pkgutil.iter_modules(package.__path__) if found.name.startswith("of_"))
    return [case for name in names for case in importlib.import_module(f"{__package__}.{name}").CASES]
