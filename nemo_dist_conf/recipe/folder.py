"""Where the recipe's YAML is."""

from __future__ import annotations

from pathlib import Path

import nemo_dist_conf

__all__ = ["config_folder"]


def config_folder() -> Path:
    """The recipe's YAML: inside the package when installed, beside it in a checkout."""
    package = Path(nemo_dist_conf.__file__).parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"
