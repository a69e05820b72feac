"""What holds for all tests."""

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig


@pytest.fixture(autouse=True, scope="module")
def _hydra_is_closed():
    """Hydra is initialised once per process; a module that leaves it so must not be seen by the next."""
    _close()
    yield
    _close()


def _close() -> None:
    GlobalHydra.instance().clear()
    HydraConfig.instance().cfg = None
