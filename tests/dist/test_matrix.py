"""The parity matrix: a part of it is run, and the table of the whole misses no layout that the rules allow."""

from __future__ import annotations

import re

import pytest

from tests.dist.matrix import RANKS, TABLE, TOLERANCE, Layout, layouts, run, table

pytestmark = pytest.mark.dist

#: All of two ranks; of four, each pipeline with one schedule. The others have tests of their own on four ranks.
REDUCED = [*layouts(2), *(layout for layout in layouts(4) if layout.schedule == "interleaved_1f1b")]


@pytest.mark.parametrize("layout", REDUCED, ids=[f"{row} {row.schedule or ''}".strip() for row in REDUCED])
def test_equals_one_process(layout: Layout) -> None:
    assert run(layout) < TOLERANCE


def _rows() -> list[tuple[int, str, str, float]]:
    found = re.findall(r"^\| (\d+) \| (.+?) \| (\w*) ?\| (\S+) \|$", TABLE.read_text(encoding="utf-8"), re.MULTILINE)
    return [(int(ranks), layout, schedule, float(off)) for ranks, layout, schedule, off in found]


def test_the_table_holds_every_allowed_layout_and_each_equals_one_process() -> None:
    allowed = [(layout.ranks, str(layout), layout.schedule or "") for ranks in RANKS for layout in layouts(ranks)]
    assert [row[:3] for row in _rows()] == allowed
    assert len(allowed) > 150
    assert all(0 <= off < TOLERANCE for *_, off in _rows())


def test_a_table_says_what_was_found() -> None:
    rows = {Layout(pp=2, schedule="1f1b"): 2e-7, Layout(tp=2, sequence=True): 3e-6}
    text = table(rows, 90)
    assert "| 2 | pp 2 | 1f1b | 2.0e-07 |" in text and "| 2 | tp 2 + sp |  | 3.0e-06 |" in text
    assert "Worst difference 3.0e-06" in text and "2 layouts" in text
