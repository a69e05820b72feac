"""Words as a user types them: a key with its value wherever our groups stand in the tree, and a path as it is meant."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Spelling", "typed_path"]


@dataclass(frozen=True)
class Spelling:
    """Spells keys below the package where the groups were put ("" at the root, "dist" after ``@dist``)."""

    prefix: str = ""

    def key(self, name: str) -> str:
        return f"{self.prefix}.{name}" if self.prefix else name

    def set(self, name: str, value: Any) -> str:
        """``parallelism.tp_size=2``, relocated where needed."""
        if value is None:
            value = "null"
        elif isinstance(value, bool):
            value = str(value).lower()
        return f"{self.key(name)}={value}"

    def choose(self, group: str, option: str) -> str:
        """``strategy=fsdp2``, or ``strategy@dist.strategy=fsdp2`` below a package."""
        return f"{group}@{self.key(group)}={option}" if self.prefix else f"{group}={option}"


def typed_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path of one that was typed: ``~`` is the home, and a relative one belongs to the folder in which the
    command was typed, also inside a job that runs in a folder of its own (``hydra.job.chdir=true``).
    """
    from hydra.utils import to_absolute_path

    return Path(to_absolute_path(os.path.expanduser(path)))
