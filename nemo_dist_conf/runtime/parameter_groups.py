"""The groups that an optimizer of the recipe is made of: settings by name, weight decay, one kind of tensor each."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.schema.optimizer_groups import group_of_each, names_of_groups_problems
from nemo_dist_conf.wording import Spelling

__all__ = ["group_by_name", "parameter_groups"]


def group_by_name(
    groups: Sequence[Mapping[str, Any]], model: nn.Module, decay_1d: bool = False, spelling: Spelling = Spelling()
) -> dict[str, int]:
    """Number of the group that each parameter of a plain model is in, by every name that it has.

    groups: ``optimizer.groups``, whose settings fit. Parameters that are in none are left out.
    Raises ConfigError for groups that would have no parameters.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    keys = {name: id(parameter) for name, parameter in named.items()}
    trained = {id(parameter): parameter.dim() for parameter in named.values() if parameter.requires_grad}
    ConfigError.raise_if(names_of_groups_problems(groups, keys, trained, decay_1d, spelling))
    found = group_of_each(groups, keys)
    return {name: found[key] for name, key in keys.items() if key in found}


def parameter_groups(
    values: Mapping[str, Any], trainable: Sequence[tuple[str, nn.Parameter]], group_of: Mapping[str, int]
) -> list[dict[str, Any]]:
    """What torch.optim takes as parameters: first those with the optimizer's own settings, then group by group.

    values: the node of the optimizer. trainable: (name, parameter). group_of: number of a group by name.
    Where nothing has the optimizer's own settings, there is an empty group of them, by which the learning rate is told.
    """
    groups: Sequence[Mapping[str, Any]] = values.get("groups") or ()
    made: list[dict[str, Any]] = []
    for number in (None, *range(len(groups))):
        said = {} if number is None else groups[number]
        members = [parameter for name, parameter in trainable if group_of.get(name) == number]
        own = {key: value for key, value in said.items() if key not in ("params", "decay_1d")}
        if "betas" in own:
            own["betas"] = tuple(own["betas"])
        held = {**values, **said}
        parts = _by_decay(members, held.get("weight_decay"), held.get("decay_1d", False))
        kinds = [one for part in parts for one in _of_one_kind({**own, **part})]
        made += kinds or ([{"params": []}] if number is None else [])
    return made


def _by_decay(parameters: list[nn.Parameter], weight_decay: float | None, decay_1d: bool) -> list[dict[str, Any]]:
    """One group, or two where weight decay spares the one-dimensional parameters.

    weight_decay None: torch's own default, which may be above 0, so the groups are made then too.
    A DTensor's dimensions are those of the full tensor, so groups do not depend on the layout.
    """
    if decay_1d or weight_decay == 0:
        return [{"params": parameters}]
    decayed = [parameter for parameter in parameters if parameter.dim() > 1]
    spared = [parameter for parameter in parameters if parameter.dim() <= 1]
    return [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]


def _of_one_kind(group: dict[str, Any]) -> list[dict[str, Any]]:
    """A group for its DTensors and one for its plain parameters, where it has both.

    torch updates several parameters of a group at once, but not plain tensors together with DTensors ("got mixed
    torch.Tensor and DTensor", 2.13).
    """
    kinds: dict[bool, list[torch.Tensor]] = {}
    for parameter in group["params"]:
        kinds.setdefault(isinstance(parameter, DTensor), []).append(parameter)
    return [{**group, "params": parameters} for parameters in kinds.values()]
