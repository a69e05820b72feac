"""The config groups: which option names there are and what each holds."""

from __future__ import annotations

import functools
import os
from typing import Any, Callable

from hydra.core.config_search_path import ConfigSearchPath

from nemo_dist_conf.composition.hydra_inside import asked_by_callbacks
from nemo_dist_conf.composition.store import (
    NODE_CLASSES,
    always_call_hooks,
    register,
    register_launcher,
    register_resolver,
    register_sweeper,
    typed_node,
)
from nemo_dist_conf.names import HARDWARE, OWN_GROUPS, SCHEDULES, STRATEGY_NAMES

__all__ = ["config_groups", "register_groups", "register_resolvers"]

#: Variables by which launchers say how many ranks there are; apps without them need not know more.
_RANK_COUNTS = {"WORLD_SIZE", "SLURM_NTASKS", "SLURM_STEP_NUM_TASKS", "SUBMITIT_LOCAL_NTASKS"}


def config_groups() -> dict[str, dict[str, Callable[[], Any]]]:
    """Group -> option -> maker of its store node; the first option of each group is its default.

    Names only: the schemas are imported when a node is made.
    """
    strategies = [name for strategy, aliases in STRATEGY_NAMES.items() for name in (strategy, *aliases)]
    schedules = sorted(SCHEDULES, key=lambda name: name != "1f1b")
    return {
        "strategy": {name: functools.partial(_strategy, name) for name in strategies},
        "parallelism": {"default": _parallelism},
        "pipeline": {name: functools.partial(_pipeline, name) for name in schedules},
        "moe": {"default": _moe},
        **{group: {name: functools.partial(_own, group, name) for name in own} for group, own in OWN_GROUPS.items()},
    }


def register_groups(search_path: ConfigSearchPath) -> None:
    """Register everything with Hydra; called by the plugin for every app, so it must cost next to nothing."""
    register_resolvers()
    hardware = {"hardware": {name: functools.partial(_hardware, name) for name in HARDWARE}}
    switches = {"activation_checkpointing": False, "batch_statistics": "local"}
    register(config_groups(), search_path, switches, hardware, {"strategy": _added_strategies}, OWN_GROUPS)
    register_launcher(_torchrun)
    register_sweeper(_layouts)
    if _RANK_COUNTS & os.environ.keys():
        from nemo_dist_conf.topology.launched_ranks import several_ranks

        if several_ranks():
            always_call_hooks()


def __getattr__(name: str) -> Any:
    """A node class by name: pickle asks for it in a process where Hydra has not asked for the node yet."""
    if name.endswith("Conf"):
        makers = [make for options in config_groups().values() for make in options.values()]
        for make in (*makers, _torchrun, _layouts, *_added_strategies().values()):
            make()
        if name in NODE_CLASSES:
            return NODE_CLASSES[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _strategy(name: str) -> Any:
    from nemo_dist_conf.strategies import find_strategy

    strategy = find_strategy(name)
    return typed_node(strategy.schema, strategy.target, __name__, hooks=True)


def _added_strategies() -> dict[str, Callable[[], Any]]:
    from nemo_dist_conf.strategies.registry import added_strategy_names

    return {name: functools.partial(_strategy, name) for name in added_strategy_names()}


def _parallelism() -> Any:
    from nemo_dist_conf.schema import ParallelismConf

    return typed_node(ParallelismConf, "nemo_dist_conf.mesh.ParallelismSizes", __name__)


def _pipeline(name: str) -> Any:
    from nemo_dist_conf.schema import PipelineConf

    return typed_node(PipelineConf, "nemo_dist_conf.pipelining.PipelineConfig", __name__, pp_schedule=name)


def _moe() -> Any:
    from nemo_dist_conf.schema import MoEConf

    return typed_node(MoEConf, "nemo_dist_conf.config.MoEParallelizerConfig", __name__)


def _own(group: str, name: str) -> Any:
    from nemo_dist_conf.schema.own_groups import OWN_SCHEMAS

    schema = OWN_SCHEMAS[group]
    return typed_node(schema, f"{schema.__module__}.{schema.__qualname__}", __name__, **OWN_GROUPS[group][name])


def _hardware(name: str) -> Any:
    from nemo_dist_conf.schema.hardware import PROFILES, HardwareConf

    return HardwareConf(**PROFILES[name])


def _torchrun() -> Any:
    from nemo_dist_conf.schema.launcher import TorchrunConf

    return typed_node(TorchrunConf, "hydra_plugins.nemo_dist_conf.torchrun_launcher.TorchrunLauncher", __name__)


def _layouts() -> Any:
    from nemo_dist_conf.schema.sweeper import LayoutsConf

    return typed_node(LayoutsConf, "hydra_plugins.nemo_dist_conf.layouts_sweeper.LayoutsSweeper", __name__)


def register_resolvers() -> None:
    """``${nemo_dist.compute_dtype:...}`` and the others that the recipe's YAML and our own nodes use."""

    def compute_dtype(dtype: Any, device: str) -> str:
        from nemo_dist_conf.composition import resolvers

        return resolvers.compute_dtype(dtype, device)

    def autocast_dtype(dtype: Any, device: str) -> str | None:
        from nemo_dist_conf.composition import resolvers

        return resolvers.autocast_dtype(dtype, device)

    def explain(strategy_target: str, *, _root_: Any) -> str:
        from nemo_dist_conf.composition import resolvers

        return resolvers.explain_target(strategy_target, _root_)

    def pipeline_rows(parallelism: Any, global_batch_size: Any, micro_batch_size: Any) -> int:
        from nemo_dist_conf.composition import resolvers

        return resolvers.pipeline_rows(parallelism, global_batch_size, micro_batch_size)

    def callback() -> Any:
        target = "nemo_dist_conf.hooks.DistributedCallback"
        if not asked_by_callbacks():
            return target
        from nemo_dist_conf.composition.callback import callback_as_config

        return callback_as_config()

    for function in (compute_dtype, autocast_dtype, explain, pipeline_rows, callback):
        register_resolver(f"nemo_dist.{function.__name__}", function)
