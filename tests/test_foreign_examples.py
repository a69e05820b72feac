"""Apps of other structure run as sweeps on two ranks and under torchrun, with the losses of one process."""

import importlib.util
import json
import re
import sqlite3
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests import warm

EXAMPLES = Path(__file__).parent.parent / "examples"
LAUNCHER = ["-m", "hydra/launcher=torchrun", "hydra.launcher.nproc_per_node=2", "hydra.sweep.dir=sweep"]
TORCHRUN = ("torchrun", "--nproc-per-node", "2")

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def needs(module: str, package: str):
    return pytest.mark.skipif(importlib.util.find_spec(module) is None, reason=f"pip install {package}")


def run(app: str, *words: str, cwd: Path, launcher: tuple[str, ...] = ("python",), code: int = 0) -> str:
    done = warm.run([*launcher, str(EXAMPLES / app), *words], cwd=cwd)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def alone(app: str, *words: str, cwd: Path) -> str:
    """One process, to compare with."""
    done = warm.run(["python", str(EXAMPLES / app), *words], cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def losses(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"loss ([\d.]+)", text)]


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "sweep" / "sweep.jsonl").read_text().splitlines()]


def test_an_app_with_its_own_groups_sweeps_them_beside_ours(tmp_path):
    """torchrun alone is in test_examples."""
    words = ["model=wide", "dist.parallelism.tp_size=1,2", "dist.strategy.mp_policy=null"]
    run("foreign_app/app.py", *LAUNCHER, *words, cwd=tmp_path)
    jobs = records(tmp_path)
    assert [job["layout"] for job in jobs] == ["dp_shard 2", "tp 2"]
    one = losses(alone("foreign_app/app.py", "model=wide", "strategy@dist.strategy=ddp", cwd=tmp_path))
    assert [job["value"] for job in jobs] == pytest.approx(one * 2, rel=1e-4)


@needs("lightning_fabric", "lightning-fabric")
def test_a_fabric_script_takes_our_meshes(tmp_path):
    one = losses(alone("fabric/app.py", "strategy=ddp", "hydra.run.dir=one", cwd=tmp_path))
    assert len(one) == 4 and one[-1] < one[0]
    text = run("fabric/app.py", *LAUNCHER, "strategy.mp_policy=null", "parallelism.tp_size=1,2", cwd=tmp_path)
    assert losses(text) == pytest.approx(one * 2, abs=1e-5)
    assert [job["layout"] for job in records(tmp_path)] == ["dp_shard 2", "tp 2"]
    text = run("fabric/app.py", "strategy=ddp", cwd=tmp_path, launcher=TORCHRUN)
    assert losses(text) == pytest.approx(one, abs=1e-5) and "dp 2" in text
    (folder,) = (tmp_path / "outputs").glob("*/*")
    assert (folder / ".hydra").is_dir() and (folder / "app.rank1.log").is_file()


@needs("hydra_plugins.hydra_optuna_sweeper", "hydra-optuna-sweeper")
def test_optuna_gets_rank_0s_values_and_survives_failed_and_impossible_trials(tmp_path):
    words = ["hydra.sweeper.n_trials=4", "hydra.sweeper.study_name=lr", "hydra.sweeper.storage=sqlite:///study.db"]
    run("optuna_sweep/app.py", "-m", "hydra.sweep.dir=sweep", *words, cwd=tmp_path, code=1)  # 1 as a job failed
    jobs = records(tmp_path)
    assert [job["status"] for job in jobs] == ["failed", "skipped", "completed", "completed"]
    assert [job["layout"] for job in jobs] == ["dp 2", "", "dp 2", "tp 2"]
    assert jobs[0]["reason"] == "rank 0: returned nan, which no sweeper can compare"
    assert "tp_size=2 is not possible" in jobs[1]["reason"]
    assert not (tmp_path / "sweep" / "1").exists()
    values = [job["value"] for job in jobs[2:]]
    study = sqlite3.connect(tmp_path / "study.db")
    trials = study.execute("select state, value from trials left join trial_values using (trial_id) order by number")
    assert trials.fetchall() == [("FAIL", None)] * 2 + [("COMPLETE", value) for value in values]
    best = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert best.best_value == min(values)
