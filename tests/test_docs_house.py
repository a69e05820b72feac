"""What CONTRIBUTING and the architecture say of the house is so."""

from __future__ import annotations

import configparser
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from nemo_dist_conf.names import STRATEGY_NAMES
from nemo_dist_conf.topology.axes import AXES

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nemo_dist_conf"
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()


def rows(text: str, header: str) -> list[list[str]]:
    """The cells of the table under this header, row by row."""
    after = text.partition(f"\n{header}\n")[2].splitlines()
    lines = [line for line in after[: after.index("") if "" in after else len(after)] if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]*)`", cell)


def test_the_table_of_layers_is_the_linters() -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    lines = config["importlinter:contract:layers"]["layers"].split("\n")
    layers = [re.findall(r"\w+", line) for line in lines if line.strip()]
    table = rows((ROOT / "docs" / "architecture.md").read_text(), "| layer | what it holds |")
    assert [names(layer) for layer, _ in table] == layers


def test_the_folders_of_the_runtime_are_all_described() -> None:
    table = rows((ROOT / "docs" / "architecture.md").read_text(), "| folder | what it does |")
    folders = {path.parent.relative_to(ROOT / "nemo_dist_conf") for path in PACKAGE.glob("runtime/*/__init__.py")}
    assert {name for folder, _ in table for name in names(folder)} == {str(folder) for folder in folders}


COUNTS = {row[0]: row for row in rows(CONTRIBUTING, "| kind | files of its own | lines elsewhere | files |")}


def test_something_of_each_kind_is_counted() -> None:
    assert list(COUNTS) == ["strategy", "family", "schedule", "technique", "axis"]


@pytest.mark.parametrize("kind", COUNTS)
def test_files_to_touch_are_counted_and_are_there(kind: str) -> None:
    """Files of its own by what is there of the kind already: every strategy has all of them."""
    _, own, elsewhere, count = COUNTS[kind]
    assert int(count) == len(names(own) + names(elsewhere))
    assert [path for path in names(elsewhere) if not (PACKAGE / path).is_file()] == []
    for path in names(own):
        assert (PACKAGE / path).parent.is_dir(), path
        if kind == "strategy":
            made = [PACKAGE / path.replace("<name>", strategy) for strategy in STRATEGY_NAMES]
            assert [str(file) for file in made if not file.is_file()] == []


def test_an_axis_touches_every_file_that_names_all_of_them() -> None:
    _, own, elsewhere, _ = COUNTS["axis"]
    sources = {str(path.relative_to(PACKAGE)): path.read_text() for path in PACKAGE.rglob("*.py")}
    named = {
        axis: {
            path
            for path, text in sources.items()
            if re.search(rf'\b{axis}_size\b|\bA\.{axis.upper()}\b|"{axis}"', text)
        }
        for axis in ("tp", "cp", "ep")
    }
    assert named["tp"] & named["cp"] & named["ep"] <= set(names(elsewhere))
    assert set(names(elsewhere)) <= named["tp"] | named["cp"] | named["ep"]


def test_setting_up_is_what_the_readme_sets_up() -> None:
    readme = (ROOT / "README.md").read_text()
    found = re.search(r"<!-- command: test -->\n```bash\n(.*?) && \.venv/bin/python -m pytest", readme)
    assert found is not None and found[1] in CONTRIBUTING


def test_the_glossary_is_sorted_and_has_every_axis_and_strategy() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text()
    terms = re.findall(r"^\*\*(.*?)\*\*: \S", text, re.MULTILINE)
    assert terms == sorted(set(terms), key=str.lower) and len(terms) == text.count("\n\n**")
    assert all(axis.size_field in text or f"({axis.name})" in text for axis in AXES)
    assert all(f"`{strategy}`" in text for strategy in STRATEGY_NAMES)


def test_ci_runs_what_everybody_can_run() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def end_of_file() -> Any:
    """The module of the hook."""
    spec = importlib.util.spec_from_file_location("end_of_file", ROOT / ".ci" / "end_of_file.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_hooks_need_nothing_that_is_not_here() -> None:
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert {repo["repo"] for repo in repos} == {"local"}
    hooks = [hook for repo in repos for hook in repo["hooks"]]
    assert {hook["language"] for hook in hooks} == {"system"}
    assert [hook["entry"].split()[:4] for hook in hooks[:2]] == [
        ["python", "-m", "ruff", "format"],
        ["python", "-m", "ruff", "check"],
    ]
    assert (ROOT / hooks[2]["entry"].split()[1]).is_file()


@pytest.mark.parametrize(
    "text, right",
    [("a\n", "a\n"), ("a", "a\n"), ("a\n\n\n", "a\n"), ("a \n\tb\t\n", "a\n\tb\n"), ("", "")],
    ids=["right", "no end", "empty lines", "spaces", "empty"],
)
def test_the_hook_for_ends_of_files(tmp_path: Path, text: str, right: str) -> None:
    (tmp_path / "page.md").write_text(text)
    assert end_of_file().main([str(tmp_path / "page.md")]) == int(text != right)
    assert (tmp_path / "page.md").read_text() == right


def test_pages_and_settings_end_as_the_hook_says(tmp_path: Path) -> None:
    folders = [ROOT, *(ROOT / name for name in ("docs", "conf", "examples", "benchmarks"))]
    found = [path for folder in folders for path in folder.glob("*" if folder == ROOT else "**/*") if path.is_file()]
    for path in found:
        if path.suffix in (".md", ".yaml", ".yml", ".toml", ".cfg", ".txt", ".in"):
            copy = tmp_path / path.name
            copy.write_text(path.read_text())
            assert end_of_file().main([str(copy)]) == 0, path
