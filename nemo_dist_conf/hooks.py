"""The Hydra callback that comes with every strategy: nothing wrong starts, and ranks agree on one run."""

from __future__ import annotations

import datetime
import logging
import os
import sys
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, flag_override

from nemo_dist_conf.compose import check, find_roots
from nemo_dist_conf.errors import NemoDistConfError
from nemo_dist_conf.store import register_resolver
from nemo_dist_conf.topology.world import Launched, launched

__all__ = ["DistributedCallback", "agree_on_run"]

log = logging.getLogger(__name__)


class DistributedCallback(Callback):
    """Checks the composed tree before a job starts and ends the program with the message alone.

    Hydra turns an exception of a callback into a warning and runs the task; SystemExit it lets through.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._refuse(config)
        place = launched()
        if place.source == "torchrun" and place.world_size > 1:
            agree_on_run(config, place)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._refuse(config)  # in a sweep, each job's own config is known only here

    def check(self, config: DictConfig) -> None:
        """Raise ConfigError for what cannot work; an app may extend it."""
        for root in find_roots(config):
            check(root)

    def _refuse(self, config: DictConfig) -> None:
        try:
            self.check(config)
        except NemoDistConfError as error:
            if launched().rank == 0:
                print(error, file=sys.stderr, flush=True)
            raise SystemExit(1) from None


def agree_on_run(config: DictConfig, place: Launched) -> None:
    """Under torchrun: one time for all ranks, so one output folder; only rank 0 logs to the console.

    Every rank composes for itself. The first to ask writes the time into the agent's store, all use it.
    """
    from torch.distributed import TCPStore

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true":
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(host, port, is_master=False, wait_for_workers=False)
        mine = datetime.datetime.now().isoformat()
        agreed = datetime.datetime.fromisoformat(store.compare_set("nemo_dist_conf/now", "", mine).decode())
        register_resolver("now", lambda pattern: agreed.strftime(pattern), use_cache=True)
        OmegaConf.clear_cache(config)
    if place.rank == 0:
        return
    with flag_override(config, ["readonly", "struct"], False):
        config.hydra.output_subdir = None
        handlers = OmegaConf.select(config, "hydra.job_logging.handlers")
        if handlers is not None and "file" in handlers:
            config.hydra.job_logging.root.handlers = ["file"]
            # The folder is known only once the job runs, so it stays an interpolation here.
            handlers.file.filename = f"${{hydra.runtime.output_dir}}/${{hydra.job.name}}.rank{place.rank}.log"
