"""Hydra's own conformance suites for launchers, as its plugins run them, for two start methods."""

import pytest
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher
from hydra.test_utils.launcher_common_tests import (
    BatchedSweeperTestSuite,
    IntegrationTestSuite,
    LauncherTestSuite,
)

from hydra_plugins.nemo_dist_conf.torchrun_launcher import TorchrunLauncher

pytestmark = [pytest.mark.dist, pytest.mark.slow]

START = [["hydra.launcher.start_method=forkserver"], ["hydra.launcher.start_method=fork"]]
BATCHES = ["hydra.sweeper.max_batch_size=2"]


def test_hydra_finds_the_launcher():
    assert TorchrunLauncher.__name__ in [kind.__name__ for kind in Plugins.instance().discover(Launcher)]


@pytest.mark.parametrize(("launcher_name", "overrides"), [("torchrun", list(start)) for start in START])
class TestTorchrunLauncher(LauncherTestSuite):
    pass


@pytest.mark.parametrize(("launcher_name", "overrides"), [("torchrun", start + BATCHES) for start in START])
class TestTorchrunLauncherInBatches(BatchedSweeperTestSuite):
    pass


@pytest.mark.parametrize(
    ("task_launcher_cfg", "extra_flags"),
    [({}, ["-m", "hydra/launcher=torchrun", *start]) for start in START],
)
class TestTorchrunLauncherIntegration(IntegrationTestSuite):
    pass
