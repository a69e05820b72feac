"""The launcher plugin ``hydra/launcher=torchrun``; see search_path.py for what may stand in this folder."""

from hydra.plugins.launcher import Launcher

__all__ = ["TorchrunLauncher"]


class TorchrunLauncher(Launcher):
    """Runs every job of a sweep as N ranks. Its options are documented in ``nemo_dist_conf.schema.launcher``."""

    def __init__(self, **options):
        self.options = options

    def setup(self, *, hydra_context, task_function, config):
        from nemo_dist_conf.launch.sweep import TorchrunSweep

        self.sweep = TorchrunSweep(self.options, hydra_context, task_function, config)

    def launch(self, job_overrides, initial_job_idx):
        return self.sweep.launch(job_overrides, initial_job_idx)
