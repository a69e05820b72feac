"""Where the recipe's YAML is, and how its programs start with the Hydra that is installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra.utils

import nemo_dist_conf

__all__ = ["config_folder", "main_options"]


def config_folder() -> Path:
    """The recipe's YAML: inside the package when installed, beside it in a checkout."""
    package = Path(nemo_dist_conf.__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def main_options() -> dict[str, Any]:
    """Arguments of ``@hydra.main`` beside the config's.

    Hydra 1.3 does as 1.1 did without ``version_base``; 1.4 warns of it, and of each target that no whitelist allows:
    the recipe's programs run whatever model, optimizer and data the words of a command line name.
    """
    everything = getattr(hydra.utils, "UNSAFE_DISABLE_EXECUTION_CHECKS", None)
    return {"version_base": "1.3"} if everything is None else {"execution_whitelist": everything}
