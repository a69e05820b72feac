"""The words that a user types for a key, wherever our groups stand in the tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["Paths"]


@dataclass(frozen=True)
class Paths:
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
