"""Refusals in the words of the command line that was typed: what is offered has to lead further when it is typed.

A rule knows the tree, not how its keys came into it. ``~foo`` deletes a key that a file brought; one that ``+foo=1``
brought is left away with that word.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from nemo_dist_conf.composition.hydra_inside import root_of
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.wording import for_shell

__all__ = ["WITHOUT", "as_typed_here", "is_chosen", "raw_words"]

#: What is offered where words only have to go.
WITHOUT = "the same without "

_NOTHING = ("=", "=null", "=''", '=""')


def is_chosen(config: Any, group: str) -> bool:
    """Whether a group stands in the defaults list, so that another option of it is chosen without ``+``."""
    return group in (_hydra(config, "runtime.choices") or ())


def as_typed_here(error: ConfigError, config: Any) -> ConfigError:
    """The error with offers that fit the command line which this config, or that it is part of, was composed from."""
    words = raw_words(_hydra(config, "overrides.task"))
    return type(error)(*(replace(problem, instead=_fitted(problem, words)) for problem in error.problems))


def raw_words(overrides: Any) -> list[str]:
    """Hydra's list of overrides as it was typed: the tree that it stands in reads a ``${...}`` in a word as its own."""
    words: Any = OmegaConf.to_container(overrides) if OmegaConf.is_config(overrides) else overrides
    return [str(word) for word in words or ()]


def _hydra(config: Any, key: str) -> Any:
    """What Hydra noted of the tree that a config is part of, else of the running job; None where it made neither."""
    whole: Any = root_of(config) if isinstance(config, DictConfig) else None
    running: Any = HydraConfig.instance().cfg
    for tree in (whole, running):
        found = OmegaConf.select(tree, f"hydra.{key}") if tree is not None else None
        if found is not None:
            return found
    return None


def _fitted(problem: Problem, words: list[str]) -> str:
    offer = problem.instead
    if " " in offer or not offer:
        return offer
    key = _key(offer)
    deleted = [word for word in words if word.startswith("~")]
    if offer.startswith("~"):
        gone = [word for word in words if word not in deleted and _is_in(word, key)]
        gone = gone or [word for word in words if word == offer]  # that it is gone is the problem
        if not gone:  # brought by a node that was typed as a whole, in the place of another
            whole = [word for word in words if word.startswith("+") and _is_in(offer, _key(word))]
            gone = [word for word in deleted if any(_is_in(word, _key(other)) for other in whole)] + whole
    else:
        gone = [word for word in deleted if f"{key}.".startswith(f"{_key(word)}.")]
        gone += [word for word in words if word.startswith("+") and any(_is_in(word, _key(other)) for other in gone)]
        if not gone and _key(problem.asked) == key:  # of a node that is not whole any more
            gone = [word for word in words if (word in deleted or word.endswith(_NOTHING)) and _is_in(word, key)]
    return WITHOUT + " ".join(map(for_shell, gone)) if gone else offer


def _is_in(word: str, key: str) -> bool:
    return f"{_key(word)}.".startswith(f"{key}.")


def _key(word: str) -> str:
    """Where a word leads: ``strategy@dist.strategy=ddp`` to dist.strategy."""
    return word.lstrip("+~'\"").partition("=")[0].rpartition("@")[2]
