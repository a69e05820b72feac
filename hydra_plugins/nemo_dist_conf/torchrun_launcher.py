"""The launcher plugin ``hydra/launcher=torchrun``; see search_path.py for what may stand in this folder."""

from typing import Any, Sequence

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

__all__ = ["TorchrunLauncher"]


class TorchrunLauncher(Launcher):
    """Runs every job of a sweep as N ranks. Its options are documented in ``nemo_dist_conf.schema.launcher``."""

    def __init__(self, **options: Any) -> None:
        self.options = options

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from nemo_dist_conf.launch.sweep import TorchrunSweep

        self.sweep = TorchrunSweep(self.options, hydra_context, task_function, config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        return self.sweep.launch(job_overrides, initial_job_idx)
