"""Apps that use none of our groups, under launchers: what their configs read, and how their runs end.

What they are compared with is the same app in one process. The tests of these cases are in tests/composition/agreement,
tests/topology and tests/runtime/test_interpreter_exit.py, so the suite runs none of them twice.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable

from nemo_dist_conf.topology.launched_ranks import Launched, launched
from tests import warm
from tests.composition.agreement.test_config_agreement import APP, CONFIG, FOREIGN, assert_as_in_one_process
from tests.conformance.case import Case
from tests.runtime.test_interpreter_exit import PROGRAM

__all__ = ["CASES"]

AREA = "Apps without our groups, under launchers"


def _seen(start: Callable[[Path], Any]) -> dict[str, tuple[dict[str, Any], str]]:
    """What each rank of the app saw: its config as it reads after main has changed a value, and its folder."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "app.py").write_text(APP)
        (folder / "config.yaml").write_text(CONFIG + FOREIGN)
        start(folder)
        found = {path.stem[4]: tuple(json.loads(path.read_text())) for path in folder.glob("rank*.0.json")}
        assert {seen[1] for seen in found.values()} == {str(path) for path in (folder / "outputs").glob("*/*")}
    return found


def _agrees(start: Callable[[Path], Any]) -> float:
    found = _seen(start)
    assert set(found) == {"0", "1"}
    for rank, (config, folder) in found.items():
        assert str(config.pop("local")) == rank
        assert_as_in_one_process(config, folder)
    assert found["0"] == found["1"]
    return 0.0


def _torchrun(folder: Path) -> None:
    done = warm.run(["torchrun", "--nproc-per-node", "2", "app.py"], cwd=folder)
    assert done.returncode == 0, done.stderr


def _slurm(folder: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    command = [sys.executable, "app.py"]
    started = [subprocess.Popen(command, cwd=folder, env=os.environ | shared | variables) for variables in ranks]
    assert [process.wait(120) for process in started] == [0, 0]


def _interactive() -> float:
    shell = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "1"}
    assert launched(shell) == Launched(0, 1, 0, "Slurm")
    return 0.0


def _ends_well() -> float:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    return float(done.stdout.split()[0])


CASES = [
    Case(
        AREA,
        "config: folder, env_set, values that main changes, draws",
        "torchrun, 2 ranks",
        lambda: _agrees(_torchrun),
        in_suite=False,
    ),
    Case(
        AREA,
        "config: folder, env_set, values that main changes, draws",
        "Slurm's variables, 2 tasks",
        lambda: _agrees(_slurm),
        in_suite=False,
    ),
    Case(
        AREA,
        "a program in an interactive allocation for 2 tasks",
        "Slurm's variables, a step of 1",
        _interactive,
        in_suite=False,
    ),
    Case(AREA, "a program whose last act is a collective ends well", "gloo, 1 rank", _ends_well, in_suite=False),
]
