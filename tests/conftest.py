"""What holds for all tests."""

import os
import sys

import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.version import VersionBase

# Before anything imports torch. Two test processes share the cores, and threads that wait for one another across busy
# cores take several times as long as one thread.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True, scope="module")
def _hydra_is_closed():
    """Hydra is initialised once per process; a module that leaves it so must not be seen by the next."""
    close_hydra()
    yield
    close_hydra()


@pytest.fixture(autouse=True, scope="module")
def _ranks_are_closed():
    """Every group that gloo has made keeps a thread that wakes a hundred times a second, also in ranks that wait."""
    yield
    pool = sys.modules.get("tests.dist.pool")
    if pool is not None:
        pool.close_pools()


def close_hydra() -> None:
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
    Singleton._instances.pop(VersionBase, None)


@pytest.fixture
def store():
    """The ConfigStore, put back as it was."""
    GlobalHydra.instance().clear()
    Plugins.instance()  # Hydra's own entries come with its plugins
    instance = ConfigStore.instance()
    before = {key: dict(value) if isinstance(value, dict) else value for key, value in instance.repo.items()}
    yield instance
    instance.repo = before
