"""DistributedSetup: sizes and policies, resolved into meshes and typed configs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, Literal, Union, cast

from nemo_dist_conf.composition.check import Checked
from nemo_dist_conf.composition.sections import strategy_of
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.names import STRATEGY_NAMES
from nemo_dist_conf.runtime.device_meshes import MeshContext
from nemo_dist_conf.runtime.typed_configs import (
    DDPConfig,
    FSDP2Config,
    MegatronFSDPConfig,
    MoEParallelizerConfig,
    ParallelismSizes,
    PipelineConfig,
    typed_config,
    unknown_options,
)
from nemo_dist_conf.strategies import find_strategy, strategy_names, strategy_of_config, unknown_strategy
from nemo_dist_conf.topology.checkpointing_modes import one_mode

if TYPE_CHECKING:
    import torch

__all__ = [
    "ActivationCheckpointingMode",
    "DistributedConfig",
    "DistributedSetup",
    "DistributedStrategyConfig",
    "setup_from_checked",
]

ActivationCheckpointingMode = Union[bool, Literal["selective"]]
DistributedStrategyConfig = Union["FSDP2Config", "MegatronFSDPConfig", "DDPConfig"]
DistributedConfig = DistributedStrategyConfig

_StrategyConfigClass = type[FSDP2Config] | type[MegatronFSDPConfig] | type[DDPConfig]
#: By the names of the page; a strategy of another package, whose class may import this module, is found by its own.
_STRATEGY_MAP: Dict[str, _StrategyConfigClass] = {
    name: find_strategy(strategy).config
    for strategy, aliases in STRATEGY_NAMES.items()
    for name in (strategy, *aliases)
}


def _resolve_strategy_config(
    strategy: str | DistributedStrategyConfig, **strategy_kwargs: Any
) -> DistributedStrategyConfig:
    """The typed config for a name (with its options), a config object, which is passed through, or a composed node.

    Raises ConfigError for an unknown name or option, and for options beside an object.
    """
    if strategy_of_config(strategy) is not None:
        if strategy_kwargs:
            given = ", ".join(strategy_kwargs)
            what = "options were given beside a strategy config object"
            raise ConfigError(
                Problem(
                    what=what,
                    asked=given,
                    allowed="the object alone, or a name and options",
                    instead=type(strategy).__name__,
                )
            )
        return cast(DistributedStrategyConfig, strategy)
    found = strategy_of(strategy)
    if found is not None and not strategy_kwargs:
        return typed_config(strategy, found.config, "strategy")
    if not isinstance(strategy, str) or strategy.lower() not in strategy_names():
        raise ConfigError(unknown_strategy(strategy))
    config = find_strategy(strategy.lower()).config
    known = [item.name for item in dataclasses.fields(config)]
    unknown = [key for key in strategy_kwargs if key not in known]
    if unknown:
        said = f"strategy={strategy.lower()}"
        raise ConfigError(unknown_options("strategy", said, unknown, strategy_kwargs, known))
    return config(**strategy_kwargs)


@dataclass(frozen=True)
class DistributedSetup:
    """The resolved topology and execution policies of a run.

    activation_checkpointing: as it was given to ``build``. strategy_config.activation_checkpointing is what is
    executed: the same where it was given, else the strategy's own answer.
    """

    mesh_context: MeshContext
    strategy_config: DistributedStrategyConfig | None = None
    pipeline_config: PipelineConfig | None = None
    moe_parallel_config: MoEParallelizerConfig | None = None
    activation_checkpointing: ActivationCheckpointingMode = False

    @classmethod
    def build(
        cls,
        strategy: str | DistributedStrategyConfig = "fsdp2",
        parallelism_sizes: ParallelismSizes | None = None,
        pipeline_config: PipelineConfig | dict | None = None,
        moe_parallel_config: MoEParallelizerConfig | dict | None = None,
        activation_checkpointing: ActivationCheckpointingMode = False,
        world_size: int | None = None,
    ) -> DistributedSetup:
        """Meshes and typed configs from sizes and policies, on the current process group (started if there is none).

        strategy: a name, an alias, a typed config or a composed node. Mappings are accepted for sizes, pipeline and
        MoE configs. A config that is given stays that object, but for a strategy's whose own answer to
        activation_checkpointing is another.
        pipeline_config and moe_parallel_config belong to pp_size and ep_size above 1 and are then filled with
        their defaults when None. world_size None: that of the process group or the launcher.
        Raises ConfigError with every problem that can be told from these values.
        """
        config = _resolve_strategy_config(strategy)
        own = strategy_of_config(config)
        if own is None:
            raise AssertionError(f"{config} was resolved, and is of no strategy")
        sizes = typed_config(parallelism_sizes, ParallelismSizes, "parallelism") or ParallelismSizes()
        pipeline = typed_config(pipeline_config, PipelineConfig, "pipeline")
        moe = typed_config(moe_parallel_config, MoEParallelizerConfig, "moe")
        problems = _belongs("pipeline_config", pipeline, "pp_size", sizes.pp_size)
        problems += _belongs("moe_parallel_config", moe, "ep_size", sizes.ep_size)
        said = {
            "activation_checkpointing": activation_checkpointing,
            "strategy.activation_checkpointing": config.activation_checkpointing,
        }
        executed, wrong = one_mode(said, own.activation_checkpointing, own.name)
        ConfigError.raise_if([*problems, *wrong])
        if sizes.pp_size > 1 and pipeline is None:
            pipeline = PipelineConfig()
        if sizes.ep_size > 1 and moe is None:
            moe = MoEParallelizerConfig()
        if config.activation_checkpointing != executed:
            config = dataclasses.replace(config, activation_checkpointing=cast(Any, executed))
        context = MeshContext.build(config, sizes, world_size=world_size)
        return cls(context, config, pipeline, moe, activation_checkpointing)


def setup_from_checked(checked: Checked, device: str | torch.device = "auto") -> DistributedSetup:
    """DistributedSetup for a config that passed ``check``, with the mesh that was solved there.

    Starts the process group if there is none. Raises ConfigError where it has another number of ranks than the config
    was checked for.
    """
    mode: Any = checked.activation_checkpointing
    config = checked.strategy.config(**{**checked.strategy_values, "activation_checkpointing": mode})
    return DistributedSetup(
        MeshContext.of_spec(checked.mesh, checked.strategy, config, device),
        config,
        PipelineConfig(**checked.pipeline) if checked.sizes["pp_size"] > 1 else None,
        MoEParallelizerConfig(**checked.moe) if checked.sizes["ep_size"] > 1 else None,
        mode,
    )


def _belongs(name: str, config: Any, size_name: str, size: int) -> list[Problem]:
    if config is None or size > 1:
        return []
    what = f"{name} was given, but {size_name} is 1, so it would do nothing"
    return [Problem(what=what, asked=name, allowed=f"{name}=None, or {size_name} of 2 or more", instead=f"{name}=None")]
