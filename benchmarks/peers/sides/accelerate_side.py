"""Hugging Face Accelerate: ``prepare`` with DDP, or with the FSDP2 plugin on Llama's decoder layers."""

from __future__ import annotations

from typing import Any, Callable

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils import TorchDynamoPlugin
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import LlamaForCausalLM
from work import MAX_GRAD_NORM, Job, build, loss_of

__all__ = ["prepare"]

assert LlamaForCausalLM


def prepare(job: Job) -> Callable[[], tuple[Any, Callable[[Any], float]]]:
    """Raises NotImplementedError for tp: Accelerate leaves it to transformers' loading of a checkpoint."""
    if job.strategy == "tp":
        raise NotImplementedError("tensor parallelism comes with transformers' from_pretrained(tp_plan=...)")
    return lambda: _wrap(job)


def _wrap(job: Job) -> tuple[Any, Callable[[Any], float]]:
    options: dict[str, Any] = {"cpu": job.device == "cpu"}
    if job.strategy == "fsdp2":
        # The policy that all sides have; mixed_precision="bf16" would also reduce in bf16 and add autocast.
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
            mixed_precision_policy=policy if job.dtype == "bf16" else None,
            activation_checkpointing=job.checkpointing,
        )
    elif job.dtype == "bf16":
        options["mixed_precision"] = "bf16"
    if job.compile:
        options["dynamo_plugin"] = TorchDynamoPlugin(backend="inductor", use_regional_compilation=True)
    accelerator = Accelerator(**options)
    if job.strategy == "fsdp2" and job.device == "cpu":
        # On a CPU Accelerate 1.15 puts the plugin aside without a word and trains with DDP (state.py); it shards there
        # as well once its state says what it would say on GPUs.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = options["fsdp_plugin"]
    if accelerator.distributed_type == DistributedType.NO:
        raise AssertionError(f"Accelerate would train without {job.strategy}")
    model = build(job)
    if job.checkpointing and job.strategy == "ddp":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), **job.adamw))

    def step(batch: torch.Tensor) -> float:
        loss = loss_of(model, batch)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return model, step
