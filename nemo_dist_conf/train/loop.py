"""The training loop: one code path for every layout.

Shapes: B rows (sequences) of a microbatch, S tokens of a sequence, V ids of the vocabulary.
"""

from __future__ import annotations

import inspect
import logging
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Callable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from nemo_dist_conf.errors import ConfigError, DataError, Problem, TrainingError
from nemo_dist_conf.gradients import accumulate, clip_grad_norm_
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.runtime.process_group import initialize_distributed, shutdown_distributed
from nemo_dist_conf.strategies import STRATEGIES
from nemo_dist_conf.topology import Paths
from nemo_dist_conf.topology.world import launched
from nemo_dist_conf.train.checks import batch_problems
from nemo_dist_conf.train.console import Console, duration, peak_memory_bytes
from nemo_dist_conf.train.data import (
    DataSource,
    TextData,
    build_data,
    check_vocabulary,
    mix_seed,
    split_microbatches,
)
from nemo_dist_conf.train.learning_rate import LearningRate
from nemo_dist_conf.train.metrics import METRICS_FILE, TENSORBOARD_FOLDER, MetricsWriter, require_tensorboard

__all__ = ["StepResult", "forward_backward", "run", "token_loss_sum", "train_step"]

log = logging.getLogger(__name__)

#: Label of a position that does not count towards the loss.
_IGNORED = -100

Microbatches = Sequence[tuple[Tensor, Tensor]]

#: Runs forward and backward of all microbatches, the loss scaled by a factor, and returns the local sum of token
#: losses, unscaled. A pipeline schedule takes the place of ``forward_backward``.
ForwardBackward = Callable[[nn.Module, Microbatches, float], Tensor]


# ---------------------------------------------------------------------------------------------- one step


@dataclass(frozen=True)
class StepResult:
    """Numbers of one step, the same on every rank.

    loss: mean over the counted tokens of the global batch. grad_norm: of all gradients, before clipping.
    updated: whether the optimizer made its step; false where a number is not finite.
    """

    loss: float
    grad_norm: float
    updated: bool


def token_loss_sum(model: nn.Module, input_ids_BS: Tensor, labels_BS: Tensor) -> Tensor:
    """Sum of the cross entropies of all counted tokens, in float32 whatever the model computes in."""
    logits_BSV = _logits(model, input_ids_BS)
    return F.cross_entropy(
        logits_BSV.float().flatten(0, 1), labels_BS.flatten(), ignore_index=_IGNORED, reduction="sum"
    )


def forward_backward(model: nn.Module, microbatches: Microbatches, scale: float) -> Tensor:
    """Accumulate the gradients of ``scale`` times the loss sum of all microbatches; returns the plain sum."""
    total: Tensor | None = None
    for number, (input_ids, labels) in enumerate(microbatches, 1):
        with accumulate(model, last=number == len(microbatches)):
            loss_sum = token_loss_sum(model, input_ids, labels)
            (loss_sum * scale).backward()
        # Added in float64: microbatches must not change the logged number.
        total = loss_sum.detach().double() if total is None else total + loss_sum.detach()
    assert total is not None
    return total


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    microbatches: Microbatches,
    context: Any,
    *,
    global_tokens: int,
    max_grad_norm: float | None,
    run_microbatches: ForwardBackward = forward_backward,
) -> StepResult:
    """One optimizer step on this rank's part of the global batch.

    DDP and FSDP average gradients over the data ranks; scaling the loss sum by data_size / global_tokens turns that
    into the gradient of the mean over the global batch, however unevenly tokens are spread over ranks.
    Nothing is updated where the global loss or gradient norm is not finite: all ranks see the same two numbers, so
    all of them decide alike.
    """
    loss_sum = run_microbatches(model, microbatches, context.data_size / global_tokens)
    loss = context.sum_over_data(loss_sum) / global_tokens
    norm = clip_grad_norm_(model, max_grad_norm)
    loss_value, norm_value = torch.stack([loss, norm.to(loss)]).tolist()  # the only wait for the device in a step
    updated = math.isfinite(loss_value) and math.isfinite(norm_value)
    if updated:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss_value, norm_value, updated)


# ---------------------------------------------------------------------------------------------- calling the model


def _unwrapped(model: nn.Module) -> nn.Module:
    """The user's module below wrappers that replace it (DDP, Megatron-FSDP); FSDP2 wraps in place."""
    while type(model).__module__.startswith(("torch.nn.parallel", "megatron_fsdp")):
        inner = model.module
        assert isinstance(inner, nn.Module)
        model = inner
    return model


def _arguments(module: nn.Module, input_ids_BS: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """transformers models take keywords; the user's own module takes the ids however it names them."""
    names = inspect.signature(module.forward).parameters
    if "input_ids" not in names and not hasattr(getattr(module, "config", None), "model_type"):
        return (input_ids_BS,), {}
    keywords: dict[str, Any] = {"input_ids": input_ids_BS}
    if "use_cache" in names:  # a cache of keys and values is for generating text
        keywords["use_cache"] = False
    return (), keywords


def _logits(model: nn.Module, input_ids_BS: Tensor) -> Tensor:
    args, kwargs = _arguments(_unwrapped(model), input_ids_BS)
    output = model(*args, **kwargs)
    logits = getattr(output, "logits", output)
    if isinstance(logits, DTensor):
        logits = logits.full_tensor()
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != input_ids_BS.shape:
        got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        want = f"[{input_ids_BS.size(0)}, {input_ids_BS.size(1)}, vocabulary]"
        raise ConfigError(
            Problem(
                f"model: forward returned {got}, which is not a score for every next token",
                f"model={type(_unwrapped(model)).__name__}",
                f"a tensor of shape {want}, or an output with such .logits",
                "model=llama_tiny",
            )
        )
    return logits


# ---------------------------------------------------------------------------------------------- settings


@dataclass(frozen=True)
class _Settings:
    """The node ``train``, checked. dtype is not among them: the model takes it from there by interpolation."""

    steps: int
    global_batch_size: int
    micro_batch_size: int | None
    max_grad_norm: float | None
    log_every: int
    tensorboard: bool
    warmup_steps: int
    schedule: str


def _settings(node: Any) -> _Settings:
    """The checked settings. Raises ConfigError with every wrong one at once."""
    problems: list[Problem] = []

    def wrong(key: str, allowed: str, example: str) -> None:
        asked = Paths().set(f"train.{key}", node.get(key))
        problems.append(Problem(f"{asked} does not fit", asked, allowed, f"train.{key}={example}"))

    def whole(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1

    if not whole(node.get("steps")):
        wrong("steps", "1, 2, 3, ...", "200")
    norm = node.get("max_grad_norm")
    if norm is not None and (isinstance(norm, bool) or not isinstance(norm, (int, float)) or not norm >= 0):
        wrong("max_grad_norm", "a number above 0; 0 or null: gradients are measured, not clipped", "1.0")
    if not whole(node.get("log_every")):
        wrong("log_every", "1, 2, 3, ...", "1")
    if not isinstance(node.get("tensorboard"), bool):
        wrong("tensorboard", "true, false", "false")
    # How it splits over the ranks is checked again once there are any.
    problems += batch_problems(node.get("global_batch_size"), None, 1)
    ConfigError.raise_if(problems)
    if node["tensorboard"]:
        require_tensorboard()
    values: dict[str, Any] = {key: node.get(key) for key in _Settings.__dataclass_fields__}
    return _Settings(**values)


def _output_folder() -> Path:
    """Hydra's folder of the run; the current one outside a Hydra app."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir) if HydraConfig.initialized() else Path.cwd()


# ---------------------------------------------------------------------------------------------- the run


def run(cfg: Any, output_dir: str | os.PathLike[str] | None = None) -> float:
    """Train as the config says, in every rank of a launcher or alone; returns the last loss.

    Writes metrics.jsonl into output_dir (None: Hydra's folder of the run). The process group is left at the end,
    also after an error, unless it was there before.
    Raises ConfigError or DataError where something cannot work, TrainingError on every rank where the loss or the
    gradient norm stops being finite; what was written until then stays.
    """
    began = time.perf_counter()
    joined = dist.is_available() and dist.is_initialized()
    try:
        settings = _settings(cfg.train)
        learning_rate = LearningRate(settings.schedule, steps=settings.steps, warmup_steps=settings.warmup_steps)
        data = _same_data(cfg, settings)  # before the model: a wrong path is told within a second
        setup, model, optimizer = instantiate(cfg)
        if optimizer is None:
            what = "training needs an optimizer"
            raise ConfigError(Problem(what, "optimizer=null", "optimizer=adamw, optimizer=sgd", "optimizer=adamw"))
        context = setup.mesh_context
        size, micro = settings.global_batch_size, settings.micro_batch_size
        ConfigError.raise_if(batch_problems(size, micro, context.data_size))
        rows = micro or size // context.data_size
        _check_model_knows(cfg, data, model, context)
        folder = _output_folder() if output_dir is None else Path(output_dir)
        return _train(cfg, settings, learning_rate, data, rows, setup, model, optimizer, folder, began)
    finally:
        if not joined:
            shutdown_distributed()


def _same_data(cfg: Any, settings: _Settings) -> DataSource:
    """The data, once all ranks have it and it is the same; where one rank fails, all of them raise its error."""
    data: DataSource | None = None
    error: ConfigError | None = None
    try:
        data = build_data(cfg.data, global_batch_size=settings.global_batch_size, seed=cfg.seed)
    except ConfigError as problem:
        error = problem
    mark = (data.corpus.fingerprint, data.corpus.tokens.numel()) if isinstance(data, TextData) else (0, 0)
    found: list[tuple[ConfigError | None, tuple[int, int]]] = [(error, mark)]
    if launched().world_size > 1:
        found = found * initialize_distributed(device=cfg.get("device", "auto")).world_size
        dist.all_gather_object(found, (error, mark))
    failed = [rank for rank, (problem, _) in enumerate(found) if problem is not None]
    if failed:
        first = found[failed[0]][0]
        assert first is not None
        if len(failed) == len(found):
            raise first
        where = f"rank {failed[0]}" if len(failed) == 1 else f"{len(failed)} ranks, of them rank {failed[0]}"
        raise type(first)(*(replace(problem, what=f"on {where}: {problem.what}") for problem in first.problems))
    others = [rank for rank, (_, mark) in enumerate(found) if mark != found[0][1]]
    if others:
        raise DataError(
            Problem(
                f"data.path: rank {others[0]} reads another text than rank 0 "
                f"({found[others[0]][1][1]:,} and {found[0][1][1]:,} tokens)",
                Paths().set("data.path", cfg.data.get("path")),
                "a path that holds the same files on every machine; null needs the same Python on all",
                "data.path=/a/folder/that/all/machines/share",
            )
        )
    assert data is not None
    return data


def _check_model_knows(cfg: Any, data: DataSource, model: nn.Module, context: Any) -> None:
    """That the model has an embedding for every id of the text."""
    if not isinstance(data, TextData):
        return
    vocabulary = _vocabulary(model)
    if vocabulary is not None:
        checkpoint = cfg.model.get("name_or_path") if "model" in cfg else None
        check_vocabulary(data.corpus, vocabulary, checkpoint=checkpoint)
        if checkpoint and data.corpus.tokenizer is None and context.is_main:
            log.warning("data.tokenizer=null: %s is fed bytes, not the ids that its own tokenizer makes", checkpoint)


def _vocabulary(model: nn.Module) -> int | None:
    """Ids of a transformers model; None for a module that does not say."""
    config: Any = getattr(_unwrapped(model), "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else None


def _train(
    cfg: Any,
    settings: _Settings,
    learning_rate: LearningRate,
    data: DataSource,
    rows: int,
    setup: Any,
    model: nn.Module,
    optimizer: Optimizer,
    folder: Path,
    began: float,
    start: int = 0,
) -> float:
    """Steps ``start`` (counted from 0) to the last; rows: of a microbatch on this rank."""
    context = setup.mesh_context
    is_main = context.is_main
    console = Console(settings.steps, enabled=is_main, first_step=start + 1)
    console.header(_header(data, setup, model, folder))
    model.train()
    first: StepResult | None = None
    result: StepResult | None = None
    writer = MetricsWriter(folder, enabled=is_main, first_step=start + 1, tensorboard=settings.tensorboard)
    with writer, console:
        for step in range(start, settings.steps):
            step_began = time.perf_counter()
            # Dropout too is a function of the step: a resumed run draws what an uninterrupted one does.
            torch.manual_seed(mix_seed(cfg.seed, step, context.data_rank))
            input_ids, labels = data.batch(step, context.data_rank, context.data_size)
            tokens = _global_tokens(data, labels, context)
            lr = learning_rate.apply(optimizer, step)
            microbatches = split_microbatches(input_ids.to(context.device), labels.to(context.device), rows)
            last = result
            result = train_step(
                model, optimizer, microbatches, context, global_tokens=tokens, max_grad_norm=settings.max_grad_norm
            )
            if not result.updated:
                raise _not_finite(cfg, result, last, step, optimizer, folder)
            first = first or result
            seconds = time.perf_counter() - step_began
            numbers: dict[str, Any] = {
                "step": step + 1,
                "loss": result.loss,
                "grad_norm": result.grad_norm,
                "tokens": tokens,
                "seconds": seconds,
            }
            if (step + 1) % settings.log_every == 0 or step in (start, settings.steps - 1):
                writer.write(**numbers, lr=lr, tokens_per_second=tokens / seconds)
            console.step(**numbers)
    peak = _largest(peak_memory_bytes(context.device), context)
    assert first is not None and result is not None
    console.summary(_summary(setup, model, first, result, peak, console, time.perf_counter() - began, folder, settings))
    return result.loss


def _global_tokens(data: DataSource, labels_BS: Tensor, context: Any) -> int:
    """Counted tokens of the global batch: known for text, asked of all data ranks for the user's own data."""
    if isinstance(data, TextData):
        return data.tokens_per_batch
    counted = (labels_BS != _IGNORED).sum().to(context.device)
    return max(1, int(context.sum_over_data(counted)))


def _largest(value: int, context: Any) -> int:
    """The largest of all ranks' values."""
    if context.world_size == 1:
        return value
    largest = torch.tensor(value, dtype=torch.int64, device=context.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)


def _not_finite(
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


# ---------------------------------------------------------------------------------------------- what is shown


def _header(data: DataSource, setup: Any, model: nn.Module, folder: Path) -> dict[str, str]:
    total, _ = _parameter_counts(model)
    return {
        "model": f"{type(_unwrapped(model)).__name__}, {_millions(total)} parameters",
        "layout": _layout(setup),
        "device": _device(setup.mesh_context.device),
        "data": str(data.corpus) if isinstance(data, TextData) else type(data).__name__,
        "output": str(folder),
    }


def _summary(
    setup: Any,
    model: nn.Module,
    first: StepResult,
    last: StepResult,
    peak_bytes: int,
    console: Console,
    seconds: float,
    folder: Path,
    settings: _Settings,
) -> dict[str, str]:
    total, local = _parameter_counts(model)
    files = [str(folder / METRICS_FILE)]
    if settings.tensorboard:
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


def _layout(setup: Any) -> str:
    context = setup.mesh_context
    name = next((s.name for s in STRATEGIES if isinstance(setup.strategy_config, s.config)), "no strategy")
    ranks = "1 rank" if context.world_size == 1 else f"{context.layout()} ({context.world_size} ranks)"
    return f"{name}, {ranks}"


def _device(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device}, {torch.cuda.get_device_name(device)}"
    return f"cpu, {torch.get_num_threads()} threads"


def _parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Parameters of the model and, of them, those that this rank holds. A pipeline rank knows its own stages only."""
    total = local = 0
    for parameter in model.parameters():
        total += parameter.numel()
        local += parameter.to_local().numel() if isinstance(parameter, DTensor) else parameter.numel()
    return total, local


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"
