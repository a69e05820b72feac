"""Strategy configs and the resolved setup, by the names of the API page."""

from nemo_dist_conf.runtime.distributed_setup import (
    _STRATEGY_MAP,
    ActivationCheckpointingMode,
    DistributedConfig,
    DistributedSetup,
    DistributedStrategyConfig,
    _resolve_strategy_config,
    _StrategyConfigClass,
)
from nemo_dist_conf.runtime.typed_configs import DDPConfig, FSDP2Config, MegatronFSDPConfig, MoEParallelizerConfig

__all__ = [
    "DDPConfig",
    "DistributedSetup",
    "DistributedStrategyConfig",
    "FSDP2Config",
    "MegatronFSDPConfig",
    "MoEParallelizerConfig",
]

# Importable by the page's names, though not part of its __all__.
_ = (ActivationCheckpointingMode, DistributedConfig, _STRATEGY_MAP, _StrategyConfigClass, _resolve_strategy_config)
