"""How many ranks there are and which one this is, from a launcher's environment variables. No torch."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Mapping

from nemo_dist_conf.errors import ConfigError, Problem

__all__ = ["Launched", "launch_command", "launched"]


@dataclass(frozen=True)
class Launched:
    """This process's place among the ranks, as its launcher set it. source: torchrun, Slurm or none."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    source: str = "none"


def launched(environ: Mapping[str, str] | None = None) -> Launched:
    """torchrun's variables, Slurm's when torchrun's are missing, else one process.

    Raises ConfigError where a variable that is set is not a number.
    """
    env = os.environ if environ is None else environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return Launched(
            _number(env, "RANK"), _number(env, "WORLD_SIZE"), _number(env, "LOCAL_RANK", "0"), "torchrun"
        )
    if "SLURM_PROCID" in env and "SLURM_NTASKS" in env and "SLURM_LOCALID" in env:
        return Launched(
            _number(env, "SLURM_PROCID"), _number(env, "SLURM_NTASKS"), _number(env, "SLURM_LOCALID"), "Slurm"
        )
    return Launched()


def _number(env: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = env.get(name, default) or ""
    if text.isdigit():
        return int(text)
    raise ConfigError(
        Problem(
            f"the environment variable {name} is not a number of ranks",
            f"{name}={text}",
            "a whole number, set by the launcher",
            f"unset {name}",
        )
    )


def launch_command() -> str:
    """The words that start this program with {n} ranks and the overrides {asked}, to show in a refusal."""
    main = sys.modules.get("__main__")
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name:
        program = f"-m {spec.name.removesuffix('.__main__')}"
    else:
        program = Path(sys.argv[0]).name if sys.argv and sys.argv[0].endswith(".py") else "app.py"
    return f"torchrun --nproc-per-node {{n}} {program} {{asked}}"
