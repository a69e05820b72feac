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

from nemo_dist_conf.runtime.model.materialise import tied_names
from nemo_dist_conf.runtime.techniques.tensor.layer_kinds import layer_kind
from nemo_dist_conf.runtime.techniques.tensor.layer_rows import LayerRow
from nemo_dist_conf.runtime.techniques.tensor.repairs import pattern_of
from nemo_dist_conf.runtime.techniques.tensor.split_heads import head_counts
from nemo_dist_conf.runtime.techniques.tensor.trial import Trial

__all__ = ["derived_plan"]

#: Kinds of rows that are tried, a run of the twin for each way; the layers of further ones stay whole.
_MOST_ROWS = 16

_Plan = Mapping[str, str]


def derived_plan(model: nn.Module, trial: Trial, fits: Callable[[_Plan], Mapping[str, str] | None]) -> dict[str, str]:
    """Pattern -> style name, seen to compute what the plain model does; empty where nothing can be split.

    fits: a plan -> the style of each module that it means, or None where widths do not split over the ranks.
    Raises CannotTry.
    """

    def is_equal(plan: _Plan) -> bool:
        named = fits(plan)
        return named is not None and trial.finding(named) is None

    ends = list(_ends(model))
    rows: dict[tuple[str, ...], list[LayerRow]] = {}
    for row in trial.rows():
        if not any(row.closing in end for end in ends):
            rows.setdefault((*map(pattern_of, row.opening), pattern_of(row.closing)), []).append(row)
    if not rows:
        return {}
    ways = [list(_ways(model, kind)) for kind in list(rows.values())[:_MOST_ROWS]]
    # Most models need one way for all of their rows, or two: the last one is slow, and tried where nothing else goes.
    for index in range(2):
        together = _merged([*(way[index if index + 1 < len(way) else 0] for way in ways), *ends[:1]])
        if is_equal(together):
            return together
    taken = [next((way for way in several if is_equal(way)), {}) for several in (*ways, ends)]
    plan = _merged(taken)
    return plan if plan and any(taken[:-1]) and is_equal(plan) else {}


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
