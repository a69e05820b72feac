"""Which parameters of a model are trained: chosen before anything is wrapped, told once."""

from __future__ import annotations

import logging
from typing import Any, Mapping

from torch import nn

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.schema.trainable import choice_of, choice_problems, trained
from nemo_dist_conf.wording import Spelling

__all__ = ["choose_trained", "refuse_choice"]

log = logging.getLogger(__name__)


def choose_trained(model: nn.Module, values: Mapping[str, Any], spelling: Spelling = Spelling()) -> None:
    """Let a plain model, with or without its values, train what the group ``trainable`` says.

    values: of the group, by field; without a pattern the model stays as it is. Parameters of whole numbers are never
    trained.
    Raises ConfigError, on every rank the same, for a pattern that means nothing, and where nothing is left to train.
    """
    choice = choice_of(values)
    if choice is None:
        return
    named = dict(model.named_parameters(remove_duplicate=False))
    named = {name: one for name, one in named.items() if one.is_floating_point() or one.is_complex()}
    keys = {name: id(parameter) for name, parameter in named.items()}
    now = {id(parameter) for parameter in named.values() if parameter.requires_grad}
    ConfigError.raise_if(choice_problems(values, keys, now, spelling))
    chosen = trained(*choice, keys, now)
    for parameter in named.values():
        parameter.requires_grad_(id(parameter) in chosen)
    log.info("trained: %s", _share(model))


def refuse_choice(values: Mapping[str, Any], spelling: Spelling = Spelling()) -> None:
    """Raise ConfigError for a choice of what is trained where no model is given to make it in."""
    fields = [field for field in ("freeze", "train") if values[field]]
    ConfigError.raise_if(
        Problem(
            what=f"trainable.{field} names parameters, and there is no model",
            asked=spelling.set(f"trainable.{field}", values[field]),
            allowed="instantiate(cfg, model=...), or a node model; requires_grad_ in a model that is wrapped by hand",
            instead=spelling.set(f"trainable.{field}", []),
        )
        for field in fields
    )


def _share(model: nn.Module) -> str:
    """How much of a plain model is trained, in words: ``1,024 of 8,192 parameters (12.5%), 2 of 9 tensors``."""
    parameters = list(model.parameters())
    held = [parameter for parameter in parameters if parameter.requires_grad]
    total, count = sum(one.numel() for one in parameters), sum(one.numel() for one in held)
    share = 100 * count / total if total else 0.0
    return f"{count:,} of {total:,} parameters ({share:.3g}%), {len(held)} of {len(parameters)} tensors"
