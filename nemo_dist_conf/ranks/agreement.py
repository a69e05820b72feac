"""Ranks that a launcher started each compose for themselves; here they take over what rank 0 composed."""

from __future__ import annotations

import datetime
import os
import pickle
import sys
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, flag_override

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.ranks.logs import keep_apart
from nemo_dist_conf.ranks.meeting import export_ranks, rank_store
from nemo_dist_conf.ranks.tree import different_keys, flat_config, replace_tree, resolve_for_ranks, same_now
from nemo_dist_conf.topology.world import Launched

__all__ = ["agree_on_job", "agree_on_run"]

#: Stores that this process may serve stay open until it ends: another rank may not have read yet.
_open_stores: list[Any] = []


def agree_on_run(config: DictConfig, place: Launched, *, strict: bool) -> None:
    """Before Hydra makes the folder of a single run: one time, one folder and one resolved tree for all ranks.

    Changes ``config`` in place. Ranks started again after a failure take over the tree and folder of the first start.
    strict: ranks that were started with different configs are refused (ConfigError on those that differ from rank 0);
    otherwise such a rank keeps its own config.
    """
    store = _store(place)
    asked = flat_config(config)
    if place.rank == 0 and not store.check(["tree"]):
        now = datetime.datetime.now()
        same_now(now, config)
        with _hydra_knows(config):
            folder = os.path.abspath(str(OmegaConf.select(config, "hydra.run.dir")))
            with flag_override(config.hydra, ["readonly", "struct"], False):
                config.hydra.run.dir = config.hydra.runtime.output_dir = folder
            resolve_for_ranks(config)
        store.set("tree", pickle.dumps((now, asked, config)))
    now, theirs, tree = pickle.loads(store.get("tree"))
    same_now(now, config)
    if _same(asked, theirs, strict):
        replace_tree(config, tree)
    keep_apart(config, place.rank)


def agree_on_job(config: DictConfig, place: Launched) -> None:
    """The same for a job whose folder Hydra has made already, in every rank: a job of a queue's sweep.

    Changes the config that the task function is about to get, and this rank's logging.
    """
    from hydra.core.utils import configure_log

    store = _store(place)
    task = _config_of_the_running_job()
    asked, folder = flat_config(task), config.hydra.runtime.output_dir
    if place.rank == 0:
        now = datetime.datetime.now()
        resolve_for_ranks(task)
        store.set("tree", pickle.dumps((now, asked, folder, task)))
    now, theirs, their_folder, tree = pickle.loads(store.get("tree"))
    same_now(now)
    if their_folder != folder:
        raise ConfigError(
            Problem(
                f"rank {place.rank} has another output folder than rank 0 ({their_folder})",
                f"hydra.sweep.subdir={config.hydra.sweep.subdir}",
                "a name that is the same on all ranks: ${hydra.job.num}, ${hydra.job.override_dirname}",
                "hydra.sweep.subdir='${hydra.job.num}'",
            )
        )
    _same(asked, theirs, strict=True)
    replace_tree(task, tree)
    keep_apart(config, place.rank)
    if place.rank:
        configure_log(config.hydra.job_logging, config.hydra.verbose)


def _store(place: Launched) -> Any:
    from torch.distributed import PrefixStore

    export_ranks(place)
    store = PrefixStore("nemo_dist_conf", rank_store(place))
    _open_stores.append(store)
    return store


def _config_of_the_running_job() -> DictConfig:
    """The tree that Hydra's run_job hands to the task function after its callbacks.

    The callback is given the config that this one was copied from, and nothing else leads to the copy.
    """
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "run_job" and isinstance(frame.f_locals.get("task_cfg"), DictConfig):
            return frame.f_locals["task_cfg"]
        frame = frame.f_back
    raise AssertionError("not called from a callback of hydra.core.utils.run_job")


class _hydra_knows:
    """``${hydra:...}`` can be resolved inside, as it will be in the job."""

    def __init__(self, config: DictConfig) -> None:
        self.config = config

    def __enter__(self) -> None:
        self.before = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(self.config)

    def __exit__(self, *_: Any) -> None:
        HydraConfig.instance().cfg = self.before


def _same(mine: dict[str, str], theirs: dict[str, str], strict: bool) -> bool:
    keys = different_keys(mine, theirs)
    if keys and strict:
        keys = keys[:5]
        shown = [f"{key} ({theirs.get(key, 'absent')} on rank 0, {mine.get(key, 'absent')} here)" for key in keys]
        asked = [f"{key}={mine[key]}" for key in keys if key in mine] or ["the defaults"]
        instead = [f"{'' if key in mine else '+'}{key}={theirs[key]}" if key in theirs else f"~{key}" for key in keys]
        raise ConfigError(
            Problem(
                f"ranks were started with different configs: {'; '.join(shown)}",
                " ".join(asked),
                "one command line for all ranks",
                " ".join(instead),
            )
        )
    return not keys
