"""Averaged weights of a model that is wrapped or sharded: each rank averages what it holds."""

from __future__ import annotations

import contextlib
from typing import Any, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_dist_conf.errors import ConfigError, DataError, Problem
from nemo_dist_conf.runtime.engines.base import engine_of, unwrapped
from nemo_dist_conf.runtime.model.shard_boxes import local_part, local_values
from nemo_dist_conf.runtime.torch_inside import move_all_towards

__all__ = ["EMA"]


class EMA:
    """Averages of a model's trained parameters over its updates, which lie as the parameters do.

        ema = nemo_dist_conf.EMA(model, decay=0.999)    # as instantiate returned it, under any strategy
        ...
        optimizer.step()
        ema.update()
        ...
        with ema.applied():                             # the model computes with the averages
            evaluate(model)

    No collective is needed, and the memory is that of this rank's part of the parameters, in float32 or more. Buffers
    are the model's own. In a checkpoint it stands among the objects: ``save(..., objects={"ema": ema})``.
    """

    def __init__(self, model: nn.Module, decay: float | None = 0.999) -> None:
        """decay: how much of an average stays in an update; None: the average is the plain mean of the weights at all
        updates, as torch.optim.swa_utils.AveragedModel has it.

        Raises ConfigError for a decay that is not between 0 and 1.
        """
        if decay is not None and not 0 <= decay < 1:
            what = f"decay={decay} is not the part of an average that stays"
            raise ConfigError(
                Problem(
                    what=what,
                    asked=f"EMA(model, decay={decay})",
                    allowed="0 to 1, or None",
                    instead="EMA(model, decay=0.999)",
                )
            )
        self.decay = decay
        self.updates = 0
        self._model = model
        self._averages = {name: _averaged_like(parameter) for name, parameter in self._trained()}

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights that there are now into the averages."""
        weight = 1 / (self.updates + 1) if self.decay is None else 1 - self.decay
        averages, values = self._pairs()
        move_all_towards(averages, [v.to(a.dtype) for a, v in zip(averages, values)], weight)
        self.updates += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model's weights are the averages; afterwards what they were. Not around a backward."""
        averages, values = self._pairs()
        held = [value.clone() for value in values]
        self._put(values, averages)
        try:
            yield
        finally:
            self._put(self._pairs()[1], held)

    def copy_to_model(self) -> None:
        """Make the averages the model's weights."""
        averages, values = self._pairs()
        self._put(values, averages)

    def state_dict(self) -> dict[str, Any]:
        """The averages by their parameters' names in the user's model, sharded as those are, and how many updates."""
        return {"updates": self.updates, "averages": dict(self._averages)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of the same model under the same layout, or with whole tensors under any.

        Raises DataError for averages of other parameters.
        """
        missing = sorted(self._averages.keys() - state["averages"].keys())
        if missing:
            what = f"the averages are not those of this model: {missing[0]} is missing"
            raise DataError(
                Problem(
                    what=what,
                    asked="EMA.load_state_dict",
                    allowed="the model whose averages were saved",
                    instead="EMA(model)",
                )
            )
        for name, parameter in self._trained():
            found = state["averages"][name]
            part = local_values(found) if isinstance(found, DTensor) else local_part(found, parameter)
            local_values(self._averages[name]).copy_(part)
        self.updates = int(state["updates"])

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        engine_of(self._model).show_shards(self._model)
        for name, parameter in unwrapped(self._model).named_parameters():
            if parameter.requires_grad:
                yield name, parameter

    def _pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """This rank's values of the averages, and of the parameters."""
        parameters = dict(self._trained())
        averages = [local_values(average) for average in self._averages.values()]
        return averages, [local_values(parameters[name]) for name in self._averages]

    @torch.no_grad()
    def _put(self, targets: list[Tensor], values: list[Tensor]) -> None:
        for target, value in zip(targets, values):
            target.copy_(value)
        engine_of(self._model).weights_changed(self._model)


def _averaged_like(parameter: nn.Parameter) -> Tensor:
    return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
