"""The zoo's harness: it tells what is equal, what is refused, and what is wrong."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Iterator
from unittest import mock

import pytest

from tests.dist import kinds, layouts
from tests.tiny_configs import causal_families
from tests.zoo.axes import AXES
from tests.zoo.cell import TOLERANCE, measure, reference
from tests.zoo.table import KINDS, Cell, page

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(
    ("family", "axis", "refused"),
    [
        ("llama", "fsdp2", None),
        ("llama", "pp", None),
        ("llama", "ep", "has no experts that can be split"),
        ("qwen3_moe", "fsdp2", None),
        ("qwen3_moe", "pp", None),
        ("qwen3_moe", "ep", None),
    ],
)
def test_a_cell_is_equal_or_refused(family: str, axis: str, refused: str | None) -> None:
    outcome = measure(family, AXES[axis])
    assert outcome.kind == ("refused" if refused else "equal"), outcome
    assert refused is None or refused in outcome.reason


@contextlib.contextmanager
def clipped_wrongly() -> Iterator[None]:
    """Ranks that clip at another norm than one process."""
    clip = layouts.clip_grad_norm_
    with mock.patch.object(layouts, "clip_grad_norm_", lambda model, norm: clip(model, 1.01 * norm)):
        yield


@contextlib.contextmanager
def killed() -> Iterator[None]:
    raise RuntimeError("first\nlast")
    yield


def test_what_is_wrong_is_told() -> None:
    wrong = measure("llama", dataclasses.replace(AXES["fsdp2"], around=clipped_wrongly))
    assert wrong.kind == "different" and wrong.difference > 100 * TOLERANCE
    died = measure("llama", dataclasses.replace(AXES["fsdp2"], around=killed))
    assert died.kind == "died" and "last" in died.reason


def test_the_reference_moves_every_weight_that_is_used() -> None:
    want = reference("llama")
    assert all(not want.before[name].equal(value) for name, value in want.after.items())


def test_no_kind_is_called_like_a_family() -> None:
    """Their cells are told by name."""
    assert not set(kinds.KINDS) & set(causal_families())


def test_the_page_counts_each_cell_and_names_each_reason_once() -> None:
    cells = [
        Cell("a", "dp", "equal", 2e-7, "", 0.5),
        Cell("a", "tp", "refused", None, "no plan asked parallelism.tp_size=2", 0.1),
        Cell("b", "tp", "refused", None, "no plan asked strategy.sequence_parallel=true", 0.1),
        Cell("b", "dp", "wrong", 0.25, "", 0.5),
        Cell("b", "pp", "wrong", None, "", 0.5),
        Cell("b", "cp", "error", None, "KeyError: 'x'", 0.5),
    ]
    text = page(["a", "b"], [], [], {(cell.family, cell.axis): cell for cell in cells})
    assert f"6 of {2 * len(AXES)} cells measured, {2 * len(AXES) - 6} not yet" in text
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("|")}
    assert rows["tp"] == "| tp | 0 | 2 | 0 | 0 | 0 | 0 |" and rows["dp"] == "| dp | 1 | 0 | 1 | 0 | 0 | 0 |"
    assert len(KINDS) == 5
    assert rows["a"].startswith("| a | 2e-07 |") and "| r1 |" in rows["a"]
    assert all(told in rows["b"] for told in ("**wrong** 2e-01", "**wrong** nan", "**error** 2", "| r1 |"))
    assert "- b, dp: wrong, difference 0.25" in text and "- b, cp: error, KeyError: 'x'" in text
    assert text.count("no plan") == 1 and "parallelism.tp_size" not in text
