"""What one setting of an optimizer may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable

__all__ = ["Setting"]


@dataclass(frozen=True)
class Setting:
    """A setting of an optimizer: what fits, in words and as a predicate, and a value to suggest."""

    allowed: str
    fits: Callable[[Any], bool]
    example: Any
