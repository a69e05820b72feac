"""Paths in a config as they were meant."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["typed_path"]


def typed_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path of one that was typed: ``~`` is the home, and a relative one belongs to the folder in which the
    command was typed, also inside a job that runs in a folder of its own (``hydra.job.chdir=true``).
    """
    from hydra.utils import to_absolute_path

    return Path(to_absolute_path(os.path.expanduser(path)))
