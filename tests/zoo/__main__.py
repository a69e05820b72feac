"""Every causal family of transformers, and other kinds of models, along every axis, beside plain torch in one process.

    python -m tests.zoo                        measure what is not in the file of results yet
    python -m tests.zoo llama gpt2             these families only
    python -m tests.zoo --axes tp "tp x pp"    these axes only
    python -m tests.zoo --again                also what is there already
    python -m tests.zoo --write                then write docs/zoo.md and docs/zoo.json from all that is there

Each result is a line of ``--keep`` as soon as it is there, so that a run can be stopped and goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import torch

from tests.conformance.case import Outcome
from tests.dist.kinds import KINDS, TOWERS
from tests.dist.pool import close_pools
from tests.tiny_configs import causal_families
from tests.zoo.axes import AXES, OF_KINDS, OF_TOWERS
from tests.zoo.cell import TOLERANCE, measure, measure_kind, reference, tolerance
from tests.zoo.table import Cell, write

__all__: list[str] = []

ROOT = Path(__file__).parents[2]
EVERY = {**AXES, **OF_TOWERS}


def axes_of(family: str) -> list[str]:
    """Of a family all that are not of towers; of a kind those of kinds, with those of towers where it has several."""
    if family not in KINDS:
        return list(AXES)
    return [*OF_KINDS, *(OF_TOWERS if family in TOWERS else ())]


def kept(file: Path) -> dict[tuple[str, str], Cell]:
    """The latest result of each cell."""
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    cells = [Cell(**json.loads(line)) for line in lines]
    return {(cell.family, cell.axis): cell for cell in cells}


def tried(family: str, axis: str) -> Cell:
    began = time.monotonic()
    if family in KINDS:
        return _cell(family, axis, measure_kind(family, EVERY[axis]), TOLERANCE, began)
    try:
        reference(family)
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Cell(family, axis, "no reference", None, reason, 0.0)
    return _cell(family, axis, measure(family, AXES[axis]), tolerance(family), began)


def _cell(family: str, axis: str, outcome: Outcome, tolerance: float, began: float) -> Cell:
    kind = {"different": "wrong", "died": "error"}.get(outcome.kind, outcome.kind)
    difference = None if math.isnan(outcome.difference) else outcome.difference
    reason = outcome.reason.partition(" rank 0: ")[0]  # of ranks that hang, their stacks
    return Cell(family, axis, kind, difference, reason, round(time.monotonic() - began, 1), tolerance)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="*", help="by their model_type, or kinds of models; all without")
    parser.add_argument("--axes", nargs="+", choices=EVERY, default=list(EVERY), metavar="AXIS")
    parser.add_argument("--keep", type=Path, default=ROOT / "build" / "zoo.jsonl", help="results, a JSON object a line")
    parser.add_argument("--again", action="store_true", help="measure what is there already too")
    parser.add_argument("--write", action="store_true", help="write docs/zoo.md and docs/zoo.json")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    os.environ.update(PYTHONWARNINGS="ignore", TRANSFORMERS_VERBOSITY="error")  # of ranks
    known = [*causal_families(), *KINDS]
    unknown = sorted(set(options.families) - set(known))
    if unknown:
        parser.error(f"no causal families of transformers, and no kinds: {', '.join(unknown)}")
    options.keep.parent.mkdir(parents=True, exist_ok=True)
    cells = kept(options.keep)
    for number, family in enumerate(options.families or known):
        for axis in options.axes:
            if axis not in axes_of(family):
                continue
            if (family, axis) in cells and not options.again:
                continue
            cell = cells[family, axis] = tried(family, axis)
            with options.keep.open("a", encoding="utf-8") as file:
                file.write(cell.line() + "\n")
            mark = "" if cell.is_right else "  <- WRONG"
            shown = cell.reason[:120] if cell.difference is None else f"{cell.difference:.1e}"
            print(f"{family:24}{axis:14}{cell.kind:9}{cell.seconds:5.1f} s  {shown}{mark}", flush=True)
        if number % 20 == 19:
            close_pools()  # gloo keeps a thread for every group that a rank ever had
    close_pools()
    chosen = [cell for cell in cells.values() if cell.axis in options.axes]
    print(f"{len(cells)} cells, {sum(not cell.is_right for cell in chosen)} of these axes wrong")
    if options.write:
        write(ROOT / "docs", causal_families(), list(KINDS), list(TOWERS), cells)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
