"""Every command in the README and the guides runs as written, and every refusal shown is the one that comes.

The lines of a block ```bash are run one after the other in a folder with the files that the page shows; after the
comment <!-- refused --> the last one must fail with the text of the block ```text that follows. The two lines after
<!-- command: ... --> set up environments: CI and the install tests run them.
"""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import warm

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:<!-- (?P<mark>[^>]*?) -->\n)?```bash\n(?P<lines>.*?)```(?:\n+```text\n(?P<shown>.*?)```)?", re.DOTALL
)
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
INTERPRETERS = {"python": [sys.executable], "torchrun": TORCHRUN}


class Block(NamedTuple):
    page: str
    lines: list[str]
    refused: str | None


def blocks() -> list[Block]:
    found = []
    for page in PAGES:
        for block in BLOCK.finditer(page.read_text()):
            mark = block["mark"] or ""
            if mark.startswith("command:"):
                continue
            shown = block["shown"] if mark == "refused" else None
            found.append(Block(page.name, block["lines"].strip().splitlines(), shown))
    return found


def test_the_pages_hold_commands_and_every_command_block_is_understood():
    assert len(blocks()) >= 10
    for page in PAGES:
        text = page.read_text()
        assert text.count("```bash") == len(BLOCK.findall(text))


def write_files(page: str, folder: Path) -> None:
    """What a page shows as a file, which is a block with its path in the first line."""
    text = next(path for path in PAGES if path.name == page).read_text()
    for path, rest in re.findall(r"^```yaml\n# (\S+\.yaml)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(rest)


def run(line: str, folder: Path, fresh: bool) -> subprocess.CompletedProcess[str]:
    program, *words = shlex.split(line)
    if "nemo_dist_conf.train" in words and not fresh and not any("=submitit" in word for word in words):
        return warm.run([program, *words], cwd=folder)
    return subprocess.run([*INTERPRETERS[program], *words], cwd=folder, capture_output=True, text=True, timeout=240)


@pytest.mark.parametrize("block", blocks(), ids=lambda block: f"{block.page}: {block.lines[-1]}")
@pytest.mark.slow
def test_it_runs(block, tmp_path):
    """In a fresh interpreter: the README's first run under torchrun, and what is refused, which needs no torch."""
    first = block.page == "README.md" and block.lines[0].startswith("torchrun ")
    write_files(block.page, tmp_path)
    for line in block.lines:
        done = run(line, tmp_path, fresh=first or block.refused is not None or "--cfg" in line)
        if block.refused is not None and line == block.lines[-1]:
            assert done.returncode != 0
            assert done.stderr == block.refused
        else:
            assert done.returncode == 0, done.stderr


def test_the_two_setup_lines_are_one_line_each():
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"<!-- command: (\w+) -->\n```bash\n(.*?)```", text, re.DOTALL)
    assert [name for name, _ in found] == ["train", "test"]
    assert all(lines.strip().count("\n") == 0 for _, lines in found)


def test_what_the_code_refers_to_is_there():
    """Pages of the docs, results of the benchmarks and tests that a comment or docstring names."""
    for file in (ROOT / "nemo_dist_conf").rglob("*.py"):
        for found in re.finditer(r"\b(docs|benchmarks|tests)/[\w./-]*\w(, (test_\w+))?", file.read_text()):
            path, name = found[0].partition(",")[0], found[3]
            exact = [ROOT / path, *ROOT.glob(f"{path}*")]  # decisions are named by their number
            assert any(place.exists() for place in exact), f"{file.name}: {path}"
            assert name is None or f"def {name}(" in (ROOT / path).read_text(), f"{file.name}: {path}, {name}"


def test_the_messages_that_troubleshooting_explains_are_still_given():
    """But for the names and numbers in them."""
    text = (ROOT / "docs" / "guides" / "troubleshooting.md").read_text()
    source = "".join(file.read_text() for file in sorted((ROOT / "nemo_dist_conf").rglob("*.py")))
    for message in re.findall(r"^\*\*`([^`]*)`\.\*\*", text, re.MULTILINE):
        for words in re.split(r"\w*\(\)|'\d+'|\d+|pp_size|^settings", message):
            assert words.strip() in source, message


def test_links_in_the_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
