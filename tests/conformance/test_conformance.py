"""What people bring: each case of the suite is equal to plain torch, or refused with the reason."""

from __future__ import annotations

import re

import pytest

from tests.conformance.__main__ import TABLE, table
from tests.conformance.case import Case, Outcome, all_cases, outcome_of

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("case", [case for case in all_cases() if case.in_suite], ids=str)
def test_is_equal_or_refused(case: Case) -> None:
    outcome = outcome_of(case)
    assert outcome.is_right(case), outcome


def test_outcomes() -> None:
    def died() -> float:
        raise KeyError("gone")

    assert outcome_of(Case("a", "b", "c", lambda: 1e-6)).kind == "equal"
    assert outcome_of(Case("a", "b", "c", lambda: 1e-3)).kind == "different"
    assert outcome_of(Case("a", "b", "c", lambda: float("nan"))).kind == "different"
    assert outcome_of(Case("a", "b", "c", died)).kind == "died"
    assert not Outcome("equal", 0.0).is_right(Case("a", "b", "c", lambda: 0.0, refused="no"))


def test_the_committed_table_holds_every_case() -> None:
    text = TABLE.read_text(encoding="utf-8")
    empty = table({case: Outcome("equal", 0.0) for case in all_cases()}, 0)
    wanted = re.findall(r"^\| .+? \| .+? \| ", empty, re.MULTILINE)
    assert re.findall(r"^\| .+? \| .+? \| ", text, re.MULTILINE) == wanted
    assert "different" not in text.partition("## ")[2] and "died" not in text.partition("## ")[2]
