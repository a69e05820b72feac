"""The config groups: which option names there are and what each holds."""

from __future__ import annotations

from typing import Any

from hydra.core.config_search_path import ConfigSearchPath

from nemo_dist_conf.names import SCHEDULES
from nemo_dist_conf.schema import MoEConf, ParallelismConf, PipelineConf
from nemo_dist_conf.resolvers import register_resolvers
from nemo_dist_conf.schema.store import register, typed_node
from nemo_dist_conf.strategies import STRATEGIES

__all__ = ["config_groups", "register_groups"]


def config_groups() -> dict[str, dict[str, Any]]:
    """Group -> option -> store node; the first option of each group is its default."""
    return {
        "strategy": {
            name: typed_node(strategy.schema, strategy.target, hooks=True)
            for strategy in STRATEGIES
            for name in strategy.names
        },
        "parallelism": {"default": typed_node(ParallelismConf, "nemo_dist_conf.mesh.ParallelismSizes")},
        "pipeline": {
            name: typed_node(PipelineConf, "nemo_dist_conf.pipelining.PipelineConfig", pp_schedule=name)
            for name in sorted(SCHEDULES, key=lambda name: name != "1f1b")
        },
        "moe": {"default": typed_node(MoEConf, "nemo_dist_conf.config.MoEParallelizerConfig")},
    }


def register_groups(search_path: ConfigSearchPath) -> None:
    """Register everything with Hydra; called by the plugin for every app."""
    register_resolvers()
    register(config_groups(), search_path, {"activation_checkpointing": False})
