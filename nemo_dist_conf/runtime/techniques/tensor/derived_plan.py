"""A tensor-parallel plan for a model that brings none: read off the rows of layers in its blocks, each way tried.

For each row there are several ways, the one with the least traffic first: the ranks keep their parts between its
layers, of three in one (query, key and value) maybe; the attention around it is told that it has fewer heads; or what
the first layers give is gathered, and what lies between is computed by every rank, which any code takes. A way is taken
where the trial finds no difference.
"""

from __future__ import annotations

import itertools
from typing import Callable, Iterator, Mapping

from torch import nn

from nemo_dist_conf.runtime.model.blocks import Blocks, find_blocks
from nemo_dist_conf.runtime.model.materialise import tied_names
from nemo_dist_conf.runtime.model.trial import small_input, twin
from nemo_dist_conf.runtime.techniques.tensor.layer_kinds import layer_kind
from nemo_dist_conf.runtime.techniques.tensor.layer_rows import LayerRow, find_rows
from nemo_dist_conf.runtime.techniques.tensor.repairs import pattern_of
from nemo_dist_conf.runtime.techniques.tensor.split_heads import head_counts
from nemo_dist_conf.runtime.techniques.tensor.trial import WHOLE_ELEMENTS, Trial

__all__ = ["derived_plan", "likely_plan"]

#: Of a small input.
_TOKENS = 8
#: Kinds of rows that are tried, a run of the twin for each way; the layers of further ones stay whole.
_MOST_ROWS = 16

_Plan = Mapping[str, str]


def derived_plan(model: nn.Module, trial: Trial, fits: Callable[[_Plan], Mapping[str, str] | None]) -> dict[str, str]:
    """Pattern -> style name, seen to compute what the plain model does; empty where nothing can be split.

    fits: a plan -> the style of each module that it means, or None where widths do not split over the ranks.
    Raises CannotTry.
    """

    seen: dict[tuple[tuple[str, str], ...], bool] = {}

    def is_equal(plan: _Plan) -> bool:
        key = tuple(sorted(plan.items()))
        if key not in seen:
            named = fits(plan)
            seen[key] = named is not None and trial.finding(named) is None
        return seen[key]

    ends = list(_ends(model))
    ways = [list(_ways(model, rows)) for rows in _kinds_of(trial.rows(), ends)]
    if not ways:
        return {}
    # Most models need one way for all of their rows, or two: the last one is slow, and tried where nothing else goes.
    for index in range(2):
        together = _merged([*(way[index if index + 1 < len(way) else 0] for way in ways), *ends[:1]])
        if is_equal(together):
            return together
    taken = [next((way for way in several if is_equal(way)), {}) for several in (*ways, ends)]
    plan = _merged(taken)
    return plan if plan and any(taken[:-1]) and is_equal(plan) else {}


def likely_plan(model: nn.Module) -> dict[str, str]:
    """What ``derived_plan`` begins with, for a plan on paper: the way with the least traffic for every row, not tried.

    model: on meta, or with values; a small twin of it is run on the CPU. Raises what its forward raises there.
    """
    ends, kinds = list(_ends(model)), list[list[LayerRow]]()
    for blocks in (find_blocks(model), Blocks()):  # without blocks left out, where a forward reaches into them
        tried = twin(model, blocks)
        inputs = small_input(tried, _TOKENS)
        try:
            kinds = _kinds_of(find_rows(tried, inputs), ends) if inputs is not None else []
            break
        except Exception:  # the model's own code
            if not blocks or sum(p.numel() for p in model.parameters()) > WHOLE_ELEMENTS:
                raise
    return _merged([*(next(_ways(model, rows)) for rows in kinds), *ends[:1]]) if kinds else {}


def _kinds_of(rows: list[LayerRow], ends: list[dict[str, str]]) -> list[list[LayerRow]]:
    """Rows with the same names but for numbers in them, without a head that closes one."""
    kinds: dict[tuple[str, ...], list[LayerRow]] = {}
    for row in rows:
        if not any(row.closing in end for end in ends):
            kinds.setdefault((*map(pattern_of, row.opening), pattern_of(row.closing)), []).append(row)
    return list(kinds.values())[:_MOST_ROWS]


def _ways(model: nn.Module, rows: list[LayerRow]) -> Iterator[dict[str, str]]:
    """The ways to split rows of one kind."""
    opening = {_in_all(name, row): name for row in rows for name in row.opening}
    closing = {_in_all(row.closing, row) for row in rows}
    if not any(row.inner for row in rows):
        kept = {
            **dict.fromkeys((_in_all(n, row) for row in rows for n in row.between), "replicated_with_grad_allreduce"),
            **dict.fromkeys(opening, "colwise"),
            **dict.fromkeys((_in_all(n, row) for row in rows for n in row.tables), "colwise"),
            **dict.fromkeys(closing, "rowwise"),
        }
        yield kept
        packed = {**kept, **dict.fromkeys(opening, "packed_qkv_colwise")} if len(opening) == 1 else None
        holders = {pattern.rpartition(".")[0]: name.rpartition(".")[0] for pattern, name in opening.items()}
        counting = [pattern for pattern, name in holders.items() if head_counts(model.get_submodule(name))]
        if counting:
            for plan in filter(None, (kept, packed)):
                yield {**plan, **dict.fromkeys(counting, "split_heads")}
    yield {**dict.fromkeys(opening, "colwise_gather_output"), **dict.fromkeys(closing, "rowwise_split_input")}


def _ends(model: nn.Module) -> Iterator[dict[str, str]]:
    """The ways to split the table of words and the head over them, with what is tied to either."""
    found: list[dict[str, str]] = []
    for which in ("get_input_embeddings", "get_output_embeddings"):
        try:
            layer = getattr(model, which)()
        except (AttributeError, NotImplementedError):  # a model that has none
            continue
        weight = getattr(layer, "weight", None)
        if weight is None or layer_kind(layer) not in ("Embedding", "Linear"):
            continue
        groups = [group for group in tied_names(model) if any(model.get_parameter(name) is weight for name in group)]
        names = [name for name, module in model.named_modules() if module is layer]
        names += [name.rpartition(".")[0] for group in groups for name in group]
        kinds = {name: layer_kind(model.get_submodule(name)) for name in dict.fromkeys(names)}
        styles = {"Embedding": "embedding_rowwise", "Linear": "colwise_gather_output"}
        found.append({name: styles[kind] for name, kind in kinds.items() if kind in styles})
    if found:
        yield _merged(found)
    if len(found) > 1:
        yield from found


def _in_all(name: str, row: LayerRow) -> str:
    """A module's name in all rows of a kind: with ``*`` for numbers in the name of what holds the whole row."""
    parts = [member.split(".") for member in (*row.opening, row.closing)]
    shared = list(itertools.takewhile(lambda same: len(set(same)) == 1, zip(*parts)))
    holder = ".".join(same[0] for same in shared)
    inside = name == holder or name.startswith(f"{holder}.")
    return pattern_of(holder) + name[len(holder) :] if inside else name


def _merged(plans: list[dict[str, str]]) -> dict[str, str]:
    return {pattern: style for plan in plans for pattern, style in plan.items()}
