"""The launcher's options, checked: how many ranks, where they meet, what happens when one fails. No torch."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

from omegaconf import OmegaConf

from nemo_dist_conf.composition.command_line import WITHOUT
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.schema.launcher import StartMethod, TorchrunConf
from nemo_dist_conf.topology.gpu_presence import cuda_count
from nemo_dist_conf.topology.launched_ranks import Start, set_by_elastic
from nemo_dist_conf.wording import assigned, typed, unknown_name

__all__ = ["Settings", "read_settings"]

_TEE = re.compile(r"[0-3]|(\d+:[0-3])(,\d+:[0-3])*")


@dataclass(frozen=True)
class Settings:
    """Checked options. options: as typed; ranks: of one node."""

    options: TorchrunConf
    ranks: int

    @property
    def world_size(self) -> int:
        return self.ranks * self.options.nnodes

    @property
    def start(self) -> Start:
        """What a config is checked for, and the words that start another number of ranks."""
        one_node = "hydra.launcher.nnodes=1 " if self.options.nnodes > 1 else ""
        return Start(self.world_size, f"{one_node}hydra.launcher.nproc_per_node={{n}} {{asked}}")

    @property
    def threads(self) -> int:
        """CPU threads of a rank."""
        if self.options.threads_per_rank is not None:
            return self.options.threads_per_rank
        given = self.options.env.get("OMP_NUM_THREADS") or os.environ.get("OMP_NUM_THREADS", "")
        return int(given) if given.isdigit() and int(given) else max(1, _cores() // self.ranks)


def read_settings(options: Mapping[str, Any]) -> Settings:
    """The options of the node ``hydra.launcher``. Raises ConfigError with every wrong one."""
    known = [item.name for item in dataclasses.fields(TorchrunConf)]
    conf = TorchrunConf(**{name: _plain(options[name]) for name in known})
    problems = [_stray(name, options[name], known) for name in options if name not in known]

    def wrong(name: str, allowed: str, instead: Any, why: str = "does not fit") -> None:
        key, value = f"hydra.launcher.{name}", _number(getattr(conf, name))
        what, asked = f"{key}={typed(value)} {why}", assigned(key, value)
        problems.append(Problem(what=what, asked=asked, allowed=allowed, instead=assigned(key, instead)))

    ranks = _ranks(conf.nproc_per_node)
    if ranks is None:
        wrong("nproc_per_node", "1, 2, 3, ..., auto, gpu", 1)
    elif ranks == 0:
        wrong("nproc_per_node", "1, 2, 3, ..., auto", "auto", "finds no GPU on this machine")
    if conf.nnodes < 1:
        wrong("nnodes", "1, 2, 3, ...", 1)
    if conf.rdzv_backend not in ("c10d", "static"):
        wrong("rdzv_backend", "c10d, static", "c10d")
    if conf.nnodes > 1 and not conf.rdzv_endpoint:
        wrong("rdzv_endpoint", "host:port of one of the nodes", "node0:29400", "does not say where the nodes meet")
    if conf.rdzv_endpoint and not re.fullmatch(r"[^:\s]+(:\d+)?|\[[0-9a-fA-F:]+\](:\d+)?", conf.rdzv_endpoint):
        wrong("rdzv_endpoint", "host:port", "node0:29400")
    elif conf.rdzv_backend == "static" and conf.rdzv_endpoint and not re.search(r":\d+$", conf.rdzv_endpoint):
        wrong("rdzv_endpoint", "host:port", "node0:29400", "has no port, which rdzv_backend=static needs")
    elif conf.rdzv_backend == "static" and conf.nnodes == 1 and not conf.rdzv_endpoint:
        wrong("rdzv_endpoint", "host:port of this node", "localhost:29400", "does not say where the ranks meet")
    if conf.rdzv_backend == "static" and (conf.node_rank is None or not 0 <= conf.node_rank < conf.nnodes):
        wrong("node_rank", f"0 to {conf.nnodes - 1}, another one on each node", 0)
    if conf.rdzv_backend == "c10d" and conf.node_rank is not None:
        wrong("node_rank", "null (c10d numbers the nodes itself)", None, "needs rdzv_backend=static")
    for name, least in (("max_restarts", 0), ("rdzv_timeout_s", 1), ("shutdown_timeout_s", 0)):
        if getattr(conf, name) < least:
            wrong(name, f"{least} or more", least)
    if conf.monitor_interval_s <= 0:
        wrong("monitor_interval_s", "above 0", 0.1)
    if conf.threads_per_rank is not None and conf.threads_per_rank < 1:
        wrong("threads_per_rank", "1 or more, null", None)
    if conf.job_timeout_s is not None and conf.job_timeout_s <= 0:
        wrong("job_timeout_s", "above 0, null", None)
    if conf.job_timeout_s is not None and threading.current_thread() is not threading.main_thread():
        wrong("job_timeout_s", "null outside the main thread, where no alarm can be set", None)
    if conf.tee is not None and not _TEE.fullmatch(conf.tee):
        wrong("tee", "0 to 3 for all ranks, or rank:value pairs such as 0:1,1:3; null", 3)
    elif conf.tee and ranks and any(int(rank) >= ranks for rank in re.findall(r"(\d+):", conf.tee)):
        wrong("tee", f"ranks of this node, 0 to {ranks - 1}", 3, "names a rank that is not there")
    for name in conf.env:
        if set_by_elastic(name):
            what = f"hydra.launcher.env.{name} would be overwritten: the launcher sets it for each rank"
            asked = assigned(f"+hydra.launcher.env.{name}", _number(conf.env[name]))
            problems.append(Problem(what=what, asked=asked, allowed="any other variable", instead=f"{WITHOUT}{asked}"))
    problems += _preload_problems(conf)
    if conf.resume is not None and not (Path(conf.resume) / "multirun.yaml").is_file():
        what = "is not a sweep's folder"
        wrong("resume", "the folder of a sweep, which holds multirun.yaml", "multirun/DATE/TIME", what)
    ConfigError.raise_if(problems)
    return Settings(conf, ranks or 1)


def _stray(name: str, value: Any, known: list[str]) -> Problem:
    """A key that ``+`` added."""
    asked = assigned(f"+hydra.launcher.{name}", _plain(value))
    return unknown_name(
        name,
        known,
        what=f"hydra.launcher.{name} is not an option",
        asked=asked,
        offer=lambda option: assigned(f"hydra.launcher.{option}", _plain(value)),
        otherwise=f"{WITHOUT}{asked}",
    )


def _number(value: Any) -> Any:
    """The number that a text says: a field of texts takes it without the quotes that make a text of it elsewhere."""
    return int(value) if isinstance(value, str) and value.isdigit() and str(int(value)) == value else value


def _ranks(asked: Any) -> int | None:
    """Ranks of a node; 0 where GPUs were asked for and there is none, None for what is not a number."""
    if asked == "gpu":
        return cuda_count()
    if asked == "auto":
        return cuda_count() or _cores()
    if isinstance(asked, str) and asked.isdigit():
        asked = int(asked)
    return asked if isinstance(asked, int) and not isinstance(asked, bool) and asked >= 1 else None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _preload_problems(conf: TorchrunConf) -> list[Problem]:
    asked = assigned("hydra.launcher.preload", conf.preload)
    if not isinstance(conf.preload, list):
        return [
            Problem(
                what=f"{asked} is not a list",
                asked=asked,
                allowed="a list of modules",
                instead=assigned("hydra.launcher.preload", ["torch"]),
            )
        ]
    if conf.start_method is not StartMethod.forkserver and conf.preload != TorchrunConf().preload:
        what = f"{asked} has an effect with start_method=forkserver only"
        allowed = "hydra.launcher.start_method=forkserver"
        return [Problem(what=what, asked=asked, allowed=allowed, instead=assigned("hydra.launcher.preload", ["torch"]))]
    missing = [str(name) for name in conf.preload if not _importable(str(name))]
    if not missing:
        return []
    rest = assigned("hydra.launcher.preload", [str(name) for name in conf.preload if str(name) not in missing])
    what = f"{asked}: there is no module {', '.join(missing)}"
    return [Problem(what=what, asked=asked, allowed="modules that can be imported", instead=rest)]


def _importable(name: str) -> bool:
    try:
        return name == "__main__" or importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
