"""nemo_dist_conf with its defaults, from the words that a user types."""

from __future__ import annotations

from typing import Any, Callable

import torch
from hydra import compose, initialize
from omegaconf import OmegaConf, open_dict
from transformers import LlamaForCausalLM
from work import ADAMW, MAX_GRAD_NORM, Job, loss_of, model_fields

from nemo_dist_conf import instantiate
from nemo_dist_conf.gradients import accumulate, clip_grad_norm_

__all__ = ["prepare"]

assert LlamaForCausalLM


def prepare(job: Job) -> Callable[[], tuple[Any, Callable[[Any], float]]]:
    words = [f"strategy={'ddp' if job.strategy == 'ddp' else 'fsdp2'}", f"parallelism.tp_size={job.tp}"]
    words += ["activation_checkpointing=true"] if job.checkpointing else []
    words += ["strategy.enable_compile=true"] if job.compile and job.strategy != "ddp" else []
    if job.strategy == "ddp":
        words += ["strategy.autocast_dtype=bfloat16"] if job.dtype == "bf16" else []
    elif job.dtype == "bf16":
        words += ["strategy.mp_policy.output_dtype=null"]
    else:
        words += ["strategy.mp_policy=null"]
    with initialize(config_path=None, version_base="1.3"):
        cfg = compose("nemo_dist_conf", words)
    optimizer = {"name": "adamw", "decay_1d": True, **ADAMW, "betas": list(ADAMW["betas"])}
    with open_dict(cfg):
        cfg.device = job.device
        cfg.model = {"config": {"model_type": "llama", **model_fields(job.size)}}
        cfg.optimizer = OmegaConf.create(optimizer)
    return lambda: _wrap(cfg, job)


def _wrap(cfg: Any, job: Job) -> tuple[Any, Callable[[Any], float]]:
    _, model, optimizer = instantiate(cfg)
    if job.compile and job.strategy == "ddp":  # DDPConfig has no field for it: what a user writes
        for layer in model.module.model.layers:
            layer.compile()

    def step(batch: torch.Tensor) -> float:
        with accumulate(model, last=True):
            loss = loss_of(model, batch)
            loss.backward()
        clip_grad_norm_(model, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return model, step
