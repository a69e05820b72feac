"""Lightning Fabric: DDP, or ModelParallelStrategy with the same fully_shard and TP calls as by hand."""

from __future__ import annotations

from typing import Any, Callable

import hand
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy, ModelParallelStrategy
from work import MAX_GRAD_NORM, Job, build, loss_of

__all__ = ["prepare"]


def prepare(job: Job) -> Callable[[], tuple[Any, Callable[[Any], float]]]:
    return lambda: _wrap(job)


def _wrap(job: Job) -> tuple[Any, Callable[[Any], float]]:
    strategy: Any = DDPStrategy()
    if job.strategy != "ddp":

        def parallelize(model: Any, mesh: Any) -> Any:
            if job.tp > 1:
                hand.split(model, mesh["tensor_parallel"])
            hand.shard(model, mesh["data_parallel"], hand.policy(job))
            return model

        strategy = ModelParallelStrategy(parallelize, job.world // job.tp, job.tp)
    precision: Any = "bf16-mixed" if job.dtype == "bf16" and job.strategy == "ddp" else "32-true"
    fabric = Fabric(accelerator=job.device, devices=job.world, strategy=strategy, precision=precision)
    fabric.launch()
    model = build(job)
    hand.prepare_layers(model, job)
    model = fabric.setup_module(model)
    optimizer: Any = fabric.setup_optimizers(torch.optim.AdamW(model.parameters(), **job.adamw))

    def step(batch: torch.Tensor) -> float:
        loss = loss_of(model, batch)
        fabric.backward(loss)
        if job.tp > 1:
            hand.clip_over_meshes(model)  # Fabric's own ends in torch's, which refuses several meshes
        else:
            fabric.clip_gradients(model, optimizer, max_norm=MAX_GRAD_NORM, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return model, step
