"""Starting and joining process groups: one process, torchrun's variables, Slurm's, and what is missing."""

import os
import socket
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import torch

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.runtime.process_group import choose_device
from tests import warm

SCRIPT = textwrap.dedent(
    """
    import os, torch, torch.distributed as dist
    from nemo_dist_conf import initialize_distributed, shutdown_distributed
    info = initialize_distributed(device="cpu")
    assert initialize_distributed(device="cpu") == info  # joined, not started again
    total = torch.tensor([float(info.rank + 1)])
    dist.all_reduce(total)
    line = f"{info.backend} {info.rank} {info.world_size} {info.is_main} {int(total)}\\n"
    os.write(1, line.encode())  # in one piece: ranks share the pipe
    shutdown_distributed()
    shutdown_distributed()
    assert not dist.is_initialized()
    """
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def clean_environment() -> dict[str, str]:
    prefixes = ("SLURM_", "TORCHELASTIC_")
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {k: v for k, v in os.environ.items() if not k.startswith(prefixes) and k not in names}


def run_all(environments: list[dict[str, str]]) -> list[str]:
    command = (sys.executable, "-c", SCRIPT)
    pipes: dict[str, Any] = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    started = [subprocess.Popen(command, env=clean_environment() | env, **pipes) for env in environments]
    outputs = [process.communicate(timeout=120) for process in started]
    assert [process.returncode for process in started] == [0] * len(started), outputs
    return [out.strip() for out, _ in outputs]


def test_one_process_needs_no_launcher_and_no_port():
    assert run_all([{}]) == ["gloo 0 1 True 1"]


def test_slurms_variables_are_enough():
    shared = {
        "SLURM_NTASKS": "2",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_ID": "1",
        "MASTER_PORT": str(free_port()),
    }
    found = run_all([shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)])
    assert found == ["gloo 0 2 True 3", "gloo 1 2 False 3"]


def test_torchrun_starts_ranks_that_meet(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = warm.run(["torchrun", "--nproc-per-node", "2", "script.py"], cwd=tmp_path)
    assert sorted(done.stdout.splitlines()) == ["gloo 0 2 True 3", "gloo 1 2 False 3"]


def test_ranks_that_cannot_meet_are_told_what_is_missing(monkeypatch):
    from nemo_dist_conf.runtime.process_group import initialize_distributed

    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="MASTER_ADDR is not set"):
        initialize_distributed(device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks for a GPU where there is none")
def test_a_device_that_is_not_there_is_refused():
    with pytest.raises(ConfigError) as caught:
        choose_device("cuda")
    assert caught.value.type == "device=cpu"
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("device", ["tpu0", "mps"])
def test_an_unsupported_device_is_refused(device):
    with pytest.raises(ConfigError, match="device="):
        choose_device(device)
