"""The documentation as a site: it builds with no link astray, and its reference has every public name and option."""

from __future__ import annotations

import dataclasses
import importlib
import os
import re
import shutil
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from nemo_dist_conf.schema import MoEConf, ParallelismConf, PipelineConf
from nemo_dist_conf.strategies import STRATEGIES

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PUBLIC = [
    "nemo_dist_conf.checkpoint",
    "nemo_dist_conf.config",
    "nemo_dist_conf.errors",
    "nemo_dist_conf.gradients",
    "nemo_dist_conf.mesh",
    "nemo_dist_conf.pipelining",
    "nemo_dist_conf.plan",
]


def build(folder: Path, target: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    quiet = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=folder, env=quiet, capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site, which every link in it has been followed for."""
    target = tmp_path_factory.mktemp("site")
    done = build(ROOT, target)
    assert done.returncode == 0, done.stdout + done.stderr
    return target


def described(site: Path) -> set[str]:
    """Full names that the reference describes, from the inventory that other sites link by."""
    raw = (site / "objects.inv").read_bytes()
    lines = zlib.decompress(raw.split(b"\n", 4)[4]).decode().splitlines()
    return {line.split(" ", 1)[0] for line in lines}


def test_every_page_of_the_repository_is_in_the_site(site: Path) -> None:
    pages = ["CONTRIBUTING.md", "CHANGELOG.md", *(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/**/*.md"))]
    assert [page for page in pages if not (site / page[: -len(".md")] / "index.html").exists()] == []
    assert "Distributed training of PyTorch models" in (site / "index.html").read_text()


def test_no_markup_is_left_in_the_text_of_a_page(site: Path) -> None:
    """Lists, tables, code and emphasis that GitHub shows are shown here too."""
    for path in site.rglob("index.html"):
        article = re.search(r"<article.*?</article>", path.read_text(), re.DOTALL)
        assert article is not None, path
        text = re.sub(r"<[^>]*>", "", re.sub(r"<(pre|code)\b.*?</\1>", "", article[0], flags=re.DOTALL))
        assert [mark for mark in ("```", "](", "**", "\n- ", "\n| ") if mark in text] == [], path


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_is_in_the_reference(site: Path, module: str) -> None:
    """Where a function has its module's name, as search, the reference names it there."""
    known = described(site)
    names = importlib.import_module(module).__all__
    assert [name for name in names if not {f"{module}.{name}", f"{module}.{name}.{name}"} & known] == []


def test_every_name_of_the_package_is_in_the_reference(site: Path) -> None:
    import nemo_dist_conf

    last = {name.rpartition(".")[2] for name in described(site)}
    assert [name for name in nemo_dist_conf.__all__ if name not in last] == []


def test_every_option_of_a_group_is_shown_with_its_help(site: Path) -> None:
    page = (site / "docs/reference/groups/index.html").read_text()
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]*>|&[#\w]+;", " ", page))
    for schema in (*(strategy.schema for strategy in STRATEGIES), ParallelismConf, PipelineConf, MoEConf):
        for field in dataclasses.fields(schema):
            assert f"{schema.__module__}.{schema.__name__}.{field.name}" in described(site), field.name
            words = re.findall(r"\w+", field.metadata["help"])
            assert " ".join(words[:3]) in re.sub(r"[^\w]+", " ", text), (schema.__name__, field.name)


def test_arguments_are_listed_value_by_value(site: Path) -> None:
    page = (site / "docs/reference/python/index.html").read_text()
    assert re.search(
        r"<li>\s*<p>\s*<strong>blocks</strong>: path of the model|<li><strong>blocks</strong>: path of", page
    )


def test_a_link_that_leads_nowhere_is_an_error(tmp_path: Path) -> None:
    """To a page, to a heading, to a folder that is not there; in a copy without the reference, which takes longest."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("reference", "__pycache__"))
    for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks", "examples", "tests", "nemo_dist_conf"):
        (tmp_path / name).symlink_to(ROOT / name)
    settings = (ROOT / "mkdocs.yml").read_text()
    (tmp_path / "mkdocs.yml").write_text(settings.replace("  - Reference: docs/reference/*.md\n", ""))
    wrong = ("launchin.md", "launching.md#no-such-heading", "../../no_such_folder")
    with (tmp_path / "docs" / "guides" / "slurm.md").open("a") as page:
        page.write("\n" + " ".join(f"[text]({link})" for link in (*wrong, "launching.md#a-single-run")) + "\n")
    done = build(tmp_path, tmp_path / "site")
    warnings = [line for line in (done.stdout + done.stderr).splitlines() if "WARNING" in line]
    assert done.returncode != 0
    assert len(warnings) == len(wrong) and all(any(f"'{link}'" in line for line in warnings) for link in wrong)
