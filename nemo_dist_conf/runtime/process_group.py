"""Start or join the process group: NCCL on GPUs, gloo on CPU, one process without a launcher."""

from __future__ import annotations

import atexit
import datetime
import logging
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist

from nemo_dist_conf.composition.agreement.rendezvous import all_have_come, is_started_by_agent, rank_store
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.torch_inside import group_timeout
from nemo_dist_conf.topology.launched_ranks import Launched, launched
from nemo_dist_conf.wording import assigned

__all__ = ["DistInfo", "choose_device", "host_group", "initialize_distributed", "shutdown_distributed"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DistInfo:
    """This process among the ranks. device: where its model and batches live."""

    backend: str
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def choose_device(device: str | torch.device = "auto", local_rank: int = 0) -> torch.device:
    """The device of this rank: ``auto`` takes the GPU of its local rank where there is one, else the CPU.

    Raises ConfigError where CUDA is asked for and this process has no GPU of its own.
    """
    kind = None if str(device) == "auto" else str(device).partition(":")[0]
    if kind not in (None, "cpu", "cuda"):
        asked = assigned("device", device)
        raise ConfigError(
            Problem(what=f"{asked} is not supported", asked=asked, allowed="auto, cpu, cuda", instead="device=auto")
        )
    if kind == "cpu" or (kind is None and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if local_rank >= count:
        what = f"rank with local rank {local_rank} has no GPU of its own ({count} visible)"
        instead = f"torchrun --nproc-per-node {count} ..." if count else "device=cpu"
        raise ConfigError(
            Problem(
                what=what,
                asked=assigned("device", device),
                allowed="one GPU per rank of a node, or device=cpu",
                instead=instead,
            )
        )
    return torch.device("cuda", local_rank)


def initialize_distributed(
    backend: str | None = None, timeout_minutes: float = 10.0, device: str | torch.device = "auto"
) -> DistInfo:
    """Join the process group that the launcher prepared, or make one of a single process.

    backend None: ``nccl`` (with gloo for host tensors) on CUDA, ``gloo`` on CPU. A group that already
    exists is joined as it is. Ranks come from torchrun's variables, from Slurm's when those are missing.
    timeout_minutes: how long a collective may wait for the slowest rank, over whichever axis of the meshes, and all
    ranks for one that is not there.
    Raises ConfigError where the variables are incomplete, the device is missing or ranks do not come.
    """
    place = launched()
    own_device = choose_device(device, place.local_rank)
    if dist.is_initialized():
        return DistInfo(dist.get_backend(), dist.get_rank(), dist.get_world_size(), own_device)
    if own_device.type == "cuda":
        torch.cuda.set_device(own_device)
    chosen = backend or ("cpu:gloo,cuda:nccl" if own_device.type == "cuda" else "gloo")
    dist.init_process_group(
        chosen,
        store=_store(place, 60 * timeout_minutes),
        rank=place.rank,
        world_size=place.world_size,
        timeout=datetime.timedelta(minutes=timeout_minutes),
    )
    atexit.register(shutdown_distributed)
    log.debug("process group: %s, rank %d of %d, from %s", chosen, place.rank, place.world_size, place.source)
    return DistInfo(chosen, place.rank, place.world_size, own_device)


def shutdown_distributed() -> None:
    """Leave the process group, if there is one. Safe to call twice."""
    if dist.is_initialized():
        dist.destroy_process_group()


def host_group(apart: bool = False) -> dist.ProcessGroup | None:
    """A group of all ranks for values on the CPU; None: the default group, or there is none.

    apart: one of its own, whose collectives may run beside the default group's. Every rank has to call this.
    """
    if not dist.is_initialized():
        return None
    has_gloo = "gloo" in str(dist.get_backend_config())
    return dist.new_group(backend="gloo", timeout=group_timeout()) if apart or not has_gloo else None


def _store(place: Launched, timeout_s: float) -> dist.Store:
    if place.world_size == 1:
        return dist.HashStore()  # no port, so any number of single processes can run side by side
    # A restarted group finds the keys of the one before it in the agent's store, so each attempt has its own.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"attempt{attempt}", rank_store(place))
    if not is_started_by_agent():
        all_have_come(place, store, timeout_s)
    return store
