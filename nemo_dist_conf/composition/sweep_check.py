"""The jobs of a sweep, composed and checked before the first of them starts."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

from hydra.core.utils import filter_overrides
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf, open_dict

from nemo_dist_conf.composition.check import Checked
from nemo_dist_conf.composition.hydra_inside import grid_of_basic_sweeper, written_at
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.wording import assigned, for_shell

__all__ = ["Check", "Job", "SweepRefused", "compose_jobs", "folder_problems", "jobs_of_basic_sweep", "judge", "refusal"]


#: Of a job's config; None: it uses none of our groups. Raises ConfigError.
Check = Callable[[DictConfig], Checked | None]


class SweepRefused(ConfigError, CompactHydraException):
    """Jobs of a sweep cannot work, so none was started; Hydra shows the message alone."""

    def _text(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)

    def __str__(self) -> str:
        return self._text()


@dataclass
class Job:
    """One job: its number in the sweep, the overrides that make it, its config with Hydra's node.

    layout: its mesh in words, "" where the app uses none of our groups. model_type: the name that transformers has
    for its model, None where the config does not say. refused: why it cannot work.
    """

    number: int
    overrides: list[str]
    config: DictConfig
    layout: str = ""
    model_type: str | None = None
    refused: tuple[Problem, ...] = field(default=())

    @property
    def words(self) -> str:
        """The overrides as they are typed, without those of Hydra itself."""
        return " ".join(map(for_shell, filter_overrides(self.overrides)))


def compose_jobs(
    master: DictConfig, overrides: Iterable[Sequence[str]], first: int = 0, loader: Any = None
) -> list[Job]:
    """Compose every job once. master: the sweep's config; loader None: that of the running app."""
    if loader is None:
        from hydra.core.global_hydra import GlobalHydra

        loader = GlobalHydra.instance().config_loader()
    jobs = []
    for number, words in enumerate(overrides, first):
        config = loader.load_sweep_config(master, list(words))
        with open_dict(config):
            config.hydra.job.id, config.hydra.job.num = str(number), number
        jobs.append(Job(number, list(words), config))
    return jobs


def jobs_of_basic_sweep(config: DictConfig) -> list[list[str]]:
    """The overrides of each job of Hydra's own sweeper; none for another one, which decides as it goes."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    sweeper = config.hydra.sweeper
    if not str(sweeper.get("_target_")).endswith(".BasicSweeper"):
        return []
    words = [f"{key}={value}" for key, value in (sweeper.get("params") or {}).items()]
    words += OmegaConf.to_container(config.hydra.overrides.task)  # type: ignore[arg-type]
    parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
    return grid_of_basic_sweeper(parser.parse_overrides(words))


def judge(jobs: list[Job], check: Check | None = None, of: Callable[[DictConfig], Check] | None = None) -> list[Job]:
    """The jobs with their layout or why they are refused. check: for all; of: gives the check of a job's config."""
    for job in jobs:
        try:
            ConfigError.raise_if(folder_problems(job.config, "sweep"))
            own = check if of is None else of(job.config)
            assert own is not None, "one of the two is given"
            checked = own(job.config)
            if checked:
                job.layout, job.model_type = checked.mesh.describe(), checked.facts.model_type
        except ConfigError as error:
            job.refused = error.problems
    return jobs


def folder_problems(config: DictConfig, mode: str) -> Iterable[Problem]:
    """Where the folder of a job cannot be made, by its name or its place. mode: ``run`` or ``sweep``."""
    keys = ["hydra.run.dir"] if mode == "run" else ["hydra.sweep.dir", "hydra.sweep.subdir"]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Hydra 1.4, of override_dirname: when it makes the folder
            folder = Path(*(str(OmegaConf.select(config, key)) for key in keys)).absolute()
        there = next(parent for parent in folder.parents if parent.is_dir())
        longest, most = max(len(os.fsencode(part)) for part in folder.parts), os.pathconf(there, "PC_NAME_MAX")
        typed = [written_at(config.hydra[mode], key.rpartition(".")[2]) for key in keys]
    except Exception:  # what cannot be resolved, or asked of this system, Hydra will tell of
        return
    names = "${hydra.job.num}" if mode == "sweep" else "outputs/${now:%Y-%m-%d}/${now:%H-%M-%S}"
    file = next((place for place in (folder, *folder.parents) if place.exists() and not place.is_dir()), None)
    if longest > most:
        yield Problem(
            what=f"the name of the output folder has {longest} bytes, and the file system takes {most}",
            asked=assigned(keys[-1], typed[-1]),
            allowed=f"names of at most {most} bytes; hydra.job.config.override_dirname.exclude_keys leaves words out",
            instead=assigned(keys[-1], names),
        )
    elif file is not None or not (folder.is_dir() or os.access(there, os.W_OK | os.X_OK)):
        reason = f"nothing may be written in {there}" if file is None else f"{file} is a file"
        asked = assigned(keys[0], typed[0])
        best = assigned(keys[0], f"{'multirun' if mode == 'sweep' else 'outputs'}/${{now:%Y-%m-%d}}/${{now:%H-%M-%S}}")
        yield Problem(
            what=f"the output folder cannot be made: {reason}",
            asked=asked,
            allowed="a folder that can be written",
            instead=best,
        )


def refusal(jobs: Sequence[Job], skip: str | None) -> Problem:
    """One text for all that cannot work. skip: the words that run the others; None: the launcher has none."""
    refused = [job for job in jobs if job.refused]
    lines = [f"{len(refused)} of {len(jobs)} jobs cannot work, so none was started"]
    for job in refused:
        lines.append(f"#{job.number} {job.words}")
        lines += [f"  {line}" for problem in job.refused for line in str(problem).splitlines()]
    valid = [job.words or "no overrides" for job in jobs if not job.refused]
    allowed = "; ".join(valid[:5]) + (f"; {len(valid) - 5} more" if len(valid) > 5 else "")
    if not valid:
        return Problem(
            what="\n".join(lines),
            asked=f"a sweep of {len(jobs)} jobs",
            allowed="none of them",
            instead=jobs[0].refused[0].instead,
        )
    return Problem(
        what="\n".join(lines), asked=f"a sweep of {len(jobs)} jobs", allowed=allowed, instead=skip or valid[0]
    )
