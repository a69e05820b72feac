"""A path that was typed means the folder in which it was typed, also in a job that runs in another one."""

import json
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from nemo_dist_conf.families.config_facts import facts_from_folder
from nemo_dist_conf.topology.schedule_file import read_schedule
from nemo_dist_conf.wording import typed_path


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job with hydra.job.chdir=true; the folder in which its command was typed."""
    folder = tmp_path / "job"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create({"hydra": {"runtime": {"cwd": str(tmp_path)}}}))
    return tmp_path


def test_a_path_of_a_job(job, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert typed_path("a/b") == job / "a" / "b"
    assert typed_path("/a/b") == Path("/a/b") and typed_path("~/a") == Path("/home/me/a")


def test_a_path_outside_a_hydra_app(tmp_path, monkeypatch):
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    monkeypatch.chdir(tmp_path)
    assert typed_path("a") == tmp_path / "a"


def test_files_that_a_config_names_are_found_from_a_job(job):
    (job / "model").mkdir()
    (job / "model" / "config.json").write_text(json.dumps({"num_hidden_layers": 3}))
    facts = facts_from_folder("model")
    assert facts is not None and facts.num_layers == 3
    (job / "schedule.csv").write_text("0F0,0B0\n")
    assert read_schedule("schedule.csv").ranks == (0,)
