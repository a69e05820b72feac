"""Which modules activation checkpointing recomputes, of a model whose blocks are known by name. No torch."""

from __future__ import annotations

import fnmatch
from typing import Any, Iterable, Mapping, Sequence

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.names import nearest
from nemo_dist_conf.wording import Spelling, typed

__all__ = ["blocks_in_scope", "named", "recomputed_names", "towers"]


def recomputed_names(
    blocks: Sequence[str],
    words: Mapping[str, str],
    values: Mapping[str, Any],
    inside: Mapping[str, Sequence[str]] | None = None,
    spelling: Spelling = Spelling(),
) -> list[str]:
    """Names of the modules that run again in backward: blocks, or modules inside of blocks.

    Of the blocks in ``scope`` the first of each ``every`` of a list; of those and of what they hold what ``modules``
    names, the outermost where one is inside of another.
    blocks: all of the model, in the order of forward. words: of a block, what its tower takes in (``language``,
    ``vision``, ``audio``), where that is known. values: of the group ``recompute``. inside: of a block, the names of
    modules that it holds; None: not known, so that names of blocks alone are looked through.
    Raises ConfigError for a scope that the model has not, and for a name that no module there has.
    """
    chosen = _every(blocks_in_scope(blocks, words, values["scope"], spelling), values["every"])
    patterns = list(values["modules"])
    if not patterns:
        return chosen
    candidates = [name for block in chosen for name in (block, *(inside or {}).get(block, ()))]
    found = set()
    for pattern in patterns:
        matching = [name for name in candidates if named(pattern, name)]
        if not matching:
            raise ConfigError(_no_module(pattern, patterns, candidates, spelling))
        found.update(matching)
    return [name for name in candidates if name in found and found.isdisjoint(_ancestors(name))]


def blocks_in_scope(
    blocks: Sequence[str], words: Mapping[str, str], scope: str, spelling: Spelling = Spelling()
) -> list[str]:
    """The blocks of the towers that a scope means: all, those of a word, or those in a module of that name."""
    if scope == "all":
        return list(blocks)
    found = [
        block
        for block in blocks
        if words.get(block) == scope or any(named(scope, place) for place in (block, *_ancestors(block)))
    ]
    if not found:
        raise ConfigError(_no_tower(scope, blocks, words, spelling))
    return found


def named(pattern: str, name: str) -> bool:
    """Whether a module's name, or the end of it from a dot on, is the pattern; ``*`` within one part between dots."""
    wanted = pattern.split(".")
    parts = name.split(".")[-len(wanted) :]
    return len(parts) == len(wanted) and all(map(fnmatch.fnmatchcase, parts, wanted))


def towers(blocks: Iterable[str]) -> list[str]:
    """Names of the modules in which a model's lists of blocks lie apart; of the one list where there is one alone."""
    lists = list(dict.fromkeys(_list_of(block) for block in blocks))
    common = lists[0].split(".") if lists else []
    for name in lists[1:]:
        parts = name.split(".")
        same = [one == other for one, other in zip(common, parts)]
        common = common[: same.index(False) if False in same else len(same)]
    if len(lists) < 2:
        return lists
    return list(dict.fromkeys(".".join(name.split(".")[: len(common) + 1]) for name in lists))


def _list_of(block: str) -> str:
    return block.rpartition(".")[0]


def _ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]


def _every(blocks: Sequence[str], every: int) -> list[str]:
    counts: dict[str, int] = {}
    found = []
    for block in blocks:
        place = counts[_list_of(block)] = counts.get(_list_of(block), -1) + 1
        if place % every == 0:
            found.append(block)
    return found


def _no_tower(scope: str, blocks: Sequence[str], words: Mapping[str, str], spelling: Spelling) -> Problem:
    has = ["all", *dict.fromkeys(filter(None, words.values())), *filter(None, towers(blocks))]
    ends = {name.rpartition(".")[2]: name for name in has}
    likely = nearest(scope, has) or [ends[end] for end in nearest(scope.rpartition(".")[2], ends)] or ["all"]
    return Problem(
        what=f"recompute.scope={typed(scope)}: the model has no such tower",
        asked=spelling.set("recompute.scope", scope),
        allowed=", ".join(dict.fromkeys(has)),
        instead=spelling.set("recompute.scope", likely[0]),
    )


def _no_module(pattern: str, patterns: Sequence[str], candidates: Sequence[str], spelling: Spelling) -> Problem:
    # What a block calls its parts is what most people mean: each once, without the block's place.
    ends = list(dict.fromkeys(name.rpartition(".")[2] for name in candidates))
    shown = [end for end in ends if not end.isdigit()] or list(candidates)
    likely = nearest(pattern.rpartition(".")[2], shown)
    others = [each for each in patterns if each != pattern]
    best = [*others, likely[0]] if likely else others
    return Problem(
        what=f"recompute.modules: no block in scope, and no module in one, is named {pattern}",
        asked=spelling.set("recompute.modules", list(patterns)),
        allowed=f"[] for whole blocks, or names of {', '.join([*likely, *(e for e in shown if e not in likely)][:12])}",
        instead=spelling.set("recompute.modules", best),
    )
