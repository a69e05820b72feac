"""What a model's modules hand to one another in a forward, and what of it crosses from one pipeline stage to the next.

A call of a part (a block, or a module before, between or after blocks) takes values that earlier calls have returned,
changed or not by the code around them. That code runs on the stage of the call that takes them, so only what parts
have returned is ever handed on.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Mapping, NamedTuple, Sequence

import torch

__all__ = ["Call", "Flow", "Given", "Placed", "Shape", "Value", "place"]


class Value(NamedTuple):
    """A tensor that a part has returned: number of the call, and which leaf of its result."""

    call: int
    leaf: int


class Given(NamedTuple):
    """A leaf of a result that is no tensor and was handed in: its place among the leaves of the arguments."""

    place: int


@dataclass(frozen=True)
class Shape:
    """A tensor's shape in terms of the batch's. sizes: each as (constant, per row, per token, per row and token)."""

    sizes: tuple[tuple[int, int, int, int], ...]
    dtype: torch.dtype

    def of(self, rows: int, tokens: int) -> tuple[int, ...]:
        return tuple(c + r * rows + t * tokens + b * rows * tokens for c, r, t, b in self.sizes)


@dataclass(frozen=True)
class Call:
    """nth: which call of that part, from 0. leaves, spec: of its result, a ``Shape`` for each tensor.

    depends: whether the result follows from weights. takes: values that it is given, or that its arguments follow
    from. uses: names of parameters that the code around the parts computes its arguments with. reads: calls that have
    written what it reads, into a cache that both are given.
    """

    name: str
    nth: int
    leaves: tuple[Any, ...]
    spec: Any
    depends: bool
    takes: frozenset[Value]
    uses: frozenset[str]
    reads: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Flow:
    """The calls of one forward in their order. output: of the model; takes and uses: what that follows from."""

    calls: tuple[Call, ...]
    output: Shape
    takes: frozenset[Value]
    uses: frozenset[str]

    @cached_property
    def number(self) -> dict[tuple[str, int], int]:
        """Name of a part and which of its calls -> the call's number."""
        return {(call.name, call.nth): index for index, call in enumerate(self.calls)}

    def of(self, name: str) -> list[int]:
        return [index for index, call in enumerate(self.calls) if call.name == name]

    def shape(self, value: Value) -> Shape:
        shape: Shape = self.calls[value.call].leaves[value.leaf]
        return shape


@dataclass(frozen=True)
class Placed:
    """A flow spread over stages.

    stage_of: of each call; None: it follows from no weights and runs on every stage that asks for it.
    parts, loose: names of the parts and of the parameters outside of parts that each stage holds.
    handed: what each stage but the last hands on.
    changing: stages that write into what they are handed, or into what they hand on after a part has returned it.
    """

    flow: Flow
    stage_of: tuple[int | None, ...]
    parts: tuple[tuple[str, ...], ...]
    loose: tuple[frozenset[str], ...]
    handed: tuple[tuple[Value, ...], ...]
    changing: frozenset[int] = frozenset()


def place(
    flow: Flow,
    home: Mapping[str, int],
    stages: int,
    idle: Sequence[str],
    loose: Sequence[str],
    owner: Mapping[str, str],
) -> Placed:
    """Spread a flow over stages.

    home: stage of each part that has one. Of any other each call runs as early as it can, which may be on several
    stages. idle: parts that are never called; loose: parameters outside of parts. The first stage holds those that
    nobody uses. owner: parameter of a part that the code around the parts may use -> that part.
    """
    stage_of: list[int | None] = []
    for call in flow.calls:
        earliest = max((_number(stage_of[value.call]) for value in call.takes), default=0)
        stage_of.append(home.get(call.name, earliest) if call.depends else None)
    needed: list[set[Value]] = [set() for _ in range(stages)]
    used: list[set[str]] = [set() for _ in range(stages)]
    for call, stage in zip(flow.calls, stage_of):
        if stage is not None:
            needed[stage] |= call.takes
            used[stage] |= call.uses
    needed[-1] |= flow.takes
    used[-1] |= flow.uses
    handed = []
    for stage in range(stages - 1):
        later = set().union(*needed[stage + 1 :])
        handed.append(tuple(sorted(value for value in later if _number(stage_of[value.call]) <= stage)))
    held: list[list[str]] = [[] for _ in range(stages)]
    for call, of_call in zip(flow.calls, stage_of):
        if of_call is not None and call.name not in held[of_call]:
            held[of_call].append(call.name)
    for stage in range(stages):
        held[stage] += sorted({owner[name] for name in used[stage] if name in owner} - set(held[stage]))
    held[0] += [name for name in idle if not any(name in names for names in held)]
    asked = set().union(*used)
    kept = [frozenset(name for name in loose if name in used[stage]) for stage in range(stages)]
    kept[0] |= {name for name in loose if name not in asked}
    return Placed(flow, tuple(stage_of), tuple(map(tuple, held)), tuple(kept), tuple(handed))


def _number(stage: int | None) -> int:
    return 0 if stage is None else stage
