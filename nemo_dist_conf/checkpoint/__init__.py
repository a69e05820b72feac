"""Checkpoints that any layout can load: saved whole or not at all, checked before they are used.

``Checkpoints`` is what a training loop holds; ``save`` and ``load`` are for a single one. Importing this does not
import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_dist_conf.checkpoint.export import export_adapter, export_hf
    from nemo_dist_conf.checkpoint.manifest import find_checkpoint
    from nemo_dist_conf.checkpoint.save_and_load import Restored, load, save
    from nemo_dist_conf.checkpoint.series import Checkpoints

__all__ = ["Checkpoints", "Restored", "export_adapter", "export_hf", "find_checkpoint", "load", "save"]

_HOMES = {
    "Checkpoints": "series",
    "Restored": "save_and_load",
    "export_adapter": "export",
    "export_hf": "export",
    "find_checkpoint": "manifest",
    "load": "save_and_load",
    "save": "save_and_load",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
