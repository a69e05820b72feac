"""DDP where there is one rank."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from nemo_dist_conf.runtime.engines.ddp_wrappers import inner_attribute
from nemo_dist_conf.runtime.torch_inside import on_device

__all__ = ["OneRankDDP"]

log = logging.getLogger(__name__)


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
            return inner_attribute(self, name)

    def register_comm_hook(self, state: object, hook: Any) -> None:
        """Hooks are called with a bucket to reduce, and there is none."""
        log.warning("ddp on one rank reduces nothing, so the communication hook will not be called")

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__.copy()

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)
