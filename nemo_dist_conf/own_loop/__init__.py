"""What a training loop of your own needs beside the model: whose rows are whose, when to stop, what ranks tell others.

Importing this does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_dist_conf.own_loop.global_batches import GlobalBatches
    from nemo_dist_conf.own_loop.preemption import Preemption
    from nemo_dist_conf.runtime.rank_agreement import from_main

__all__ = ["GlobalBatches", "Preemption", "from_main"]

_HOMES = {
    "GlobalBatches": "own_loop.global_batches",
    "Preemption": "own_loop.preemption",
    "from_main": "runtime.rank_agreement",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"nemo_dist_conf.{_HOMES[name]}"), name)
