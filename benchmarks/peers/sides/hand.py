"""Plain torch, as its own documentation writes it: DDP; fully_shard on each block and on the root; TP before it."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any, Callable

import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM
from work import MAX_GRAD_NORM, Job, build, loss_of

__all__ = ["Step", "clip_over_meshes", "policy", "prepare", "prepare_layers", "shard", "split", "step_of"]

Step = Callable[[Any], float]
assert LlamaForCausalLM  # transformers imports a model's module when it is first asked for: here, on every side


def prepare(job: Job, fused: bool | None = None, whole: bool = False) -> Callable[[], tuple[Any, Step]]:
    """What makes (the wrapped model, a function that makes a step of a batch and returns its loss).

    whole: where the job says compile, the wrapped model is compiled as one and not layer by layer.
    """
    return lambda: _wrap(job, fused, whole)


def _wrap(job: Job, fused: bool | None, whole: bool) -> tuple[Any, Step]:
    model = build(job)
    prepare_layers(model, dataclasses.replace(job, compile=job.compile and not whole))
    if job.strategy == "ddp":
        model = DistributedDataParallel(model)
    else:
        shards = dist.get_world_size() // job.tp
        mesh = init_device_mesh(job.device, (shards, job.tp), mesh_dim_names=("dp", "tp"))
        if job.tp > 1:
            split(model, mesh["tp"])
        shard(model, mesh["dp"], policy(job))
    if job.compile and whole:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), **{"fused": fused, **job.adamw})
    return model, step_of(model, optimizer, job)


def prepare_layers(model: Any, job: Job) -> None:
    """Checkpointing, then compiling, of each decoder layer."""
    for name, layer in model.model.layers.named_children():
        if job.checkpointing:
            layer = checkpoint_wrapper(layer)
            setattr(model.model.layers, name, layer)
        if job.compile:
            layer.compile()


def step_of(model: Any, optimizer: Any, job: Job) -> Step:
    # Under DDP bf16 is autocast; under fully_shard it is the policy's.
    casts = job.dtype == "bf16" and job.strategy == "ddp"

    def step(batch: Any) -> float:
        with torch.autocast(job.device, torch.bfloat16) if casts else contextlib.nullcontext():
            loss = loss_of(model, batch)
        loss.backward()
        if job.tp > 1:
            clip_over_meshes(model)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def clip_over_meshes(model: Any) -> None:
    """torch clips no parameters of several meshes together (those that TP splits, and the others)."""
    groups: dict[Any, list[Any]] = {}
    for parameter in model.parameters():
        groups.setdefault(parameter.device_mesh, []).append(parameter)
    totals: list[Any] = [torch.nn.utils.get_total_norm([p.grad for p in group]) for group in groups.values()]
    norms = [total.full_tensor() for total in totals]
    total = torch.linalg.vector_norm(torch.stack(norms))
    for group in groups.values():
        torch.nn.utils.clip_grads_with_norm_(group, MAX_GRAD_NORM, total)


def policy(job: Job) -> MixedPrecisionPolicy:
    """bf16 on every side: gathered and computed in bf16, reduced in fp32."""
    if job.dtype == "fp32":
        return MixedPrecisionPolicy()
    return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def shard(model: Any, mesh: DeviceMesh, mp_policy: MixedPrecisionPolicy) -> None:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=mp_policy)
    fully_shard(model, mesh=mesh, mp_policy=mp_policy)


def split(model: Any, mesh: DeviceMesh) -> None:
    plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    for layer in model.model.layers:
        parallelize_module(
            layer, mesh, {**plan, "self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        )
