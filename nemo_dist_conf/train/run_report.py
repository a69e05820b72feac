"""What the recipe shows: the header before the first step, the summary after the last, and why it stopped."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from nemo_dist_conf.errors import TrainingError
from nemo_dist_conf.runtime.distributed_setup import DistributedSetup
from nemo_dist_conf.runtime.engines.base import engine_of
from nemo_dist_conf.strategies import STRATEGIES
from nemo_dist_conf.train.console import Console, duration
from nemo_dist_conf.train.data import DataSource, TextData
from nemo_dist_conf.train.metrics import METRICS_FILE, TENSORBOARD_FOLDER
from nemo_dist_conf.train.step import StepResult

__all__ = ["header", "not_finite", "summary"]


def header(data: DataSource, setup: DistributedSetup, model: nn.Module, folder: Path) -> dict[str, str]:
    total, _ = _parameter_counts(model)
    return {
        "model": f"{engine_of(model).model_name(model)}, {_millions(total)} parameters",
        "layout": _layout(setup),
        **{f"stage {row.stage}": f"{row} ({_millions(row.parameters)})" for row in engine_of(model).stages(model)},
        "device": _device(setup.mesh_context.device),
        "data": str(data.corpus) if isinstance(data, TextData) else type(data).__name__,
        "output": str(folder),
    }


def summary(
    setup: DistributedSetup,
    model: nn.Module,
    first: StepResult,
    last: StepResult,
    peak_bytes: int,
    console: Console,
    seconds: float,
    folder: Path,
    tensorboard: bool,
) -> dict[str, str]:
    total, local = _parameter_counts(model)
    files = [str(folder / METRICS_FILE)]
    if tensorboard:
        files.append(str(folder / TENSORBOARD_FOLDER))
    ranks = "" if setup.mesh_context.world_size == 1 else ", the largest of all ranks"
    return {
        "layout": _layout(setup),
        "parameters": f"{total:,}; on this rank {local:,}",
        "peak memory": f"{peak_bytes / 2**20:,.0f} MiB{ranks}",
        "loss": f"{first.loss:.4f} -> {last.loss:.4f}",
        "tokens/s": f"{console.tokens_per_second:,.0f}",
        "wall time": duration(seconds),
        "files": ", ".join(files),
    }


def _layout(setup: DistributedSetup) -> str:
    context = setup.mesh_context
    name = next((s.name for s in STRATEGIES if isinstance(setup.strategy_config, s.config)), "no strategy")
    ranks = "1 rank" if context.world_size == 1 else f"{context.layout()} ({context.world_size} ranks)"
    return f"{name}, {ranks}"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' if threads > 1 else ''}"


def _parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Parameters of the model and, of them, those that this rank holds."""
    total = local = 0
    for parameter in model.parameters():
        total += parameter.numel()
        local += parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()
    rows = engine_of(model).stages(model)
    return sum(row.parameters for row in rows) if rows else total, local


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"


def not_finite(
    cfg: Any, result: StepResult, last: StepResult | None, step: int, optimizer: Optimizer, folder: Path
) -> TrainingError:
    wrong = "loss" if not math.isfinite(result.loss) else "gradient norm"
    before = f"step {step}: loss {last.loss:.4g}, grad norm {last.grad_norm:.4g}" if last else "none"
    group = optimizer.param_groups[0]
    tries = [f"optimizer.lr={float(group.get('initial_lr', group.get('lr', 0.01))) / 10:.1g}"]
    if not cfg.train.max_grad_norm:
        tries.append("train.max_grad_norm=1.0")
    if not cfg.train.warmup_steps:
        tries.append(f"train.warmup_steps={max(1, cfg.train.steps // 10)}")
    if str(cfg.train.get("dtype")) not in ("float32", "None"):
        tries.append("train.dtype=float32")
    return TrainingError(
        f"step {step + 1}: the {wrong} is not finite (loss {result.loss}, grad norm {result.grad_norm}); "
        f"training stopped before this update\n"
        f"  before  {before}\n"
        f"  try     {', or '.join(tries)}\n"
        f"  kept    {folder}"
    )
