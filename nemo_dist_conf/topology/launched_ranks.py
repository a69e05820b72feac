"""How many ranks there are and which one this is, from a launcher's environment variables. No torch."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Iterator, Mapping

from nemo_dist_conf.errors import ConfigError, Problem

__all__ = [
    "Launched",
    "Start",
    "about_to_start",
    "is_rank_variable",
    "is_starting",
    "launch_command",
    "launched",
    "planned_world_size",
    "program",
    "runs_here",
    "set_by_elastic",
    "several_ranks",
]


#: What torch elastic sets for each rank. Source: torch/distributed/elastic/agent/server/local_elastic_agent.py.
_ELASTIC = frozenset(
    "RANK LOCAL_RANK GROUP_RANK ROLE_RANK ROLE_NAME WORLD_SIZE LOCAL_WORLD_SIZE GROUP_WORLD_SIZE ROLE_WORLD_SIZE "
    "MASTER_ADDR MASTER_PORT TORCH_NCCL_ASYNC_ERROR_HANDLING".split()
)
_QUEUES = frozenset("SLURM_PROCID SLURM_LOCALID SLURM_NODEID SUBMITIT_LOCAL_GLOBALID SUBMITIT_LOCAL_LOCALID".split())


def is_rank_variable(name: str) -> bool:
    """Whether this environment variable is a rank's own, so that no other process can answer for it."""
    return set_by_elastic(name) or name in _QUEUES


def set_by_elastic(name: str) -> bool:
    """Whether torch elastic sets this environment variable in the ranks that it starts."""
    return name in _ELASTIC or name.startswith("TORCHELASTIC_")


@dataclass(frozen=True)
class Launched:
    """This process's place among the ranks, as its launcher set it. source: torchrun, Slurm, submitit or none."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    source: str = "none"


def launched(environ: Mapping[str, str] | None = None) -> Launched:
    """torchrun's variables, Slurm's or those of submitit's local jobs when torchrun's are missing, else one process.

    Of Slurm's the step counts, not the job: an interactive allocation for two tasks has a shell that is a step of one,
    and a batch script has none, so that a program which it starts without srun is alone.
    Raises ConfigError where a variable that is set is not a number.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return Launched(_number(env, "RANK"), _number(env, "WORLD_SIZE"), _number(env, "LOCAL_RANK", "0"), "torchrun")
    tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    if "SLURM_PROCID" in env and "SLURM_LOCALID" in env and tasks in env and not _is_batch_script(env):
        return Launched(_number(env, "SLURM_PROCID"), _number(env, tasks), _number(env, "SLURM_LOCALID"), "Slurm")
    if "SUBMITIT_LOCAL_GLOBALID" in env and "SUBMITIT_LOCAL_NTASKS" in env:
        rank, local = _number(env, "SUBMITIT_LOCAL_GLOBALID"), _number(env, "SUBMITIT_LOCAL_LOCALID", "0")
        return Launched(rank, _number(env, "SUBMITIT_LOCAL_NTASKS"), local, "submitit")
    return Launched()


def _is_batch_script(env: Mapping[str, str]) -> bool:
    """Slurm sets ENVIRONMENT=BATCH for the script of a job, and srun a step's id for what it starts in there."""
    return env.get("ENVIRONMENT") == "BATCH" and not {"SLURM_STEP_ID", "SLURM_STEPID"} & env.keys()


@dataclass(frozen=True)
class Start:
    """The ranks that this process is about to start.

    command: words that start {n} of them with {asked}. elsewhere: they will run on other machines than this one.
    """

    world_size: int
    command: str
    elsewhere: bool = False


_START: ContextVar[Start | None] = ContextVar("start", default=None)


@contextmanager
def about_to_start(start: Start) -> Iterator[None]:
    """Inside, configs are checked for the ranks that will run them, not for this process."""
    token = _START.set(start)
    try:
        yield
    finally:
        _START.reset(token)


def is_starting() -> bool:
    """Whether this process is a launcher at work: it is no rank itself, whatever its variables say."""
    return _START.get() is not None


def runs_here() -> bool:
    """Whether a config is checked for ranks of this machine, or of machines like it."""
    start = _START.get()
    return start is None or not start.elsewhere


def planned_world_size() -> int:
    """How many ranks a config is checked for: those about to be started, else those this process is one of."""
    start = _START.get()
    return launched().world_size if start is None else start.world_size


def several_ranks() -> bool:
    """Whether a launcher started this process as one of several; a variable that is no number counts as no."""
    try:
        return launched().world_size > 1
    except ConfigError:
        return False


def _number(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = env.get(name, default) or ""
    if text.isdigit():
        return int(text)
    raise ConfigError(
        Problem(
            what=f"the environment variable {name} is not a number of ranks",
            asked=f"{name}={text}",
            allowed="a whole number, set by the launcher",
            instead=f"unset {name}",
        )
    )


def launch_command() -> str:
    """The words that start this program with {n} ranks and the overrides {asked}, to show in a refusal."""
    start = _START.get()
    return f"torchrun --nproc-per-node {{n}} {program()} {{asked}}" if start is None else start.command


def program() -> str:
    """This program as it is typed after an interpreter: ``-m package.module`` or ``app.py``."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name:
        return f"-m {spec.name.removesuffix('.__main__')}"
    return Path(sys.argv[0]).name if sys.argv and sys.argv[0].endswith(".py") else "app.py"
