"""The Hydra callback that comes with every strategy: nothing wrong starts, and ranks agree on one run."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from dataclasses import dataclass
from typing import Any, Callable

from hydra.core.utils import JobReturn
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from nemo_dist_conf.composition.agreement.rendezvous import CannotMeet, NoAddress
from nemo_dist_conf.composition.agreement.shared_failure import another_rank_told, end, wants_everything
from nemo_dist_conf.composition.check import Checked, check, find_roots
from nemo_dist_conf.composition.command_line import raw_words
from nemo_dist_conf.composition.hydra_inside import error_of_job
from nemo_dist_conf.composition.sweep_check import (
    Check,
    SweepRefused,
    compose_jobs,
    folder_problems,
    jobs_of_basic_sweep,
    judge,
    refusal,
)
from nemo_dist_conf.errors import ConfigError, NemoDistConfError, Problem
from nemo_dist_conf.topology.launched_ranks import Start, about_to_start, is_starting, launch_command, launched, program
from nemo_dist_conf.wording import for_shell

__all__ = ["DistributedCallback", "callback_as_config", "check_of"]

log = logging.getLogger(__name__)

#: Ends of the class names of launchers that run a job as one process.
_ONE_PROCESS = ("BasicLauncher", "JoblibLauncher")
_SKIP = "hydra/launcher=torchrun hydra.launcher.on_invalid=skip"
_TORCHRUN = "hydra_plugins.nemo_dist_conf.torchrun_launcher.TorchrunLauncher"
#: Our plugins that Hydra asks for the jobs of a sweep alone: the group, the class, what it does with them.
_OF_SWEEPS = (
    ("launcher", _TORCHRUN, "starts"),
    ("sweeper", "hydra_plugins.nemo_dist_conf.layouts_sweeper.LayoutsSweeper", "chooses"),
)


class DistributedCallback(Callback):
    """Checks the composed tree before a job starts and ends the program with the message alone.

    Hydra turns an exception of a callback into a warning and runs the task; SystemExit it lets through.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        try:
            _refuse_plugins_without_sweep(config)
            ConfigError.raise_if(folder_problems(config, "run"))
            self.check(config)
        except NemoDistConfError as error:
            end(error)
        place = launched()
        if place.world_size > 1:
            from nemo_dist_conf.composition.agreement.config_agreement import agree_on_run

            strict = any(find_roots(config))
            _agree(lambda: agree_on_run(config, place, strict=strict), strict)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Every combination of a grid is checked before the first job, where the launcher does not do it itself."""
        launcher = str(OmegaConf.select(config, "hydra.launcher._target_"))
        if launcher == _TORCHRUN:
            return
        place = launched()
        try:
            if place.world_size > 1 and any(find_roots(config)):
                raise _sweep_in_every_rank(config, place.world_size)
            start = _planned(config, launcher)
            if start is None:
                return
            with about_to_start(start):
                try:
                    composed = compose_jobs(config, jobs_of_basic_sweep(config))
                except HydraException:  # the sweeper comes upon it too, and Hydra tells it then
                    return
                jobs = judge(composed, self.check)
            if any(job.refused for job in jobs):
                here = launcher.endswith(_ONE_PROCESS)  # a queue's launcher is not to be replaced by one that runs here
                raise SweepRefused(refusal(jobs, _SKIP if here else None))
        except NemoDistConfError as error:
            end(error)

    def on_job_start(self, config: DictConfig, **kwargs: Any) -> None:
        place = launched()
        try:
            self.check(config)
        except NemoDistConfError as error:
            end(error)
        if place.world_size > 1 and place.source != "torchrun" and _is_sweep(config) and not is_starting():
            from nemo_dist_conf.composition.agreement.config_agreement import agree_on_job

            strict = any(find_roots(config))
            _agree(lambda: agree_on_job(config, place, strict=strict), strict)

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """A refusal in the app's own main function ends a single run with the message alone, once for all ranks."""
        error = error_of_job(job_return)
        if error is None or _is_sweep(config) or wants_everything():
            return  # a launcher decides about the jobs of its sweep
        if isinstance(error, NemoDistConfError):
            end(error)
        if another_rank_told():
            raise SystemExit(1)

    def check(self, config: DictConfig) -> Checked | None:
        """Raise ConfigError for what cannot work; an app may extend it. The checked config, where there is one."""
        found = [check(root) for root in find_roots(config)]
        return found[0] if found else None


@dataclass
class _Default(DistributedCallback):
    """The callback as a structured config, which Hydra's instantiate makes an object of without a ``_target_``."""

    _convert_: str = "object"


def callback_as_config() -> DictConfig:
    """What stands at ``hydra.callbacks.nemo_dist_conf`` when Hydra makes the callbacks of an app."""
    return OmegaConf.structured(_Default)


def check_of(config: DictConfig) -> Check:
    """The check that a job's own callbacks do: ours, or what an app extended it to."""
    from hydra.utils import get_object

    for node in (OmegaConf.select(config, "hydra.callbacks") or {}).values():
        kind = get_object(node._target_) if isinstance(node, DictConfig) and "_target_" in node else None
        if isinstance(kind, type) and issubclass(kind, DistributedCallback):
            return kind(**{str(key): node[key] for key in node if not str(key).startswith("_")}).check
    return DistributedCallback().check


def _agree(agree: Callable[[], None], strict: bool) -> None:
    """Ranks of our groups that cannot agree end: Hydra would turn an exception into a warning, and go on.

    An app without our groups goes on as it would without us, each rank with a config and a folder of its own.
    """
    try:
        agree()
    except CannotMeet as error:
        if strict:
            end(error)
        level = logging.DEBUG if isinstance(error, NoAddress) else logging.WARNING
        log.log(level, "the ranks share no output folder: %s", error.what)
    except NemoDistConfError as error:
        end(error)
    except Exception:
        print(traceback.format_exc(), file=sys.stderr, flush=True)
        raise SystemExit(1) from None


def _is_sweep(config: DictConfig) -> bool:
    return OmegaConf.select(config, "hydra.job.num", throw_on_missing=False) is not None


def _refuse_plugins_without_sweep(config: DictConfig) -> None:
    """Hydra ignores launchers and sweepers without ``-m``, and would run one process where many were asked for."""
    words = raw_words(OmegaConf.select(config, "hydra.overrides.hydra"))
    for name, target, does in _OF_SWEEPS:
        typed = [word for word in words if word.lstrip("+").startswith((f"hydra/{name}", f"hydra.{name}"))]
        if not typed or OmegaConf.select(config, f"hydra.{name}._target_") != target:
            continue
        tasks = raw_words(OmegaConf.select(config, "hydra.overrides.task"))
        words = [word for word in words if not word.startswith("hydra.mode=")]  # which says that there was no -m
        raise ConfigError(
            Problem(
                what=f"a {name} {does} the jobs of a sweep; without -m Hydra would run this as one process",
                asked=" ".join(map(for_shell, typed)),
                allowed="-m before the overrides, also for a single job; or torchrun",
                instead=" ".join(["python", program(), "-m", *map(for_shell, [*words, *tasks])]),
            )
        )


def _sweep_in_every_rank(config: DictConfig, world_size: int) -> ConfigError:
    words = " ".join(map(for_shell, raw_words(OmegaConf.select(config, "hydra.overrides.task"))))
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1")) or 1
    more = f" hydra.launcher.nnodes={nodes} hydra.launcher.rdzv_endpoint=HOST:29400" if nodes > 1 else ""
    ranks = f"hydra.launcher.nproc_per_node={world_size // nodes}"
    return ConfigError(
        Problem(
            what=f"{world_size} ranks were started, and each would sweep for itself",
            asked=launch_command().format(n=world_size, asked=f"-m {words}").strip(),
            allowed="a sweep that is started once and starts the ranks of each job",
            instead=f"python {program()} -m hydra/launcher=torchrun {ranks}{more} {words}".strip(),
        )
    )


def _planned(config: DictConfig, launcher: str) -> Start | None:
    """The ranks of each job under a launcher that is known; None for any other."""
    node = config.hydra.launcher
    if launcher.endswith(_ONE_PROCESS):
        return Start(1, launch_command())
    if ".hydra_submitit_launcher." in launcher and OmegaConf.select(config, "hydra.launcher.tasks_per_node"):
        nodes = int(node.get("nodes") or 1)
        per_node = "hydra.launcher.nodes=1 " if nodes > 1 else ""
        command = f"{per_node}hydra.launcher.tasks_per_node={{n}} {{asked}}"
        return Start(nodes * int(node.tasks_per_node), command, elsewhere=not launcher.endswith(".LocalLauncher"))
    return None
