"""The group ``hydra/launcher``, option ``torchrun``: every job of a sweep as N ranks on torch elastic."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Optional

from nemo_dist_conf.schema.option import option

__all__ = ["OnFailure", "OnInvalid", "StartMethod", "TorchrunConf"]


class StartMethod(Enum):
    """How Python starts a rank's process."""

    forkserver = "forkserver"
    spawn = "spawn"
    fork = "fork"


OnFailure = Enum("OnFailure", {"raise": "raise", "continue": "continue"})
OnFailure.__doc__ = "Whether a sweep ends with the first job that fails."

OnInvalid = Enum("OnInvalid", {"raise": "raise", "skip": "skip"})
OnInvalid.__doc__ = "Whether a sweep starts that holds combinations which cannot work."


@dataclass
class TorchrunConf:
    """Every job of a sweep as N ranks; the words that torchrun has too mean the same here."""

    nproc_per_node: Any = option(1, "ranks on this node: a number; gpu: one a GPU; auto: gpu, or cores without any")
    nnodes: int = option(1, "nodes of a job; the same command is started on each")
    rdzv_backend: str = option("c10d", "how nodes find each other: c10d, or static with node_rank")
    rdzv_endpoint: Optional[str] = option(None, "host:port of the node where all nodes meet; needed for nnodes above 1")
    rdzv_id: str = option("sweep", "name of this sweep at the endpoint, the same on every node")
    node_rank: Optional[int] = option(None, "number of this node from 0, for rdzv_backend=static")
    local_addr: Optional[str] = option(None, "address of this node for the others; null: found out")
    max_restarts: int = option(0, "how often the ranks of a job are started again after one of them failed")
    monitor_interval_s: float = option(0.1, "seconds between two looks at the ranks")
    start_method: StartMethod = option(
        StartMethod.forkserver, "forkserver: from a process that holds the preloaded modules; spawn: from nothing; fork"
    )
    preload: Any = option(lambda: ["torch"], "modules that the forkserver imports once for all jobs")
    env: dict[str, str] = option(dict, "environment variables of the ranks, beside those of this process")
    threads_per_rank: Optional[int] = option(
        None, "CPU threads of a rank; null: OMP_NUM_THREADS where set, else the cores divided by the ranks"
    )
    rdzv_timeout_s: int = option(900, "seconds to wait for the other nodes")
    job_timeout_s: Optional[float] = option(None, "seconds after which a job that still runs has failed; null: none")
    shutdown_timeout_s: int = option(30, "seconds between asking a rank to end and killing it")
    log_dir: Optional[str] = option(None, "folder of what ranks print; null: ranks/ in the job's folder")
    tee: Optional[str] = option(
        None,
        "what is shown on the console as well as in its file, as torchrun's --tee: 3 (stdout and stderr of all), "
        "0:1,1:3; null: rank 0 has the console, the others their files",
    )
    on_failure: OnFailure = option(OnFailure["raise"], "raise: end the sweep with the first failed job; continue")
    on_invalid: OnInvalid = option(
        OnInvalid["raise"], "raise: refuse a sweep that holds a combination which cannot work; skip: run the others"
    )
    resume: Optional[str] = option(None, "folder of a sweep to go on with: only what has not completed runs")
