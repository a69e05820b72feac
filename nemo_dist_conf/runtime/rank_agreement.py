"""All ranks must run the same config: compared before the model's first collective, which would hang otherwise."""

from __future__ import annotations

import hashlib
import pickle
from dataclasses import replace
from enum import Enum
from pathlib import PurePath
from typing import Any, Callable, TypeVar

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf

from nemo_dist_conf.composition.agreement.config_tree import flat_config
from nemo_dist_conf.errors import ConfigError, Problem

__all__ = ["agree_on_config", "agree_on_model", "are_near", "config_mark", "from_main", "together"]

_T = TypeVar("_T")


def agree_on_config(cfg: Any, marks: list[Any]) -> None:
    """Raise ConfigError on every rank, naming the keys that differ, unless all ranks have the same config.

    marks: ``config_mark`` of every rank, exchanged with whatever the ranks exchange first (``together``).
    """
    if len(set(marks)) == 1:
        return
    flat = flat_config(cfg) if isinstance(cfg, DictConfig) else {}
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, flat)
    keys = sorted({key for tree in everyone for key in tree})
    differing = [key for key in keys if len({str(tree.get(key)) for tree in everyone}) > 1]
    lines = []
    for key in differing[:5]:
        values = ", ".join(f"rank {rank}: {tree.get(key)}" for rank, tree in list(enumerate(everyone))[:4])
        lines.append(f"{key} ({values})")
    what = f"ranks were started with different configs: {'; '.join(lines)}"
    asked = " ".join(f"{key}={everyone[dist.get_rank()].get(key)}" for key in differing[:5])
    same = " ".join(f"{key}={everyone[0].get(key)}" for key in differing[:5])
    raise ConfigError(Problem(what=what, asked=asked, allowed="one command line for all ranks", instead=same))


#: How much sums over a model's constants may differ, relative: kinds of CPUs do in the last bits.
_NEAR = 1e-4


def agree_on_model(marks: list[str], sums: Callable[[], Any] | None) -> None:
    """Raise ConfigError on every rank unless all of them built the same model.

    marks: ``Built.mark`` of every rank. sums: this rank's, which are exchanged where the marks differ.
    """
    if len(set(marks)) == 1 or sums is None:
        return
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, sums())
    if not all(are_near(everyone[0], other) for other in everyone[1:]):
        what = "ranks built different models: their constructor uses what is not the same on all of them"
        allowed = "no rank, no time and no generator without a seed in it, or a module with values: rank 0's are taken"
        made = "instantiate(cfg, model=MyModel())"
        raise ConfigError(Problem(what=what, asked="instantiate(cfg, model=MyModel)", allowed=allowed, instead=made))


def are_near(one: tuple[str, list[Any]], other: tuple[str, list[Any]]) -> bool:
    """Whether two ranks' sums are those of one model."""
    if one[0] != other[0] or len(one[1]) != len(other[1]):
        return False
    pairs = zip(one[1], other[1])
    return all(abs(a - b) <= _NEAR * mine[1] for mine, its in pairs for a, b in zip(mine, its))


def config_mark(cfg: Any) -> str:
    """A checksum of the config, interpolations as they are written: ${oc.env:LOCAL_RANK} may differ by rank.

    Of objects that stand in it (a model, a function), their class: the rest of their text may hold an address.
    """
    if not isinstance(cfg, DictConfig):
        return ""
    return hashlib.sha256(repr(_written(OmegaConf.to_container(cfg, resolve=False))).encode()).hexdigest()


def _written(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _written(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_written(item) for item in value]
    plain = value is None or isinstance(value, (bool, int, float, str, bytes, PurePath, Enum, torch.dtype))
    return value if plain else type(value)


def together(make: Callable[[], _T], mark: Callable[[_T], Any] = lambda made: None) -> tuple[_T, list[Any]]:
    """(what make() gives on this rank, mark of it on every rank); where it fails on some, all raise the first error.

    A rank that stops alone would leave the others waiting in their next collective. Without a group: make() alone.
    """
    made: _T | None = None
    error: ConfigError | None = None
    try:
        made = make()
    except ConfigError as problem:
        error = problem
    mine = (error, None if error else mark(made))  # type: ignore[arg-type]
    found = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1 and not _all_alike(mine):
        found = [mine] * dist.get_world_size()
        dist.all_gather_object(found, mine)
    failed = [rank for rank, (problem, _) in enumerate(found) if problem is not None]
    if failed:
        first: Any = found[failed[0]][0]
        if len(failed) == len(found):
            raise first
        where = f"rank {failed[0]}" if len(failed) == 1 else f"{len(failed)} ranks, of them rank {failed[0]}"
        raise type(first)(*(replace(problem, what=f"on {where}: {problem.what}") for problem in first.problems))
    return made, [mark for _, mark in found]  # type: ignore[return-value]


def from_main(make: Callable[[], _T]) -> _T:
    """What ``make()`` gives on global rank 0, on every rank; what it raises there is raised on every rank.

    Every rank calls this. The value goes through pickle; tensors in it should be on the CPU.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return make()
    box: list[Any] = [None]
    error: Exception | None = None
    if dist.get_rank() == 0:
        try:
            box[0] = (True, pickle.dumps(make()))
        except Exception as raised:
            error, box[0] = raised, (False, _portable(raised))
    dist.broadcast_object_list(box, src=0)
    succeeded, sent = box[0]
    if error is not None:
        raise error
    value = pickle.loads(sent)
    if not succeeded:
        raise value
    return value


def _portable(error: Exception) -> bytes:
    """The error through pickle; where it does not come back as its own kind, its text."""
    try:
        sent = pickle.dumps(error)
        if type(pickle.loads(sent)) is type(error):
            return sent
    except Exception:
        pass
    return pickle.dumps(RuntimeError(f"on rank 0: {type(error).__name__}: {error}"))


def _all_alike(mine: tuple[ConfigError | None, Any]) -> bool:
    """Whether every rank succeeded with the same mark: one small collective, where objects would take several."""
    digest = hashlib.sha256(repr(mine[1]).encode()).digest()[:15]
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    word = torch.tensor([mine[0] is None, *digest], dtype=torch.uint8, device=device)
    words = [torch.empty_like(word) for _ in range(dist.get_world_size())]
    dist.all_gather(words, word)
    return all(bool(other[0]) and torch.equal(other, words[0]) for other in words)
