"""Hydra's own conformance suites for launchers, as its plugins run them, for two start methods."""

from pathlib import Path

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.test_utils.launcher_common_tests import (
    BatchedSweeperTestSuite,
    IntegrationTestSuite,
    LauncherTestSuite,
)

from hydra_plugins.nemo_dist_conf.torchrun_launcher import TorchrunLauncher
from nemo_dist_conf.launch.failure import JobFailed
from tests import warm

pytestmark = [pytest.mark.dist, pytest.mark.slow]

START = [["hydra.launcher.start_method=forkserver"], ["hydra.launcher.start_method=fork"]]
BATCHES = ["hydra.sweeper.max_batch_size=2"]


def test_hydra_finds_the_launcher():
    assert TorchrunLauncher.__name__ in [kind.__name__ for kind in Plugins.instance().discover(Launcher)]


@pytest.mark.parametrize(("launcher_name", "overrides"), [("torchrun", list(start)) for start in START])
class TestTorchrunLauncher(LauncherTestSuite):
    def test_failure_preserves_task_traceback(self, hydra_sweep_runner, launcher_name, overrides, tmpdir):
        """Hydra 1.4 asks launchers for the task's own exception. Ours raises one for the job, because which rank failed
        and where it logged belong to it; it tells the task's traceback, with what that was raised from, as text.
        """

        def task(_):
            try:
                raise ValueError("launcher cause")
            except ValueError as cause:
                raise RuntimeError("launcher failure") from cause

        sweep = hydra_sweep_runner(
            calling_file=None,
            calling_module="hydra.test_utils.a_module",
            task_function=task,
            config_path="configs",
            config_name="compose.yaml",
            overrides=[f"hydra/launcher={launcher_name}", *overrides],
            temp_dir=tmpdir,
        )
        with pytest.raises(JobFailed) as failed, sweep:
            pass
        text = str(failed.value)
        assert failed.value.reason == "rank 0: RuntimeError: launcher failure"
        assert "ValueError: launcher cause" in text and "The above exception was the direct cause" in text
        assert text.count(", in task") == 2 and "run_rank" not in text


@pytest.mark.parametrize(("launcher_name", "overrides"), [("torchrun", start + BATCHES) for start in START])
class TestTorchrunLauncherInBatches(BatchedSweeperTestSuite):
    pass


@pytest.fixture
def warm_programs(monkeypatch):
    def run_process(cmd, env=None, *options):
        done = warm.run(["python", *cmd[1:]], cwd=Path.cwd(), env=env)
        assert done.returncode == 0, done.stderr
        return done.stdout.rstrip(), done.stderr.rstrip()

    monkeypatch.setattr("hydra.test_utils.test_utils.run_process", run_process)
    monkeypatch.setattr("subprocess.check_call", run_process)


# With the default alone: each of these starts a whole program, which takes seconds.
@pytest.mark.usefixtures("warm_programs")
@pytest.mark.parametrize(("task_launcher_cfg", "extra_flags"), [({}, ["-m", "hydra/launcher=torchrun", *START[0]])])
class TestTorchrunLauncherIntegration(IntegrationTestSuite):
    pass
