"""Ranks that a launcher started each compose for themselves; here they agree on a time and on what is random."""

from __future__ import annotations

import datetime
import pickle
from typing import Any

from omegaconf import DictConfig, flag_override

from nemo_dist_conf.composition.agreement.config_tree import different_keys, flat_config, same_now
from nemo_dist_conf.composition.agreement.drawn_values import find_drawn, folder_of_run, put_constants, put_drawn
from nemo_dist_conf.composition.agreement.rank_logs import keep_apart
from nemo_dist_conf.composition.agreement.rendezvous import (
    CannotMeet,
    export_ranks,
    rank_store,
    stay_until_read,
    waiting_for_rank_0,
)
from nemo_dist_conf.composition.hydra_inside import config_of_the_running_job
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.topology.launched_ranks import Launched
from nemo_dist_conf.wording import assigned, for_shell

__all__ = ["agree_on_job", "agree_on_run"]


def agree_on_run(config: DictConfig, place: Launched, *, strict: bool) -> None:
    """Before Hydra makes the folder of a single run: one time, and what is random, for all ranks.

    Changes ``config`` in place. Ranks started again after a failure take over what the first start drew.
    strict: ranks that were started with different configs are refused (ConfigError on those that differ from rank 0),
    and all use rank 0's output folder; otherwise such a rank keeps its own config, and a rank that says another folder
    for itself keeps that, as it would without this.
    """
    store = _store(place)
    asked = flat_config(config)
    draws = place.rank == 0 and not store.check(["run"])
    if draws:
        now = datetime.datetime.now()
        same_now(now, config)
        drawn = find_drawn(config)
        put_drawn(config, drawn)
        store.set("run", pickle.dumps((now, asked, drawn, folder_of_run(config))))
    now, theirs, drawn, their_folder = _of_rank_0(store, "run", place)
    same_now(now, config)
    if strict:
        _refuse_different(asked, theirs)
    put_drawn(config, drawn)
    if not draws:
        put_constants(config, drawn)
    folder = folder_of_run(config)
    if strict and folder != their_folder:
        with flag_override(config.hydra, ["readonly", "struct"], False):
            config.hydra.run.dir = folder = their_folder
    if folder == their_folder:
        keep_apart(config, place.rank)


def agree_on_job(config: DictConfig, place: Launched, *, strict: bool) -> None:
    """The same for a job whose folder Hydra has made already, in every rank: a job of a queue's sweep.

    Changes the config that the task function is about to get, and this rank's logging.
    """
    from hydra.core.utils import configure_log

    store = _store(place)
    task = config_of_the_running_job()
    asked, folder = flat_config(task), config.hydra.runtime.output_dir
    key = f"job{config.hydra.job.num}"  # one process may run the jobs of a sweep in turn
    if place.rank == 0:
        now = datetime.datetime.now()
        same_now(now)
        drawn = find_drawn(task)
        store.set(key, pickle.dumps((now, asked, drawn, folder)))
    now, theirs, drawn, their_folder = _of_rank_0(store, key, place)
    same_now(now)
    if strict and their_folder != folder:
        raise ConfigError(
            Problem(
                what=f"rank {place.rank} has another output folder than rank 0 ({their_folder})",
                asked=assigned("hydra.sweep.subdir", config.hydra.sweep.subdir),
                allowed="a name that is the same on all ranks: ${hydra.job.num}, ${hydra.job.override_dirname}",
                instead=assigned("hydra.sweep.subdir", "${hydra.job.num}"),
            )
        )
    if strict:
        _refuse_different(asked, theirs)
    put_drawn(task, drawn)
    if place.rank:
        put_constants(task, drawn)
    if folder == their_folder:
        keep_apart(config, place.rank)
        if place.rank:
            configure_log(config.hydra.job_logging, config.hydra.verbose)


def _store(place: Launched) -> Any:
    from torch.distributed import PrefixStore

    export_ranks(place)
    return PrefixStore("nemo_dist_conf", rank_store(place))


def _of_rank_0(store: Any, key: str, place: Launched) -> Any:
    """What rank 0 has put there, or will put there once it has read its config. Raises CannotMeet where it does not."""
    from torch.distributed import DistError

    try:
        with waiting_for_rank_0(place):
            found = store.get(key)
        if place.rank:
            store.add(f"{key}/read", 1)
    except DistError as error:
        what = f"rank 0 has not said what the config of all ranks is: {str(error).splitlines()[0]}"
        asked, allowed = f"rank {place.rank} of {place.world_size}", "the same program in every rank"
        raise CannotMeet(
            Problem(what=what, asked=asked, allowed=allowed, instead="one command line for all ranks")
        ) from None
    stay_until_read(place, store, f"{key}/read")
    return pickle.loads(found)


def _refuse_different(mine: dict[str, str], theirs: dict[str, str]) -> None:
    keys = different_keys(mine, theirs)[:5]
    if not keys:
        return
    shown = [f"{key} ({theirs.get(key, 'absent')} on rank 0, {mine.get(key, 'absent')} here)" for key in keys]
    asked = [for_shell(f"{key}={mine[key]}") for key in keys if key in mine] or ["the defaults"]
    instead = [
        for_shell(f"{'' if key in mine else '+'}{key}={theirs[key]}") if key in theirs else f"~{key}" for key in keys
    ]
    raise ConfigError(
        Problem(
            what=f"ranks were started with different configs: {'; '.join(shown)}",
            asked=" ".join(asked),
            allowed="one command line for all ranks",
            instead=" ".join(instead),
        )
    )
