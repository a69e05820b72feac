"""What people bring, case by case: ``python -m tests.conformance`` writes docs/conformance.md.

With words, only the cases that have one of them in their area, name or layout are run, and nothing is written.
"""

from __future__ import annotations

import math
import platform
import re
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from tests.conformance.case import Case, Outcome, all_cases, outcome_of
from tests.dist.pool import close_pools

__all__ = ["TABLE", "table"]

TABLE = Path(__file__).parents[2] / "docs" / "conformance.md"


def table(rows: dict[Case, Outcome], seconds: float) -> str:
    """docs/conformance.md."""
    lines = [
        "# What people bring",
        "",
        "Models of every kind, own apps and own objects, each on a layout. *equal*: as plain torch in one process, up "
        "to the worst relative difference beside it (0: nothing is computed, what is asked for is there). *refused*: "
        "with these words, before anything wrong starts.",
        "",
        f"{len(rows)} cases, torch {torch.__version__}, gloo, CPU ({platform.machine()}), {date.today()}, "
        f"{seconds / 60:.0f} minutes: `python -m tests.conformance`.",
    ]
    area = None
    for case, outcome in rows.items():
        if case.area != area:
            area = case.area
            lines += ["", f"## {area}", "", "| case | layout | outcome | difference |", "|---|---|---|---|"]
        said = outcome.kind if outcome.kind != "refused" else f"refused: {_cell(outcome.reason.split(' asked ')[0])}"
        shown = "" if math.isnan(outcome.difference) else f"{outcome.difference:.1e}"
        lines.append(f"| {_cell(case.name)} | {_cell(case.layout)} | {said} | {shown} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Without folders that were only there while the case ran."""
    return re.sub(rf"{re.escape(tempfile.gettempdir())}/[^/\s]+/", "", text).replace("|", "\\|")


def main(words: list[str]) -> int:
    began = time.monotonic()
    rows: dict[Case, Outcome] = {}
    wrong = []
    for case in all_cases():
        if words and not any(word in str(case) for word in words):
            continue
        rows[case] = outcome = outcome_of(case)
        mark = "" if outcome.is_right(case) else "  <- WRONG"
        print(f"{case}: {outcome.kind} {outcome.difference:.1e} {outcome.reason[:150]}{mark}", flush=True)
        if mark:
            wrong.append(case)
        if len(rows) % 20 == 0:
            close_pools()  # gloo keeps a thread for every group that a rank ever had
    close_pools()
    print(f"{len(rows)} cases, {len(wrong)} wrong")
    if not words and not wrong:
        TABLE.write_text(table(rows, time.monotonic() - began), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
