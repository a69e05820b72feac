"""Every command in the README and the guides runs as written, and every refusal shown is the one that comes.

A block ```bash is run in an empty folder; after the comment <!-- refused --> it must fail with the text of the block
```text that follows. The two lines after <!-- command: ... --> set up environments: CI and the install tests run them.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^>]*?) -->\n)?```bash\n(?P<lines>.*?)```(?:\n+```text\n(?P<shown>.*?)```)?", re.DOTALL
)
INTERPRETERS = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone"]}


class Command(NamedTuple):
    page: str
    line: str
    refused: str | None


def commands() -> list[Command]:
    found = []
    for page in PAGES:
        for block in BLOCK.finditer(page.read_text()):
            mark = block["mark"] or ""
            if mark.startswith("command:"):
                continue
            shown = block["shown"] if mark == "refused" else None
            found += [Command(page.name, line, shown) for line in block["lines"].strip().splitlines()]
    return found


def test_the_pages_hold_commands_and_every_command_block_is_understood():
    assert len(commands()) >= 10
    for page in PAGES:
        text = page.read_text()
        assert text.count("```bash") == len(BLOCK.findall(text))


@pytest.mark.parametrize("command", commands(), ids=lambda c: f"{c.page}: {c.line}")
@pytest.mark.slow
def test_it_runs(command, tmp_path):
    program, *words = shlex.split(command.line)
    done = subprocess.run(
        [*INTERPRETERS[program], *words], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    if command.refused is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        assert done.stderr == command.refused


def test_the_two_setup_lines_are_one_line_each():
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"<!-- command: (\w+) -->\n```bash\n(.*?)```", text, re.DOTALL)
    assert [name for name, _ in found] == ["train", "test"]
    assert all(lines.strip().count("\n") == 0 for _, lines in found)


def test_links_in_the_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
