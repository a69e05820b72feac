"""Distributed training of PyTorch models, configured from any Hydra app's command line.

Names resolve when they are first used, so that importing the package (as Hydra's plugin does in
every app) does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_dist_conf.config import (
        DDPConfig,
        DistributedSetup,
        FSDP2Config,
        MegatronFSDPConfig,
        MoEParallelizerConfig,
    )
    from nemo_dist_conf.errors import ConfigError
    from nemo_dist_conf.instantiate import instantiate
    from nemo_dist_conf.mesh import MeshAxisName, MeshContext, ParallelismSizes
    from nemo_dist_conf.pipelining import PipelineConfig
    from nemo_dist_conf.runtime.ema import EMA
    from nemo_dist_conf.runtime.process_group import initialize_distributed, shutdown_distributed

__version__ = "0.1.0"

__all__ = [
    "ConfigError",
    "DDPConfig",
    "DistributedSetup",
    "EMA",
    "FSDP2Config",
    "MegatronFSDPConfig",
    "MeshAxisName",
    "MeshContext",
    "MoEParallelizerConfig",
    "ParallelismSizes",
    "PipelineConfig",
    "initialize_distributed",
    "instantiate",
    "shutdown_distributed",
]

_HOME = {
    "ConfigError": "errors",
    "DDPConfig": "config",
    "DistributedSetup": "config",
    "EMA": "runtime.ema",
    "FSDP2Config": "config",
    "MegatronFSDPConfig": "config",
    "MeshAxisName": "names",
    "MeshContext": "mesh",
    "MoEParallelizerConfig": "config",
    "ParallelismSizes": "mesh",
    "PipelineConfig": "pipelining",
    "initialize_distributed": "runtime.process_group",
    "instantiate": "instantiate",
    "shutdown_distributed": "runtime.process_group",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # found once: also hides the submodule ``instantiate`` behind its function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
