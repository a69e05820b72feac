"""A run that is killed again and again ends with the weights and the numbers of one that nobody disturbed."""

from __future__ import annotations

import re

import pytest

from tests.checkpoint.faults import EVERY, REPORT, disturb

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(600)]


def test_kills_cost_no_more_than_the_steps_since_the_last_checkpoint() -> None:
    """The full test, 100 kills: python -m tests.checkpoint.faults."""
    tally = disturb(kills=5, seed=7)
    assert not tally.wrong, "\n".join(tally.wrong)
    assert tally.kills == 5 and tally.runs >= 1 and tally.lost and max(tally.lost) <= EVERY


def test_the_committed_report_is_of_a_hundred_kills_without_a_finding() -> None:
    text = REPORT.read_text()
    assert re.search(r"^1\d\d kills", text, re.MULTILINE)
    assert re.search(r"differ in any bit \| 0 \|", text)
