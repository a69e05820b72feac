"""Which keys a query sees, as a rule over positions in the whole sequence instead of a tensor of S x S.

transformers describes a mask by functions of (batch, head, query, key) that it combines; ``read_rule`` reads them. A
rule tells for a block of queries which keys are in reach, and which of those need no mask, so that attention runs over
the blocks in reach and a mask is made for a block at a time.

Shapes: B rows, S tokens of a whole sequence, L tokens of a rank, q queries and k keys of a block.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from dataclasses import dataclass
from typing import Any, Callable, Sequence

import torch
from torch import Tensor

from nemo_dist_conf.runtime.torch_inside import maker_of_mask

__all__ = [
    "Around",
    "Behind",
    "Both",
    "Causal",
    "Chunks",
    "Documents",
    "Either",
    "Everything",
    "Function",
    "Packed",
    "Rule",
    "Unpadded",
    "read_rule",
    "simplified",
]


class Rule:
    """What queries see. Positions are those in the whole sequence."""

    #: Whether only the distance of a query from a key counts, not where they are.
    is_relative = True

    def seen(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Bool, of a shape that the three index tensors broadcast to: [B, 1, 1, 1], [1, 1, q, 1] and [1, 1, 1, k]."""
        raise NotImplementedError

    def reach(self, first: int, last: int, length: int) -> tuple[int, int]:
        """The keys, from and up to without, outside of which none of the queries from first to last sees one."""
        return 0, length

    def sees_all(self, first: int, last: int, begin: int, end: int) -> bool:
        """Whether all queries from first to last are known to see all keys from begin up to, without, end."""
        return False


@dataclass(frozen=True)
class Everything(Rule):
    """All keys, before and behind."""

    def seen(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.ones((), dtype=torch.bool, device=query.device).expand(1, 1, query.size(-2), key.size(-1))

    def sees_all(self, first: int, last: int, begin: int, end: int) -> bool:
        return True


@dataclass(frozen=True)
class Causal(Rule):
    """Keys up to the query."""

    def seen(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    def reach(self, first: int, last: int, length: int) -> tuple[int, int]:
        return 0, last + 1

    def sees_all(self, first: int, last: int, begin: int, end: int) -> bool:
        return end - 1 <= first


@dataclass(frozen=True)
class Behind(Rule):
    """Keys less than ``window`` behind the query, and all after it."""

    window: int

    def seen(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key > query - self.window

    def reach(self, first: int, last: int, length: int) -> tuple[int, int]:
        return max(0, first - self.window + 1), length

    def sees_all(self, first: int, last: int, begin: int, end: int) -> bool:
        return begin > last - self.window


@dataclass(frozen=True)
class Around(Rule):
    """Keys at most ``distance`` from the query, before and behind."""

    distance: int

    def seen(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query - key).abs() <= self.distance

    def reach(self, first: int, last: int, length: int) -> tuple[int, int]:
        return max(0, first - self.distance), min(length, last + self.distance + 1)

    def sees_all(self, first: int, last: int, begin: int, end: int) -> bool:
        return begin >= last - self.distance and end - 1 <= first + self.distance


@dataclass(frozen=True)
class Chunks(Rule):
    """Keys of the query's own chunk of ``size`` tokens."""

    size: int
    is_relative = False

    def seen(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key // self.size == query // self.size

    def reach(self, first: int, last: int, length: int) -> tuple[int, int]:
        return first // self.size * self.size, min(length, (last // self.size + 1) * self.size)

    def sees_all(self, first: int, last: int, begin: int, end: int) -> bool:
        chunk = first // self.size
        return all(place // self.size == chunk for place in (last, begin, end - 1))


@dataclass(frozen=True)
class _Nothing(Rule):
    """No key."""

    def seen(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return torch.zeros((), dtype=torch.bool, device=query.device).expand(1, 1, query.size(-2), key.size(-1))

    def reach(self, first: int, last: int, length: int) -> tuple[int, int]:
        return first, first


@dataclass(frozen=True, eq=False)
class Unpadded(Rule):
    """Keys of tokens that are no padding. tokens: [B, S], bool."""

    tokens: Tensor
    is_relative = False

    def seen(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.tokens[batch, key]


@dataclass(frozen=True, eq=False)
class Documents:
    """Where the documents are that rows were packed of, told by position ids that start again.

    ids, positions: [B, S], the number of a token's document in its row, and its position in it. first, last: of the
    documents of all rows that hold the token, the first and the last token.
    """

    ids: Tensor
    positions: Tensor
    first: Sequence[int]
    last: Sequence[int]

    @staticmethod
    def of(positions_BS: Tensor) -> Documents | None:
        """None where every row is one document. Waits for the device."""
        starts_BS = torch.ones_like(positions_BS, dtype=torch.bool)
        starts_BS[:, 1:] = positions_BS[:, 1:] - positions_BS[:, :-1] != 1
        if not bool(starts_BS[:, 1:].any()):
            return None
        place_S = torch.arange(positions_BS.size(1), device=positions_BS.device)
        first_BS = torch.where(starts_BS, place_S, 0).cummax(1).values
        ends_BS = torch.ones_like(starts_BS)
        ends_BS[:, :-1] = starts_BS[:, 1:]
        last_BS = torch.where(ends_BS, place_S, place_S[-1]).flip(1).cummin(1).values.flip(1)
        first, last = torch.stack([first_BS.amin(0), last_BS.amax(0)]).tolist()
        return Documents((starts_BS.cumsum(1) - 1), positions_BS, first, last)


@dataclass(frozen=True, eq=False)
class Packed(Rule):
    """What ``inner`` says of positions in the query's own document, and nothing of the others."""

    inner: Rule
    documents: Documents
    is_relative = False

    def seen(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ids, positions = self.documents.ids, self.documents.positions
        return (ids[batch, query] == ids[batch, key]) & self.inner.seen(
            batch, positions[batch, query], positions[batch, key]
        )

    def reach(self, first: int, last: int, length: int) -> tuple[int, int]:
        begin, end = self.inner.reach(first, last, length) if self.inner.is_relative else (0, length)
        return max(begin, self.documents.first[first]), min(end, self.documents.last[last] + 1)


@dataclass(frozen=True, eq=False)
class Function(Rule):
    """Whatever a function of (batch, head, query, key) says that knows nothing of a rank's tokens."""

    function: Callable[..., Tensor]
    is_relative = False

    def seen(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return self.function(batch, torch.zeros_like(batch), query, key)


@dataclass(frozen=True)
class Both(Rule):
    """What all of the rules let a query see."""

    rules: tuple[Rule, ...]

    @property
    def is_relative(self) -> bool:  # type: ignore[override]
        return all(rule.is_relative for rule in self.rules)

    def seen(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return functools.reduce(torch.logical_and, (rule.seen(batch, query, key) for rule in self.rules))

    def reach(self, first: int, last: int, length: int) -> tuple[int, int]:
        reaches = [rule.reach(first, last, length) for rule in self.rules]
        return max(begin for begin, _ in reaches), min(end for _, end in reaches)

    def sees_all(self, first: int, last: int, begin: int, end: int) -> bool:
        return all(rule.sees_all(first, last, begin, end) for rule in self.rules)


@dataclass(frozen=True)
class Either(Rule):
    """What one of the rules lets a query see."""

    rules: tuple[Rule, ...]

    @property
    def is_relative(self) -> bool:  # type: ignore[override]
        return all(rule.is_relative for rule in self.rules)

    def seen(self, batch: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return functools.reduce(torch.logical_or, (rule.seen(batch, query, key) for rule in self.rules))

    def reach(self, first: int, last: int, length: int) -> tuple[int, int]:
        reaches = [rule.reach(first, last, length) for rule in self.rules]
        return min(begin for begin, _ in reaches), max(end for _, end in reaches)

    def sees_all(self, first: int, last: int, begin: int, end: int) -> bool:
        return any(rule.sees_all(first, last, begin, end) for rule in self.rules)


def simplified(rule: Rule, length: int) -> Rule:
    """The same for rows of ``length`` tokens: windows and chunks that hold all of a row, and nesting, are left out."""
    if isinstance(rule, (Behind, Around)):
        return Everything() if dataclasses.astuple(rule)[0] >= length else rule
    if isinstance(rule, Chunks):
        return Everything() if rule.size >= length else rule
    if isinstance(rule, Packed):
        return Packed(simplified(rule.inner, length), rule.documents)
    if not isinstance(rule, (Both, Either)):
        return rule
    kept: list[Rule] = []
    for part in (simplified(part, length) for part in rule.rules):
        kept += part.rules if type(part) is type(rule) else [part]
    idle, final = (Everything(), _Nothing()) if isinstance(rule, Both) else (_Nothing(), Everything())
    if final in kept:
        return final
    kept = [part for index, part in enumerate(kept) if part != idle and part not in kept[:index]]
    return kept[0] if len(kept) == 1 else type(rule)(tuple(kept)) if kept else idle


def read_rule(function: Callable[..., Any], length: int, on_any_rank: Callable[[bool], bool]) -> tuple[Rule, bool]:
    """(the rule that a mask function of transformers is, whether it keeps documents of packed rows apart).

    function: made for a rank's tokens; length: L, how many they are. on_any_rank: whether something is so on one rank.
    The rule is that of unpacked rows: documents are told by the positions of whole rows (``Documents``), not by those
    of a rank, between whose parts positions jump.
    Raises NotImplementedError for a function that says nothing of other ranks' tokens.
    """
    made = maker_of_mask(function)
    if made is None:
        return _any_other(function, length), False
    name, values = made
    if name == "causal_mask_function":
        return Causal(), False
    if name == "bidirectional_mask_function":
        return Everything(), False
    if name == "sliding_window_overlay":
        return Behind(int(values["sliding_window"])), False
    if name == "sliding_window_bidirectional_overlay":
        return Around(int(values["sliding_window"])), False
    if name == "chunked_overlay":  # rows that are padded on their left come with a mask, which is refused
        return Chunks(int(values["chunk_size"])), False
    if name == "blockwise_overlay":
        if on_any_rank(bool((values["block_sequence_ids"] >= 0).any())):
            raise NotImplementedError("blocks that see both ways, of images for instance, are numbered by a rank")
        return _Nothing(), False
    if name in ("and_masks", "or_masks"):
        parts = values["mask_functions"]
        inner = _packed(parts) if name == "and_masks" else None
        if inner is not None:
            return read_rule(inner, length, on_any_rank)[0], True
        read = [read_rule(part, length, on_any_rank) for part in parts]
        combined = (Both if name == "and_masks" else Either)(tuple(rule for rule, _ in read))
        return combined, any(packed for _, packed in read)
    return _any_other(function, length), False


def _packed(parts: Sequence[Any]) -> Any:
    """The function inside of what transformers makes of one for packed rows; None for any other pair."""
    makers = [maker_of_mask(part) for part in parts]
    names = [made[0] if made else None for made in makers]
    if names != ["packed_sequence_mask_function", "remap_positions_for_packed_sequence"] or makers[1] is None:
        return None
    return makers[1][1]["mask_function"]


def _any_other(function: Any, length: int) -> Function:
    """A function that is evaluated, if it encloses nothing of a rank's tokens."""
    seen: list[Any] = []

    def look(value: Any) -> None:
        if any(value is other for other in seen):
            return
        seen.append(value)
        if isinstance(value, Tensor) and length in value.shape:
            raise NotImplementedError(f"it knows a tensor of shape {tuple(value.shape)} of this rank's {length} tokens")
        if isinstance(value, (tuple, list)):
            for item in value:
                look(item)
        elif isinstance(value, functools.partial):
            look([value.func, *value.args, *value.keywords.values()])
        elif isinstance(value, types.FunctionType):
            enclosed = [cell.cell_contents for cell in value.__closure__ or ()]
            look([*enclosed, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()])

    if not isinstance(function, (functools.partial, types.FunctionType)):
        raise NotImplementedError(f"nobody can look into a {type(function).__name__}")
    look(function)
    return Function(function)
