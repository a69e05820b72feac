"""What holds for all tests."""

import pytest
from hydra.core.global_hydra import GlobalHydra


@pytest.fixture(autouse=True, scope="module")
def _hydra_is_closed():
    """Hydra is initialised once per process; a module that leaves it so must not be seen by the next."""
    GlobalHydra.instance().clear()
    yield
    GlobalHydra.instance().clear()
