"""One row a family: found by its name, imported alone, and of other packages only where we have none."""

from __future__ import annotations

import dataclasses
import importlib
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import nemo_dist_conf.families
from nemo_dist_conf.families.registry import FAMILY_NAMES, families, find_family

ROOT = Path(__file__).resolve().parents[2]


def test_every_row_of_the_folder_is_in_the_registry_under_its_own_name() -> None:
    names = [module.name for module in pkgutil.iter_modules(nemo_dist_conf.families.__path__)]
    modules = {name: importlib.import_module(f"nemo_dist_conf.families.{name}") for name in names}
    rows = {name: module.FAMILY.name for name, module in modules.items() if hasattr(module, "FAMILY")}
    assert rows == {name: name for name in FAMILY_NAMES}
    assert [family.name for family in families()] == list(FAMILY_NAMES)


@pytest.mark.parametrize("name", [family.name for family in families() if family.shapes is not None])
def test_the_fields_of_a_row_are_those_of_its_config(name: str) -> None:
    """Names that a row gives to sizes and switches exist, and are told from misspelt ones."""
    from transformers import AutoConfig

    family = find_family(name)
    assert family is not None
    config = AutoConfig.for_model(name)
    meant = {value for value in dataclasses.asdict(family.fields).values() if isinstance(value, str) and value}
    # Some configs do not hold a head's width, and their attention takes it where it is given.
    assert [field for field in meant - {"head_dim"} if not hasattr(config, field)] == []
    assert meant | set(family.fields.other_names) <= family.config_fields


def test_a_family_of_ours_is_imported_alone_and_no_entry_points_are_read() -> None:
    script = """
import sys
from nemo_dist_conf.composition.check import check
tree = {"strategy": {"_target_": "nemo_dist_conf.FSDP2Config"}}
sys.addaudithook(lambda event, args: event == "os.scandir" and print("scandir", end=" "))
check({**tree, "model": {"config": {"model_type": "llama", "num_attention_heads": 4}}}, 2)
print(*sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    rows = {name for name in FAMILY_NAMES if f"nemo_dist_conf.families.{name}" in loaded}
    assert rows == {"llama"}
    assert not {"scandir", "importlib.metadata", "torch"} & loaded


def put(folder: Path, entry: str) -> None:
    """A package named greedy that adds a family."""
    metadata = folder / "greedy-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: greedy\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[nemo_dist_conf.families]\n{entry}\n")


def test_a_package_cannot_take_the_name_of_a_family_of_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llama = find_family("llama")
    put(tmp_path, "llama = greedy:FAMILY")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_family("llama") is llama and caplog.messages == []
    assert find_family("of_tomorrow") is None
    assert "the family llama that the package greedy adds has the name of one" in caplog.text
    assert [family.name for family in families()] == list(FAMILY_NAMES)


def test_a_row_that_cannot_be_loaded_is_told_on_the_command_line_without_a_traceback(tmp_path: Path) -> None:
    put(tmp_path, "of_tomorrow = greedy:FAMILY")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT)))}
    command = [sys.executable, "-m", "nemo_dist_conf.plan", "model.config.model_type=of_tomorrow"]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (
        "the family of_tomorrow that the package greedy adds cannot be loaded: "
        "ModuleNotFoundError: No module named 'greedy'\n"
        "  asked    entry point of_tomorrow = greedy:FAMILY in the group nemo_dist_conf.families\n"
        "  allowed  a package that can be imported\n"
        "  type     pip uninstall greedy\n"
    )
