"""Every command line of the table has exactly the outcome of the golden file.

What they offer is typed by test_typed_answers.py.
"""

import re
from pathlib import Path

import pytest

from tests.command_lines import COMMAND_LINES, outcome

GOLDEN = Path(__file__).parent / "golden" / "command_lines.txt"


def _expected() -> dict[tuple[int, str], str]:
    entries = re.split(r"^\$ ", GOLDEN.read_text(), flags=re.MULTILINE)[1:]
    table = {}
    for entry in entries:
        head, _, text = entry.partition("\n")
        found = re.fullmatch(r"\[(\d+)\] (.*)", head)
        assert found is not None, head
        world, line = found.groups()
        table[int(world), line] = text.strip()
    return table


EXPECTED = _expected()


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def test_the_table_and_the_golden_file_hold_the_same_lines():
    assert set(EXPECTED) == set(COMMAND_LINES)
    assert len(COMMAND_LINES) == len(set(COMMAND_LINES)) >= 60


@pytest.mark.parametrize(("world_size", "line"), COMMAND_LINES)
def test_outcome_is_the_golden_one(world_size, line):
    text, error = outcome(world_size, line)
    assert text == EXPECTED[world_size, line]
    if error is not None:
        for problem in error.problems:
            assert problem.what and problem.asked and problem.allowed and problem.instead
