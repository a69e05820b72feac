"""What a wrapped model holds and calls, counted by torch, beside what the plan says of it."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_dist_conf.composition.check import check
from nemo_dist_conf.families.built_shape import BuiltShape
from nemo_dist_conf.families.registry import find_family
from nemo_dist_conf.families.shapes import ModelShape, shape_of
from nemo_dist_conf.gradients import accumulate
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.plan import Job
from nemo_dist_conf.plan.from_config import untrained_of, update_of
from nemo_dist_conf.plan.memory import resting_bytes
from nemo_dist_conf.plan.rank_shards import Place
from nemo_dist_conf.plan.traffic import traffic_of
from nemo_dist_conf.runtime.engines.pipeline_model import Pipeline
from nemo_dist_conf.runtime.on_paper import read_model
from nemo_dist_conf.schema.hardware import PROFILES, HardwareConf
from tests.dist.layouts import ROWS, composed, loss_sum

__all__ = ["CALLS", "differences", "job_for", "place_of", "seen_of_rank", "shape_for"]

#: Operator -> the kind of collective that the plan calls it.
CALLS = {
    "c10d.allgather_": "all_gather",
    "c10d._allgather_base_": "all_gather",
    "_c10d_functional.all_gather_into_tensor": "all_gather",
    "c10d._reduce_scatter_base_": "reduce_scatter",
    "_c10d_functional.reduce_scatter_tensor": "reduce_scatter",
    "c10d.allreduce_": "all_reduce",
    "_c10d_functional.all_reduce": "all_reduce",
    "c10d.alltoall_base_": "all_to_all",
    "_c10d_functional.all_to_all_single": "all_to_all",
    "c10d.send": "send",
}


class Collectives(TorchDispatchMode):
    """Every collective that runs inside: (kind, bytes given, bytes returned)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it calls what it needs on its parts, which is seen here again
        out = func(*args, **(kwargs or {}))
        kind = CALLS.get(str(func).rpartition(".")[0])
        if kind is not None:
            given, returned = _bytes((args, kwargs)), _bytes(out)
            if str(func).startswith("c10d.") and returned:  # in place: what is returned was given too
                given -= returned if kind in ("all_gather", "reduce_scatter") else 0
            self.calls.append((kind, given, returned))
        return out


def _bytes(tree: Any) -> int:
    return sum(t.numel() * t.element_size() for t in pytree.tree_leaves(tree) if isinstance(t, Tensor))


def shape_for(config: dict[str, Any]) -> ModelShape | BuiltShape:
    """By the family's row, else read off the built model."""
    family = find_family(config["model_type"])
    return shape_of(config) if family is not None and family.shapes is not None else read_model({"config": config})


def job_for(
    words: list[str],
    ranks: int,
    config: dict[str, Any],
    optimizer: Any,
    rows: int,
    length: int,
    trainable: dict[str, Any] | None = None,
) -> Job:
    """The job that these overrides ask for, with the rows of a global batch."""
    nodes = {"model": {"config": config}, "optimizer": optimizer, **({"trainable": trainable} if trainable else {})}
    checked = check(composed(*words, **nodes), ranks)
    model = shape_for(config)
    micro, count = rows // checked.mesh.size("dp"), 1
    if checked.mesh.size("pp") > 1:
        micro = checked.pipeline["pp_microbatch_size"]
        count = checked.pipeline["pp_batch_size"] // micro
    autocast = checked.strategy_values.get("autocast_dtype")
    return Job(
        strategy=checked.strategy,
        options=checked.strategy_values,
        mesh=checked.mesh,
        model=model,
        hardware=HardwareConf(**PROFILES["cpu"]),
        rows=micro,
        seq_len=length,
        microbatches=count,
        pipeline=checked.pipeline,
        moe=checked.moe,
        groups=checked.groups,
        checkpointing=checked.activation_checkpointing,
        autocast=getattr(autocast, "name", autocast),
        update=update_of(optimizer),
        untrained=untrained_of(checked.groups["trainable"], model),
    )


def place_of(job: Job, rank: int) -> tuple[int, Place]:
    """(pipeline rank, place) of a global rank; shards count dp_shard and cp, the latter fastest."""
    stage = job.mesh.world_size // job.pp
    pp, inside = divmod(rank, stage)
    shard = inside // job.tp % job.shards
    return pp, Place(inside % job.tp, shard, inside % job.ep, inside // job.ep)


def seen_of_rank(
    words: list[str],
    model: dict[str, Any],
    optimizer: Any,
    length: int,
    rows: int = ROWS,
    debugs: bool = True,
    trainable: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """On a rank: bytes that rest there after a step, and the collectives of the step's forward and backward.

    debugs: counted by CommDebugMode as well, whose hooks not every model's forward lives with.
    """
    nodes = {"model": model, "optimizer": optimizer, **({"trainable": trainable} if trainable else {})}
    setup, module, update = instantiate(composed(*words, **nodes))
    context = setup.mesh_context
    ids = torch.randint(90, (rows // context.data_size, length))
    ids, labels = context.split_sequence(ids, ids)
    counts: dict[str, int] = {}
    for number in range(3):  # DDP agrees on its buckets in the first two
        counted = Collectives()
        is_counted = debugs and number == 2 and not isinstance(module, Pipeline)
        debug: Any = CommDebugMode() if is_counted else contextlib.nullcontext()
        with debug, counted:
            if isinstance(module, Pipeline):
                module.step(ids, labels, 1.0)
            else:
                with accumulate(module, last=True):
                    loss_sum(module, ids, labels).backward()
        if isinstance(debug, CommDebugMode):
            counts = {str(func): calls for func, calls in debug.get_comm_counts().items()}
        resting = _resting(module, update)
        update.step()
        update.zero_grad()
    return {"resting": resting, "calls": counted.calls, "debug": counts, "rank": dist.get_rank()}


def _resting(module: Any, update: Any) -> tuple[int, int, int]:
    def local(tensor: Tensor) -> int:
        part = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return part.numel() * part.element_size()

    parameters = list(module.parameters())
    states = [value for state in update.state.values() for value in state.values() if isinstance(value, Tensor)]
    return (
        sum(map(local, parameters)),
        sum(local(p.grad) for p in parameters if p.grad is not None),
        sum(map(local, states)),
    )


def differences(job: Job, seen: dict[str, Any]) -> Iterator[str]:
    """What a rank has otherwise than the plan says; nothing where both agree to the byte and to the call."""
    pp, place = place_of(job, seen["rank"])
    planned = resting_bytes(job, pp, place)
    if planned != seen["resting"]:
        yield f"rank {seen['rank']} holds {seen['resting']}, planned {planned}"
    wanted: Counter[tuple[str, int]] = Counter()
    for entry in traffic_of(job, pp, place.tp):
        wanted[entry.kind, entry.size] += entry.calls
    found: Counter[tuple[str, int]] = Counter()
    for kind, given, returned in seen["calls"]:
        size = {"all_gather": returned, "all_to_all": 0}.get(kind, given)
        if kind == "all_to_all":  # of tokens that come, other ranks decide; a rank's own are on one of the two sides
            sizes = {size for name, size in wanted if name == kind} & {given, returned, given // 2}
            size = max(sizes, default=given)
        found[kind, size] += 1
    if found != wanted:
        yield f"rank {seen['rank']}: only counted {dict(found - wanted)}, only planned {dict(wanted - found)}"
    if seen["debug"] and sum(seen["debug"].values()) != sum(wanted.values()):
        yield f"rank {seen['rank']}: CommDebugMode counts {seen['debug']}, planned {sum(wanted.values())}"
