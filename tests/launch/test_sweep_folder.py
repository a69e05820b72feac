"""A sweep's folder belongs to one sweep at a time, and a refused sweep leaves it as it was."""

import re

import pytest
from hydra.core.utils import setup_globals
from omegaconf import OmegaConf

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.launch.sweep_folder import SweepFolder


@pytest.fixture(autouse=True)
def _now_is_known():
    setup_globals()


def config(where):
    made = OmegaConf.create({"hydra": {"sweep": {"dir": str(where)}}})
    OmegaConf.set_struct(made, True)
    return made


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_folder_is_made_and_claimed(tmp_path):
    where = tmp_path / "a" / "b"
    assert SweepFolder(config(where), None).path == where
    assert files(where) == ["sweep.jsonl"]


def test_a_second_sweep_in_a_folder_by_name_is_refused_until_the_first_ends(tmp_path):
    first = SweepFolder(config(tmp_path), None)
    with pytest.raises(ConfigError, match="another sweep is running in") as error:
        SweepFolder(config(tmp_path), None)
    assert error.value.type == f"hydra.sweep.dir={tmp_path}_2"
    del first
    assert SweepFolder(config(tmp_path), None).path == tmp_path


def test_sweeps_of_the_same_second_get_folders_of_their_own(tmp_path):
    configs = [config(f"{tmp_path}/${{now:%Y}}") for _ in range(3)]
    folders = [SweepFolder(one, None) for one in configs]
    names = [folder.path.name for folder in folders]
    assert re.fullmatch(r"\d{4}", names[0]) and names[1:] == [f"{names[0]}_2", f"{names[0]}_3"]
    assert [one.hydra.sweep.dir for one in configs] == [str(folder.path) for folder in folders]


def test_a_sweep_that_has_ended_within_the_second_keeps_its_folder(tmp_path):
    ended = SweepFolder(config(f"{tmp_path}/${{now:%Y}}"), None)
    (ended.path / "sweep.jsonl").write_text("record\n")
    name = ended.path.name
    del ended
    assert SweepFolder(config(f"{tmp_path}/${{now:%Y}}"), None).path.name == f"{name}_2"


def test_records_of_earlier_sweeps_in_a_folder_by_name_are_kept_aside(tmp_path):
    for text in ("first\n", "second\n"):
        SweepFolder(config(tmp_path), None)
        (tmp_path / "sweep.jsonl").write_text(text)
    third = SweepFolder(config(tmp_path), None)
    assert [(tmp_path / name).read_text() for name in files(tmp_path)] == ["first\n", "second\n", ""]
    with pytest.raises(ConfigError):  # it still holds the folder
        SweepFolder(config(tmp_path), None)
    del third


def test_resuming_takes_the_folder_over_with_its_records(tmp_path):
    (tmp_path / "sweep.jsonl").write_text("record\n")
    made = config("elsewhere")
    folder = SweepFolder(made, str(tmp_path))
    assert folder.path == tmp_path and made.hydra.sweep.dir == str(tmp_path)
    assert (tmp_path / "sweep.jsonl").read_text() == "record\n"
    with pytest.raises(ConfigError, match="still running") as error:
        SweepFolder(config("elsewhere"), str(tmp_path))
    assert error.value.type == "hydra.launcher.resume=null"


def test_a_refused_sweep_leaves_nothing(tmp_path):
    folder = SweepFolder(config(tmp_path / "day" / "hour"), None)
    (folder.path / "multirun.yaml").write_text("by Hydra's sweeper")
    folder.forget()
    assert files(tmp_path) == []


def test_a_refused_sweep_leaves_the_folders_that_were_there(tmp_path):
    (tmp_path / "day" / "empty").mkdir(parents=True)
    (tmp_path / "day" / "kept.txt").write_text("mine")
    for name in ("day", "day/empty"):
        SweepFolder(config(tmp_path / name), None).forget()
        assert files(tmp_path) == ["day", "day/empty", "day/kept.txt"]


def test_a_refused_sweep_leaves_the_records_of_the_one_before(tmp_path):
    before = {"multirun.yaml": "before", "sweep.jsonl": "record\n", "sweep.md": "table"}
    for name, text in before.items():
        (tmp_path / name).write_text(text)
    folder = SweepFolder(config(tmp_path), None)
    (tmp_path / "multirun.yaml").write_text("by Hydra's sweeper")
    folder.forget()
    assert {name: (tmp_path / name).read_text() for name in files(tmp_path)} == before


def test_a_resumed_sweep_that_is_refused_keeps_its_records(tmp_path):
    (tmp_path / "multirun.yaml").write_text("words")
    (tmp_path / "sweep.jsonl").write_text("record\n")
    SweepFolder(config("elsewhere"), str(tmp_path)).forget()
    assert files(tmp_path) == ["multirun.yaml", "sweep.jsonl"]
