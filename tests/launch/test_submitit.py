"""Jobs of submitit and of srun: each rank is started alone, and all of them are one run."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Sequence

import pytest

from tests import warm

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install hydra-submitit-launcher")
pytestmark = [pytest.mark.dist, pytest.mark.slow]

QUEUES = ("SLURM_", "SUBMITIT_")
APP = """
import json, logging, os, random
from pathlib import Path

import hydra, torch
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

import nemo_dist_conf

OmegaConf.register_new_resolver("draw", lambda: random.random())


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    if cfg.by_torch:
        dist.init_process_group("gloo")
    setup, _, _ = nemo_dist_conf.instantiate(cfg)
    rank = torch.tensor(dist.get_rank())
    logging.getLogger(__name__).info("hello from rank %d", rank)
    config = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    told = {"config": config, "layout": setup.mesh_context.layout()}
    folder = Path(HydraConfig.get().runtime.output_dir)
    (folder / f"rank{rank}.json").write_text(json.dumps(told))
    total = rank.clone()
    dist.all_reduce(total)
    print("the sum of ranks is", total.item())
    return total.item()


if __name__ == "__main__":
    main()
"""
CONFIG = """
defaults:
  - nemo_dist_conf
  - _self_
by_torch: false
drawn: ${draw:}
now: ${now:%H-%M-%S-%f}
local: ${oc.env:LOCAL_RANK}
"""


@pytest.fixture
def app(tmp_path):
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "config.yaml").write_text(CONFIG)
    return tmp_path


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """With submitit, which starts interpreters of its own."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(QUEUES)}
    command = [sys.executable, "app.py", "-m", "hydra/launcher=submitit_local", *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def start(folder: Path, *words: str, **variables: object) -> warm.Program:
    """As srun starts it, whatever queue the tests themselves run in."""
    env: dict[str, str | None] = {name: None for name in os.environ if name.startswith(QUEUES)}
    env |= {name: str(value) for name, value in variables.items()}
    return warm.Program(["python", "app.py", *words], cwd=folder, env=env)


def slurm(rank: int, job: int) -> dict[str, object]:
    """What srun sets for two tasks on one node. job: another one for each test, for a port of its own."""
    job += 10 * os.getpid()
    values = {"PROCID": rank, "LOCALID": rank, "NTASKS": 2, "NODEID": 0, "JOB_ID": job, "STEP_ID": 0}
    nodes = {"JOB_NODELIST": "127.0.0.1", "STEP_NODELIST": "127.0.0.1"}
    return {f"SLURM_{name}": value for name, value in (values | nodes).items()}


def assert_one_run(folder: Path, layout: str, local: Sequence[str] = ("0", "1")) -> None:
    """One folder, one resolved tree but for what belongs to a rank, one log a rank."""
    told = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]
    assert [one["layout"] for one in told] == [layout] * 2
    assert [one["config"].pop("local") for one in told] == list(local)
    assert told[0] == told[1]
    assert isinstance(told[0]["config"]["drawn"], float)
    for rank, name in enumerate(["app.log", "app.rank1.log"]):
        assert f"hello from rank {rank}" in (folder / name).read_text()
        assert f"hello from rank {1 - rank}" not in (folder / name).read_text()
    assert (folder / ".hydra" / "config.yaml").is_file()


def test_the_ranks_of_submitits_jobs_are_one_run_each(app):
    words = ["hydra.launcher.tasks_per_node=2", "hydra.launcher.timeout_min=2"]
    done = run(app, *words, "hydra.sweep.dir=sweep", "strategy=ddp,fsdp2")
    assert done.returncode == 0, done.stdout + done.stderr
    for number, layout in enumerate(["dp 2", "dp_shard 2"]):
        assert_one_run(app / "sweep" / str(number), layout)
    drawn = {json.loads((app / "sweep" / job / "rank0.json").read_text())["config"]["drawn"] for job in "01"}
    assert len(drawn) == 2


def test_a_grid_is_checked_before_submitit_gets_a_job(app):
    words = ["hydra.launcher.tasks_per_node=2", "hydra.sweep.dir=sweep"]
    done = run(app, *words, "strategy=ddp,fsdp2", "parallelism.tp_size=1,2")
    assert done.returncode == 1
    refused = "1 of 4 jobs cannot work, so none was started\n#1 strategy=ddp parallelism.tp_size=2\n"
    assert done.stderr.startswith(refused)
    assert "\n  type     strategy=ddp parallelism.tp_size=1\n" in done.stderr
    assert not (app / "sweep" / ".submitit").exists()


def test_ranks_that_srun_starts_are_one_run(app):
    ranks = [start(app, "parallelism.tp_size=2", "by_torch=true", **slurm(rank, 1)) for rank in (0, 1)]
    for process in ranks:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
        assert "the sum of ranks is 1" in out
    (folder,) = (app / "outputs").glob("*/*")
    assert_one_run(folder, "tp 2")


def test_ranks_that_srun_starts_with_different_words_are_refused(app):
    ranks = [start(app, f"+lr={rank}", **slurm(rank, 2)) for rank in (0, 1)]
    _, err = ranks[1].communicate(timeout=60)
    ranks[0].kill()  # Slurm's part
    ranks[0].communicate()
    assert ranks[1].returncode == 1
    assert err.startswith("ranks were started with different configs: lr (0 on rank 0, 1 here)")


def test_the_torchrun_launcher_under_srun_takes_slurms_tasks_for_nodes(app):
    """Two launchers of one rank each: neither they nor their ranks take Slurm's number for a rank."""
    words = ["hydra/launcher=torchrun", "hydra.launcher.nnodes=2", "hydra.sweep.dir=sweep", "strategy=ddp,fsdp2"]
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{found.getsockname()[1]}"
    words.append(f"hydra.launcher.rdzv_endpoint={endpoint}")
    nodes = [slurm(number, 3) | {"SLURM_LOCALID": 0, "SLURM_NODEID": number} for number in (0, 1)]
    for process in [start(app, "-m", *words, **node) for node in nodes]:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
    for number, layout in enumerate(["dp 2", "dp_shard 2"]):
        assert_one_run(app / "sweep" / str(number), layout, local=["0", "0"])
