"""torch's DistributedDataParallel, and what a user's loop meets where it does more than call the model."""

from __future__ import annotations

import logging
import re
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.engines.averaged_gradients import Averaged
from nemo_dist_conf.runtime.engines.refused_copies import refuse_copy
from nemo_dist_conf.runtime.torch_inside import after_backward, is_made, on_device, own_children, what_is_not_reduced

__all__ = ["OneRankDDP", "SeveralRanksDDP", "check_reduced"]

log = logging.getLogger(__name__)

#: Names of parameters that a message shows.
_SHOWN = 5


class SeveralRanksDDP(DistributedDataParallel):
    """DDP with the model's own attributes and methods, and with refusals that name parameters.

    A method or an inner module that is called by itself, a parameter that is used by itself, and the user's module
    (``model.module``) take part in the reduction: gradients of a backward that no forward of the wrapper prepared are
    averaged at its end.
    """

    def __init__(self, module: nn.Module, **options: Any) -> None:
        super().__init__(module, **options)
        self._is_prepared = False
        self._runs_forward = False
        self._beside_forward = Averaged(module.parameters, [self.process_group], self._is_beside_forward)
        # A model that is freed after its process group was left must not be the one to end the group: DDP's reducer
        # would join gloo's thread while holding the GIL that this thread waits for (seen with torch 2.13). Attributes
        # are freed in the order they were set, so this reference outlives the reducer's.
        self._group_outlives_reducer = self.process_group

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            check_reduced(self)
            self._is_prepared = self._is_prepared or self.require_backward_grad_sync
        self._runs_forward = True
        try:
            return super().forward(*inputs, **kwargs)
        finally:
            self._runs_forward = False

    def __getattr__(self, name: str) -> Any:
        try:
            found = super().__getattr__(name)
        except AttributeError:
            found = _inner_attribute(self, name)
        # ``model.module``, a parameter, or anything that may use one: a loss of it goes past the wrapper's forward.
        if isinstance(found, (nn.Module, torch.Tensor, list, tuple, dict)) or callable(found):
            if not vars(self).get("_runs_forward", True):  # nor before there is anything to reduce
                self._beside_forward.watch()
        return found

    def __deepcopy__(self, memo: Any) -> Any:
        raise refuse_copy(self, "copy.deepcopy(model.module)")

    def _is_beside_forward(self) -> bool:
        """Whether the backward that runs now is one that the reducer does not wait for."""
        if self._is_prepared:
            after_backward(self._forget)
            return False
        return self.require_backward_grad_sync

    def _forget(self) -> None:
        self._is_prepared = False


class OneRankDDP(DistributedDataParallel):
    """What a loop written for DDP meets on one rank: ``module``, ``no_sync`` and the names of DDP, without its reducer.

    There is nothing to average, and the reducer would keep a second copy of all gradients and copy them there and
    back in every step. Inputs are moved to the device as DDP moves them.
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        nn.Module.__init__(self)
        self.module = module
        self.require_backward_grad_sync = True  # what no_sync switches
        self._inputs_to = device if device.type == "cuda" else None

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        if self._inputs_to is not None and (inputs or kwargs):
            inputs, kwargs = on_device(inputs, kwargs, self._inputs_to)
        return self.module(*inputs, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return _inner_attribute(self, name)

    def register_comm_hook(self, state: object, hook: Any) -> None:
        """Hooks are called with a bucket to reduce, and there is none."""
        log.warning("ddp on one rank reduces nothing, so the communication hook will not be called")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)


def _inner_attribute(wrapper: nn.Module, name: str) -> Any:
    """What the user's module has under a name that its wrapper does not have; raises AttributeError as that does."""
    inner = own_children(wrapper).get("module") if is_made(wrapper) else None
    if inner is None:
        raise AttributeError(f"{type(wrapper).__name__!r} object has no attribute {name!r}")
    return getattr(inner, name)


def check_reduced(model: Any) -> None:
    """Raise ConfigError, naming parameters, where the last backward left gradients that are those of this rank alone.

    Of anything but a model under DDP on several ranks, nothing.
    """
    said = what_is_not_reduced(model) if isinstance(model, SeveralRanksDDP) else None
    if said is None:
        return
    names = [name for name, parameter in model.module.named_parameters() if parameter.requires_grad]
    found = re.search(r"did not receive grad for rank \d+:((?: \d+)+)", said)
    unused = [names[int(index)] for index in found[1].split()] if found is not None else []
    shown = f"{', '.join(unused[:_SHOWN])}{', ...' if len(unused) > _SHOWN else ''}"
    count = f"{len(unused)} of {len(names)} parameters ({shown})" if unused else "some parameters"
    if model.static_graph:
        what = f"strategy.static_graph=true: {count} got no gradient in this step, while others of them did before"
        switch = "strategy.static_graph=false strategy.find_unused_parameters=true"
        raise ConfigError(
            Problem(
                what=what,
                asked="strategy.static_graph=true",
                allowed="the same parameters in every step",
                instead=switch,
            )
        )
    what = (
        f"{count} got no gradient in this step on rank {dist.get_rank()}, and DDP waits for all of them: "
        "no gradient of this step can be used"
    )
    switch = "strategy.find_unused_parameters=true"
    allowed = f"{switch}, or a loss to which every parameter that requires a gradient contributes"
    raise ConfigError(
        Problem(what=what, asked="strategy.find_unused_parameters=false", allowed=allowed, instead=switch)
    )
