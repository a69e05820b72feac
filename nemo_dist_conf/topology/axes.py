"""Which axes there are, one row each, and which of them a strategy allows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Mapping

__all__ = ["AXES", "Axis", "AxisRules"]


@dataclass(frozen=True)
class Axis:
    """One parallel axis: the size that asks for it, and what it is called in a sentence."""

    name: str
    size_field: str
    title: str
    default: int | None = 1


#: In the order of ParallelismSizes.
AXES: tuple[Axis, ...] = (
    Axis("dp", "dp_size", "data parallelism", None),
    Axis("dp_replicate", "dp_replicate_size", "HSDP replication", None),
    Axis("tp", "tp_size", "tensor parallelism"),
    Axis("pp", "pp_size", "pipeline parallelism"),
    Axis("cp", "cp_size", "context parallelism"),
    Axis("ep", "ep_size", "expert parallelism"),
)


@dataclass(frozen=True)
class AxisRules:
    """The axes of one strategy.

    strategy: its name. allowed: axes whose size may be above 1. why_not: the reason for each other axis.
    instead: the strategy to type where an axis is lacking, for the axes in ``instead_for``.
    mesh: names of the root mesh's axes, outermost first. flattened: further names for several of them together.
    """

    strategy: str
    allowed: frozenset[str]
    mesh: tuple[str, ...]
    flattened: tuple[tuple[str, tuple[str, ...]], ...] = ()
    why_not: Mapping[str, str] = field(default_factory=dict)
    instead: str = ""
    instead_for: frozenset[str] = frozenset()
