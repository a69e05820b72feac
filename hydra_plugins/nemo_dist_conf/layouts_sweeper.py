"""The sweeper plugin ``hydra/sweeper=layouts``; see search_path.py for what may stand in this folder."""

from typing import Any

from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

__all__ = ["LayoutsSweeper"]


class LayoutsSweeper(Sweeper):
    """Runs the fastest layouts of a plan's search. Options: ``nemo_dist_conf.schema.sweeper``."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from nemo_dist_conf.plan.sweeper import LayoutsSweep

        self.sweep_of_layouts = LayoutsSweep(self.options, hydra_context, task_function, config)

    def sweep(self, arguments: list[str]) -> Any:
        return self.sweep_of_layouts.run(arguments)
