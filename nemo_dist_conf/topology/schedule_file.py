"""A pipeline schedule from a file: one row of actions per rank, read and checked without torch.

The format is that of torch's ``_dump_csv``: ``0F1`` is the forward of stage 0 for microbatch 1, ``B`` its whole
backward, ``I`` and ``W`` the two halves of one (gradients of inputs, of weights), ``(0F1;1B0)OVERLAP_F_B`` two at once;
an empty cell is a bubble. Source: torch/distributed/pipelining/schedules.py, _Action.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from nemo_dist_conf.wording import typed_path

__all__ = ["Action", "ScheduleFile", "read_schedule"]

_ACTION = re.compile(r"(\d+)(F|B|I|W)(\d+)")


@dataclass(frozen=True)
class Action:
    """One computation. kind: F, B, I or W."""

    stage: int
    kind: str
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True)
class ScheduleFile:
    """The actions of every rank. ranks: the rank of each stage, in order of the stages."""

    rows: tuple[tuple[Action, ...], ...]
    ranks: tuple[int, ...]
    microbatches: int

    @property
    def splits_backward(self) -> bool:
        return any(action.kind in "IW" for row in self.rows for action in row)


def read_schedule(path: str | Path) -> ScheduleFile:
    """The schedule in a CSV file. Raises ValueError, in one line, for what torch could not run to its end."""
    import csv

    try:
        with open(typed_path(path), newline="", encoding="utf-8") as file:
            rows = tuple(tuple(_row(number, cells)) for number, cells in enumerate(csv.reader(file)))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"it cannot be read ({getattr(error, 'strerror', None) or error})") from None
    ranks: dict[int, int] = {}
    for rank, row in enumerate(rows):
        for action in row:
            if ranks.setdefault(action.stage, rank) != rank:
                raise ValueError(f"stage {action.stage} stands in the rows of rank {ranks[action.stage]} and {rank}")
    microbatches = 1 + max((action.microbatch for row in rows for action in row), default=-1)
    missing = [stage for stage in range(max(ranks, default=0) + 1) if stage not in ranks]
    if missing or not all(rows):
        raise ValueError(f"stage {missing[0]} has no action" if missing else "a rank has no action")
    _check_complete(rows, microbatches)
    _check_order(rows, len(ranks))
    return ScheduleFile(rows, tuple(ranks[stage] for stage in range(len(ranks))), microbatches)


def _row(number: int, cells: list[str]) -> list[Action]:
    actions = []
    for cell in cells:
        text = cell.strip()
        overlap = re.fullmatch(r"\((.*)\)OVERLAP_F_B", text)
        for word in (overlap.group(1).split(";") if overlap else [text]) if text else []:
            found = _ACTION.fullmatch(word.strip())
            if not found:
                raise ValueError(f"row {number + 1} has {word.strip()!r}, not an action like 0F1, 0B1, 0I1 or 0W1")
            actions.append(Action(int(found.group(1)), found.group(2), int(found.group(3))))
    return actions


def _check_complete(rows: tuple[tuple[Action, ...], ...], microbatches: int) -> None:
    """That every stage runs every microbatch once forward and once backward."""
    for row in rows:
        for stage in sorted({action.stage for action in row}):
            for microbatch in range(microbatches):
                kinds = sorted(a.kind for a in row if (a.stage, a.microbatch) == (stage, microbatch))
                if kinds not in (["B", "F"], ["F", "I", "W"]):
                    had = ", ".join(kinds) or "nothing"
                    raise ValueError(f"stage {stage} has {had} for microbatch {microbatch}, not F and B, or F, I and W")


def _check_order(rows: tuple[tuple[Action, ...], ...], stages: int) -> None:
    """That no rank waits for ever: played through, each action when what it needs is done."""
    done: set[str] = set()
    left = [list(row) for row in rows]
    moved = True
    while moved:
        moved = False
        for row in left:
            while row and _ready(row[0], stages, done):
                done.add(str(row.pop(0)))
                moved = True
    stuck = next(((rank, row[0]) for rank, row in enumerate(left) if row), None)
    if stuck:
        raise ValueError(f"rank {stuck[0]} would wait for ever before {stuck[1]}")


def _ready(action: Action, stages: int, done: set[str]) -> bool:
    stage, microbatch = action.stage, action.microbatch
    if action.kind == "F":
        return stage == 0 or f"{stage - 1}F{microbatch}" in done
    if action.kind == "W":
        return f"{stage}I{microbatch}" in done
    after = stage + 1
    received = after == stages or f"{after}B{microbatch}" in done or f"{after}I{microbatch}" in done
    return received and f"{stage}F{microbatch}" in done
