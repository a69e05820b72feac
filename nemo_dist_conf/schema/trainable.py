"""The group ``trainable``: which parameters are trained, by name; the schema and, without torch, its rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Collection, Hashable, Iterable, Mapping, TypeVar

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.schema.asked import Asked
from nemo_dist_conf.schema.option import option
from nemo_dist_conf.schema.parameter_names import are_patterns, meant, not_found, patterns_in
from nemo_dist_conf.wording import Spelling, typed

__all__ = ["TrainableConf", "choice_of", "choice_problems", "trainable_problems", "trained"]

_ALLOWED = "a pattern of names of parameters or modules, or a list of patterns; [] for none"
_Key = TypeVar("_Key", bound=Hashable)


@dataclass
class TrainableConf:
    """Which parameters are trained; without a pattern all that the model itself has to train."""

    freeze: Any = option(
        list,
        "parameters that keep their values, by a pattern or a list of them: the name of a parameter, or of a module "
        "for all in it; * any characters, dots too",
    )
    train: Any = option(
        list, "parameters that are trained: alone, these and no others; beside freeze, exceptions to it (train wins)"
    )


def choice_of(values: Mapping[str, Any]) -> tuple[list[str], list[str]] | None:
    """(patterns of freeze, patterns of train); None where there is none, so that nothing is chosen."""
    freeze, train = patterns_in(values["freeze"]), patterns_in(values["train"])
    return (freeze, train) if freeze or train else None


def trained(
    freeze: Collection[str], train: Collection[str], keys: Mapping[str, _Key], now: Collection[_Key]
) -> set[_Key]:
    """The parameters that are to be trained.

    freeze, train: patterns. keys: which parameter each name means; tied names mean one. now: those that the model
    itself has to train.
    """
    wanted = _of(train, keys)
    return wanted if train and not freeze else (set(now) - _of(freeze, keys)) | wanted


def trainable_problems(values: Mapping[str, Any], asked: Asked) -> Iterable[Problem]:
    """Patterns that cannot be, whatever the model's names."""
    for field in ("freeze", "train"):
        value, key = values[field], f"trainable.{field}"
        if not are_patterns(value):
            what = f"{key}={typed(value)} is no pattern of names, nor a list of them"
            words, less = asked.spelling.set(key, value), asked.spelling.set(key, [])
            yield Problem(what=what, asked=words, allowed=_ALLOWED, instead=less)


def choice_problems(
    values: Mapping[str, Any], keys: Mapping[str, _Key], now: Collection[_Key], spelling: Spelling = Spelling()
) -> list[Problem]:
    """Patterns that mean nothing, or would do nothing, and a choice that leaves nothing to train.

    values: of the group. keys, now: as of ``trained``.
    """
    freeze, train = patterns_in(values["freeze"]), patterns_in(values["train"])
    better, wanted = {"freeze": [*freeze], "train": [*train]}, _of(train, keys)
    found: list[tuple[str, str, str]] = []
    for field, patterns in (("freeze", freeze), ("train", train)):
        for pattern in patterns:
            meaning, key, place = _of([pattern], keys), f"trainable.{field}", better[field].index(pattern)
            if not meaning:
                told = not_found(key, pattern, list(keys))
                found.append((field, told.what, told.allowed))
                better[field][place : place + 1] = [told.likely] if told.likely is not None else []
            elif field == "freeze" and meaning <= wanted:
                what = f"{key}: trainable.train names all that {pattern} means, so that it freezes nothing"
                found.append((field, what, "parameters of which some are in no pattern of trainable.train"))
                del better[field][place]
    if not found and (freeze or train) and not trained(freeze, train, keys, now):
        allowed = "patterns that leave some out, or trainable.train for what is to be trained"
        found.append(("freeze", "trainable.freeze leaves no parameter to train", allowed))
        better["freeze"] = []
    return [
        Problem(
            what=what,
            asked=spelling.set(f"trainable.{field}", values[field]),
            allowed=allowed,
            instead=spelling.set(f"trainable.{field}", better[field]),
        )
        for field, what, allowed in found
    ]


def _of(patterns: Collection[str], keys: Mapping[str, _Key]) -> set[_Key]:
    return {keys[name] for pattern in patterns for name in meant(pattern, keys)}
