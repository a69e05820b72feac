"""Ranks that composed for themselves take over rank 0's time and what it drew, and no more; or the run is refused."""

import itertools
import json
import socket
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.utils import setup_globals
from omegaconf import OmegaConf

from nemo_dist_conf.composition.agreement.config_agreement import agree_on_run
from nemo_dist_conf.composition.agreement.drawn_values import folder_of_run
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.topology.launched_ranks import Launched
from tests import warm

CONFIG = "lr: 0.1\ndrawn: ${draw:}\nnow: ${now:%H-%M-%S-%f}\nlocal: ${oc.env:LOCAL_RANK}\n"


@pytest.fixture
def agree(tmp_path, monkeypatch):
    """A rank composes and agrees, all in this process: the store that rank 0 serves stays open."""
    (tmp_path / "config.yaml").write_text(CONFIG)
    monkeypatch.chdir(tmp_path)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": ""}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    drawn = itertools.count()
    OmegaConf.register_new_resolver("draw", lambda: next(drawn))

    def agree(rank, *words, strict=True):
        with initialize_config_dir(str(tmp_path), version_base="1.3", job_name="app"):
            config = compose("config", overrides=[*words], return_hydra_config=True)
        agree_on_run(config, Launched(rank, 2, rank, "torchrun"), strict=strict)
        return config

    yield agree
    OmegaConf.clear_resolver("draw")
    setup_globals()  # ${now:...} tells the time again


def own(config):
    return {key: config[key] for key in ("lr", "drawn", "now")}


def test_all_ranks_have_rank_0s_draws_time_and_folder(agree):
    first, second = agree(0), agree(1)
    assert own(first) == own(second)
    assert folder_of_run(first) == folder_of_run(second)
    for config in (first, second):
        written = {key: config._get_node(key)._value() for key in ("local", "now")}
        assert written == {"local": "${oc.env:LOCAL_RANK}", "now": "${now:%H-%M-%S-%f}"}
        assert "${now:" in config.hydra.run._get_node("dir")._value()
    assert (first.hydra.output_subdir, second.hydra.output_subdir) == (".hydra", None)
    assert second.hydra.job_logging.handlers.file._get_node("filename")._value().endswith("${hydra.job.name}.rank1.log")


@pytest.mark.parametrize("strict", [True, False], ids=["our groups", "foreign"])
def test_a_rank_that_says_a_folder_of_its_own_keeps_it_only_without_our_groups(agree, monkeypatch, strict):
    folders = []
    for rank in (0, 1):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        config = agree(rank, "hydra.run.dir='out/${draw:}/${oc.env:LOCAL_RANK}'", strict=strict)
        folders.append(folder_of_run(config))
    first, second = folders
    assert first is not None and second is not None
    assert first.endswith("/0") and second.endswith("/0" if strict else "/1") and first[:-1] == second[:-1]
    assert config.hydra.output_subdir == (None if strict else ".hydra")


def test_one_time_holds_for_what_is_asked_later(agree):
    first, second = agree(0), agree(1)
    asked = OmegaConf.create({"now": "${now:%H-%M-%S-%f}"})
    assert asked.now == first.now == second.now


def test_different_configs_are_refused_with_the_keys(agree):
    agree(0, "+name=a")
    with pytest.raises(ConfigError, match="ranks were started with different configs") as error:
        agree(1, "lr=0.2", "+at=3")
    problem = error.value
    shown = ["at (absent on rank 0, 3 here)", "lr (0.1 on rank 0, 0.2 here)", "name (a on rank 0, absent here)"]
    assert problem.what.endswith(f": {'; '.join(shown)}")
    assert (problem.asked, problem.instead) == ("at=3 lr=0.2", "~at lr=0.1 +name=a")


def test_where_ranks_may_differ_they_share_time_and_draws_and_keep_their_own(agree):
    """An app without our groups may well start its ranks with different words."""
    first, second = agree(0, strict=False), agree(1, "lr=0.2", "now=later", strict=False)
    assert second.lr == 0.2 and second.drawn == first.drawn
    assert second.now == "later"


def test_ranks_that_are_started_again_go_on_with_the_first_tree(agree):
    first, second = agree(0), agree(1)
    again = [agree(0), agree(1)]
    assert own(first) == own(second) == own(again[0]) == own(again[1])
    assert {folder_of_run(config) for config in again} == {folder_of_run(first)}


APP = """
import json, logging, os, random, time
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf, open_dict

OmegaConf.register_new_resolver("draw", random.random)
STARTED = time.time_ns()
OmegaConf.register_new_resolver("started", lambda: f"run-{STARTED}")


@hydra.main(version_base="1.3", config_path=".", config_name="config")
def main(cfg):
    rank, attempt = os.environ.get("RANK", "0"), os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    with open_dict(cfg):
        cfg.data.vocab = 97  # known once a tokenizer is read
    told = [OmegaConf.to_container(cfg, resolve=True), HydraConfig.get().runtime.output_dir]
    logging.getLogger("app").info("logged by rank %s", rank)
    Path(__file__).with_name(f"rank{rank}.{attempt}.json").write_text(json.dumps(told))
    if cfg.dies and attempt == "0":
        while len(list(Path(__file__).parent.glob("rank?.0.json"))) < 2:
            time.sleep(0.05)
        raise RuntimeError("once")


if __name__ == "__main__":
    time.sleep(1.1 * int(os.environ.get("RANK", 0)))  # ranks never compose in the same second
    main()
"""


FOREIGN = """
dies: false
started: ${started:}
paths: {output_dir: "${hydra:runtime.output_dir}"}
checkpoints: ${paths.output_dir}/checkpoints
tracker: ${oc.env:TRACKER,off}
data: {vocab: null}
model: {vocab: "${data.vocab}"}
hydra: {job: {env_set: {TRACKER: "on"}}}
"""
TORCHRUN = ("torchrun", "--nproc-per-node", "2", "--max-restarts", "1")


def told(folder: Path, *words: str, by: tuple[str, ...] = TORCHRUN) -> tuple[dict[str, list], str]:
    """What each rank of an app without our groups saw: ``rank.attempt`` -> config, folder; and what was shown."""
    (folder / "app.py").write_text(APP)
    (folder / "config.yaml").write_text(CONFIG + FOREIGN)
    done = warm.run([*by, "app.py", *words], cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    ranks = {path.stem.removeprefix("rank"): json.loads(path.read_text()) for path in folder.glob("rank*.json")}
    return ranks, done.stdout + done.stderr


def assert_as_in_one_process(config: dict, folder: str) -> None:
    """What an interpolation means in a plain Hydra app: the job's folder and variables, and what main has changed."""
    assert config["paths"]["output_dir"] == folder and config["checkpoints"] == f"{folder}/checkpoints"
    assert (config["tracker"], config["model"]["vocab"]) == ("on", 97)


@pytest.mark.dist
@pytest.mark.slow
def test_any_app_under_torchrun_has_one_folder_and_one_tree_also_after_a_restart(tmp_path):
    ranks, shown = told(tmp_path, "dies=true")
    assert set(ranks) == {"0.0", "1.0", "0.1", "1.1"}
    for name, (config, folder) in ranks.items():
        assert config.pop("local") == name[0]
        assert_as_in_one_process(config, folder)
    assert all(seen == ranks["0.0"] for seen in ranks.values())
    (made,) = (tmp_path / "outputs").glob("*/*")
    assert str(made) == ranks["0.0"][1]
    assert {path.name for path in made.iterdir()} == {".hydra", "app.log", "app.rank1.log"}
    assert "logged by rank 0" in shown and "logged by rank 1" not in shown
    for rank, name in enumerate(["app.log", "app.rank1.log"]):
        text = (made / name).read_text()
        assert f"logged by rank {rank}" in text and f"logged by rank {1 - rank}" not in text


@pytest.mark.slow
def test_one_process_is_not_changed_at_all(tmp_path):
    ranks, _ = told(tmp_path, "local=0", by=("python",))
    assert_as_in_one_process(*ranks["0.0"])


@pytest.mark.dist
@pytest.mark.slow
def test_without_the_callback_each_rank_is_a_run_of_its_own(tmp_path):
    ranks, _ = told(tmp_path, "~hydra.callbacks.nemo_dist_conf")
    assert ranks["0.0"][0]["drawn"] != ranks["1.0"][0]["drawn"]
    assert not list((tmp_path / "outputs").rglob("app.rank1.log"))


@pytest.mark.dist
@pytest.mark.slow
def test_a_rank_that_starts_when_rank_0_is_through_still_meets_it(tmp_path):
    """As srun starts them: rank 0 serves what the others read, and the app never lets them wait for one another."""
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "config.yaml").write_text(CONFIG + FOREIGN)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    started = []
    for rank in range(2):
        env = {**shared, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        started.append(warm.Program(["python", "app.py"], cwd=tmp_path, env=env))
        while not (tmp_path / f"rank{rank}.0.json").exists() and started[-1].poll() is None:
            time.sleep(0.05)
    said = [program.communicate(timeout=20) for program in started]
    assert [program.returncode for program in started] == [0, 0], said
    first, second = (json.loads((tmp_path / f"rank{rank}.0.json").read_text()) for rank in range(2))
    assert first[0].pop("local") == "0" and second[0].pop("local") == "1" and first == second
