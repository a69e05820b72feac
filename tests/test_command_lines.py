"""Every command line of the table has exactly the outcome of the golden file, and what it says to type works."""

import re
import shlex
from pathlib import Path

import pytest

from tests.command_lines import COMMAND_LINES, outcome

GOLDEN = Path(__file__).parent / "golden" / "command_lines.txt"


def _expected() -> dict[tuple[int, str], str]:
    entries = re.split(r"^\$ ", GOLDEN.read_text(), flags=re.MULTILINE)[1:]
    table = {}
    for entry in entries:
        head, _, text = entry.partition("\n")
        world, line = re.fullmatch(r"\[(\d+)\] (.*)", head).groups()
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
            assert problem.what and problem.asked and problem.allowed and problem.type


REFUSED = [
    (world_size, line)
    for world_size, line in COMMAND_LINES
    if "\n  type  " in EXPECTED[world_size, line]
]


@pytest.mark.parametrize(("world_size", "line"), REFUSED)
def test_what_it_says_to_type_works(world_size, line):
    """Put the words of each ``type`` line in the place of those asked, as a user would, until nothing is refused."""
    words = shlex.split(line)
    for _ in range(10):
        text, error = outcome(world_size, shlex.join(words))
        if error is None:
            break
        problem = error.problems[0]
        instead = problem.type
        started = re.match(r"torchrun --nproc-per-node (\d+) app\.py (.*)", instead)
        if started:
            world_size, instead = int(started[1]), started[2]
        replaced = {_key(word) for word in [*shlex.split(problem.asked), *shlex.split(instead)]}
        words = [word for word in words if _key(word) not in replaced]
        if any(word.startswith("strategy=") for word in shlex.split(instead)):  # its options go with the old strategy
            words = [word for word in words if not word.startswith("strategy.")]
        words += [word for word in shlex.split(instead) if not word.startswith("~")]
    assert text.startswith("runs: "), text


def _key(word: str) -> str:
    key = word.lstrip("+~").partition("=")[0]
    return {"pipeline.pp_schedule": "pipeline"}.get(key, key)
