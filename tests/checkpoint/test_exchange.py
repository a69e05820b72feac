"""A checkpoint of any layout loads under any other: same bits, and the next losses of the run that saved it."""

from __future__ import annotations

import pytest

from tests.checkpoint.exchange import DENSE, EXPERTS, ODD, TABLE, Layout, exchange, worst

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize("layouts", [DENSE, EXPERTS, ODD], ids=["dense", "experts", "other numbers of ranks"])
def test_every_layout_loads_every_layouts_checkpoint(layouts: dict[str, Layout]) -> None:
    """Every pair of the smaller sets; of the dense ones three for each layout, docs/exchange.md has all."""
    all_pairs = layouts is not DENSE
    found = exchange(layouts, all_pairs)
    assert len(found) == len(layouts) ** 2 or (not all_pairs and len(found) == 3 * len(layouts))
    assert {source for source, _ in found} == {target for _, target in found} == set(layouts)
    assert not worst(found), "\n".join(worst(found))


def test_the_committed_table_is_of_these_layouts() -> None:
    text = TABLE.read_text()
    for layouts in (DENSE, EXPERTS, ODD):
        for name in layouts:
            assert f"| {name} |" in text
    assert "other bits" not in text
