"""Patterns of parameter names, held against a model whose names are known without building it. No torch."""

from __future__ import annotations

from typing import Any, Iterator, Mapping

from omegaconf import DictConfig, OmegaConf

from nemo_dist_conf.composition.check import Checked
from nemo_dist_conf.errors import Problem
from nemo_dist_conf.families.parameter_names import parameter_names
from nemo_dist_conf.schema.optimizer_groups import names_of_groups_problems
from nemo_dist_conf.schema.trainable import choice_of, choice_problems, trained

__all__ = ["name_problems"]


def name_problems(config: DictConfig, checked: Checked, fields: Mapping[str, Any] | None) -> Iterator[Problem]:
    """Patterns of ``trainable`` and of ``optimizer.groups`` that mean nothing or would do nothing.

    fields: of the model's config; None: it is not of transformers. Of a model that has to be built, and of one that an
    adapter is put into, nothing: the hook tells it before anything is wrapped.
    """
    values = checked.groups["trainable"]
    choice = choice_of(values)
    node = config.optimizer
    groups = node.get("groups") if "_target_" not in node else None
    adapted = checked.groups.get("adapter", {}).get("kind", "none") != "none"
    if fields is None or adapted or not (choice or groups):
        return
    known = parameter_names(fields)
    if known is None:
        return
    keys, dimensions = known
    every = set(dimensions)
    wrong = choice_problems(values, keys, every, checked.spelling)
    yield from wrong
    if groups and not wrong:
        left = trained(*choice, keys, every) if choice is not None else every
        plain: Any = OmegaConf.to_container(groups, resolve=True)
        held = {key: dimensions[key] for key in left}
        yield from names_of_groups_problems(plain, keys, held, node.get("decay_1d", False))
