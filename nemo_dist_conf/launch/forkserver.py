"""The process that ranks are forked from: it imports what they need once, for all jobs of a sweep. No torch here."""

from __future__ import annotations

import multiprocessing
from typing import Iterable

from nemo_dist_conf.launch.settings import Settings

__all__ = ["start_forkserver"]

_OURS = (
    "torch.distributed.elastic.multiprocessing.api",
    "nemo_dist_conf.launch.rank_process",
    "nemo_dist_conf.instantiate",
    "hydra.core.utils",
)
_LAST = "nemo_dist_conf.launch.frozen"


def start_forkserver(settings: Settings, model_types: Iterable[str] = ()) -> None:
    """Returns at once: the forkserver imports while the launcher does. Without effect for other start methods.

    model_types: of the jobs' models, as transformers names them; their modules take longer to import than torch. What
    is not there is left out by the forkserver, and told by the rank that needs it.
    """
    if settings.options.start_method.name != "forkserver":
        return
    from multiprocessing import forkserver

    models = [f"transformers.models.{kind}.modeling_{kind}" for kind in sorted(model_types)]
    auto = ["transformers.models.auto.modeling_auto"] if models else []
    wanted = [*(str(name) for name in settings.options.preload), *_OURS, *auto, *models, _LAST]
    multiprocessing.set_forkserver_preload(wanted)
    forkserver.ensure_running()
