"""Rows that installed packages add: found by name, imported when asked for, refused by the package's name."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import pytest

from nemo_dist_conf.entry_points import AddedRows
from nemo_dist_conf.errors import ConfigError

GROUP = "nemo_dist_conf.tested_rows"


@dataclass(frozen=True)
class Row:
    name: str


def rows(*ours: str) -> AddedRows[Row]:
    return AddedRows(GROUP, Row, "row", ours)


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a package on the path, laid out as pip installs one: a module and its metadata."""

    def put(package: str, entries: str, source: str = "") -> None:
        module, folder = package.replace("-", "_"), tmp_path / package
        metadata = folder / f"{module}-1.0.dist-info"
        metadata.mkdir(parents=True)
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (metadata / "entry_points.txt").write_text(f"[{GROUP}]\n{entries}\n")
        (folder / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(folder)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return put


def refusal(added: AddedRows[Row], name: str) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        added.find(name)
    return caught.value


def test_a_row_is_found_by_its_name_and_its_package_imported_only_then(install):
    install("a-toy", "toy = a_toy:ROW", f"from {__name__} import Row\nROW = Row('toy')")
    added = rows("ours")
    assert added.names() == ("toy",) and "a_toy" not in sys.modules
    assert added.find("other") is None and "a_toy" not in sys.modules
    assert added.find("toy") == Row("toy")


def test_a_package_that_takes_a_name_of_ours_is_left_out_and_told(install, caplog):
    install("greedy", "ours = greedy:ROW\nfree = greedy:OTHER", f"from {__name__} import Row\nOTHER = Row('free')")
    added = rows("ours", "mine")
    assert added.find("ours") is None and added.all() == [Row("free")]
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith(
        "left out: the row ours that the package greedy adds has the name of one that nemo_dist_conf"
    )
    assert f"entry point ours = greedy:ROW in the group {GROUP}" in told and "pip uninstall greedy" in told


def test_a_name_of_two_packages_is_refused_with_both_and_stands_in_nobody_elses_way(install, caplog):
    install("first", "toy = first:ROW")
    install("second", "toy = second:ROW")
    install("third", "game = third:ROW", f"from {__name__} import Row\nROW = Row('game')")
    problems = refusal(rows(), "toy").problems
    assert sorted(problem.instead for problem in problems) == ["pip uninstall first", "pip uninstall second"]
    added = rows()
    assert added.all() == added.all() == [Row("game")]
    assert caplog.text.count("left out: the row toy that the package") == 1  # told once, however often it is asked


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_module", "cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'"),
        ("", "cannot be loaded: AttributeError: module 'broken' has no attribute 'ROW'"),
        ("ROW = {'name': 'toy'}", "is dict, no Row"),
        (f"from {__name__} import Row\nROW = Row('game')", "calls itself game"),
    ],
    ids=["an import fails", "no such attribute", "no row", "another name"],
)
def test_what_cannot_be_used_is_told_by_the_packages_name(install, source, reason):
    install("broken", "toy = broken:ROW", source)
    error = refusal(rows(), "toy")
    assert error.what == f"the row toy that the package broken adds {reason}"
    assert error.instead == "pip uninstall broken"
