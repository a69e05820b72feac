"""Where the ranks of one run meet: a key-value store that the launcher serves, or rank 0 where it serves none."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.topology.world import Launched, launch_command

if TYPE_CHECKING:
    from torch.distributed import TCPStore

__all__ = ["export_ranks", "master_address", "rank_store"]


def rank_store(place: Launched) -> TCPStore:
    """A connection to the store of all ranks; rank 0 serves it where torchrun's agent does not.

    A rank may ask several times: the server on a port is shared within a process.
    """
    from torch.distributed import TCPStore

    host, port = master_address(place)
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "").lower() == "true"
    serves = not agent and place.rank == 0
    return TCPStore(host, port, place.world_size, is_master=serves, wait_for_workers=False, multi_tenant=serves)


def export_ranks(place: Launched) -> None:
    """Set torchrun's variables where another launcher started the ranks, for code that knows no other.

    torch's own ``init_process_group("nccl")`` is such code. What is set already stays.
    """
    host, port = master_address(place)
    values = {
        "RANK": place.rank,
        "WORLD_SIZE": place.world_size,
        "LOCAL_RANK": place.local_rank,
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
    }
    for name, value in values.items():
        os.environ.setdefault(name, str(value))


def master_address(place: Launched) -> tuple[str, int]:
    """Host and port where the ranks meet. Raises ConfigError where nothing says them."""
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if place.source == "Slurm":
        host = host or _first_host(os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", ""))
        port = port or _port_of_job(os.environ.get("SLURM_JOB_ID", "0"))
    elif place.source == "submitit":
        host, port = host or "127.0.0.1", port or _port_of_job(os.environ.get("SUBMITIT_LOCAL_JOB_ID", "0"))
    if not host or not port:
        missing = "MASTER_ADDR" if not host else "MASTER_PORT"
        raise ConfigError(
            Problem(
                f"{place.world_size} ranks, but {missing} is not set, so they cannot meet",
                f"WORLD_SIZE={place.world_size}",
                "started by torchrun, or with MASTER_ADDR and MASTER_PORT set",
                launch_command().format(n=place.world_size, asked="").strip(),
            )
        )
    return host, int(port)


def _port_of_job(job: str) -> str:
    """Two jobs on one node differ in their ids, so mostly in their ports."""
    digits = re.sub(r"\D", "", job) or "0"
    return str(15000 + int(digits) % 15000)


def _first_host(nodes: str) -> str:
    """First host of a Slurm node list such as ``node[003-005,9],other``."""
    match = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    return "".join(part or "" for part in match.groups()) if match else "127.0.0.1"
