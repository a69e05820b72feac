"""The process that ranks are forked from: it imports what they need once, for all jobs of a sweep. No torch here."""

from __future__ import annotations

import multiprocessing

from nemo_dist_conf.launch.settings import Settings

__all__ = ["start_forkserver"]

_OURS = (
    "torch.distributed.elastic.multiprocessing.api",
    "nemo_dist_conf.launch.rank",
    "nemo_dist_conf.instantiate",
    "hydra.core.utils",
)


def start_forkserver(settings: Settings) -> None:
    """Returns at once: the forkserver imports while the launcher does. Without effect for other start methods."""
    if settings.options.start_method.name != "forkserver":
        return
    from multiprocessing import forkserver

    multiprocessing.set_forkserver_preload([*(str(name) for name in settings.options.preload), *_OURS])
    forkserver.ensure_running()
