"""The plan against the wrapped model for every layout of the parity matrix: ``python -m tests.plan.matrix``.

Bytes of parameters, gradients and optimizer state on every rank, and every collective of a step, by kind, size and
number. Writes docs/plan_checks.md.

    python -m tests.plan.matrix --ranks 2 4    those of so many ranks only, and no page
"""

from __future__ import annotations

import argparse
import platform
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from tests.dist.layouts import ADAMW
from tests.dist.matrix import LENGTH, Layout, layouts, model_of
from tests.dist.pool import close_pools, run_ranks
from tests.plan.fake import fake_rank
from tests.plan.measure import differences, job_for, seen_of_rank

__all__ = ["check_fake", "check_real", "needs_all_ranks", "words_of"]

PAGE = Path(__file__).parents[2] / "docs" / "plan_checks.md"


def words_of(layout: Layout) -> list[str]:
    return ["strategy.mp_policy=null", *layout.words]


def needs_all_ranks(layout: Layout) -> bool:
    """Stages send to one another; a plan of tensor parallelism that has to be tried needs the others' values."""
    return layout.pp > 1 or (layout.tp > 1 and layout.ep > 1)


def check_real(layout: Layout, rows: int = 16) -> list[str]:
    """What differs, on real gloo ranks, all of them."""
    words, model = words_of(layout), model_of(layout)
    job = job_for(words, layout.ranks, model["config"], ADAMW, rows, LENGTH)
    found = run_ranks(layout.ranks, seen_of_rank, words, model, ADAMW, LENGTH, rows, timeout_s=300)
    return [text for seen in found for text in differences(job, seen)]


def check_fake(layout: Layout, rows: int = 16) -> list[str]:
    """What differs, on the first and the last rank, each alone with fake peers. Not where all ranks are needed."""
    words, model = words_of(layout), model_of(layout)
    job = job_for(words, layout.ranks, model["config"], ADAMW, rows, LENGTH)
    arguments = (words, model, ADAMW, LENGTH, rows)
    found = []
    for rank in (0, layout.ranks - 1):
        close_pools()  # torch remembers meshes of a fake group that is gone
        seen = run_ranks(1, seen_of_fake_rank, rank, layout.ranks, *arguments)[0]
        found += list(differences(job, seen))
    return found


def seen_of_fake_rank(rank: int, ranks: int, *arguments: Any) -> dict[str, Any]:
    with fake_rank(rank, ranks):
        return seen_of_rank(*arguments)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.plan.matrix", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=None)
    chosen = parser.parse_args().ranks
    began, wrong, rows = time.monotonic(), 0, []
    for ranks in chosen or (2, 4, 8):
        for number, layout in enumerate(layouts(ranks), 1):
            found = check_real(layout) if needs_all_ranks(layout) else check_fake(layout)
            wrong += bool(found)
            how = "all ranks, gloo" if needs_all_ranks(layout) else "first and last rank, fake process group"
            rows.append((ranks, layout, how))
            said = "differs" if found else "equal"
            print(f"{ranks} ranks  {layout!s:40}  {layout.schedule or '':24}{said}", flush=True)
            for text in found:
                print(f"    {text}", flush=True)
            if number % 4 == 0:
                close_pools()
    print(f"{len(rows)} layouts, {wrong} differ")
    if chosen is None and not wrong:
        PAGE.write_text(_page(rows, time.monotonic() - began), encoding="utf-8")
    return 1 if wrong else 0


def _page(rows: list[tuple[int, Layout, str]], seconds: float) -> str:
    lines = [
        "# The plan against the wrapped model",
        "",
        "For every layout of [the parity matrix](parity.md): bytes of parameters, gradients and optimizer state "
        "(AdamW), and kind, size and number of every collective of a step's forward and backward, as torch counts them "
        "(CommDebugMode, and a dispatch mode for sizes), against `nemo_dist_conf.plan`. No byte and no call differs.",
        "",
        f"{len(rows)} layouts, torch {torch.__version__}, CPU ({platform.machine()}), {date.today()}, "
        f"{seconds / 60:.0f} minutes: `python -m tests.plan.matrix`.",
        "",
        "| ranks | layout | schedule | checked on |",
        "|---|---|---|---|",
    ]
    lines += [f"| {ranks} | {layout} | {layout.schedule or ''} | {how} |" for ranks, layout, how in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
