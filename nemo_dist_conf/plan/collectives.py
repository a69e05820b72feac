"""One kind of collective call in a step, as traffic lists it and the time of a step adds it up."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Collective"]


@dataclass
class Collective:
    """Calls of one kind in a step. calls of ``size`` bytes each. when: ``forward``, ``backward`` or ``recompute``.

    overlaps: the runtime issues it early, so that it can hide behind computing.
    """

    axis: str
    kind: str
    calls: int
    size: int
    when: str
    overlaps: bool = False
    why: str = field(default="", compare=False)

    @property
    def bytes(self) -> int:
        return self.calls * self.size
