"""The training loop of the recipe: settings, data, model, steps, and what they leave behind."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from nemo_dist_conf.checkpoint import Restored
from nemo_dist_conf.composition.resolvers import autocast_dtype
from nemo_dist_conf.errors import ConfigError, DataError, Problem
from nemo_dist_conf.families.config_facts import facts_from_config, fields_of
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.own_loop.preemption import Preemption
from nemo_dist_conf.own_loop.row_order import mix_seed
from nemo_dist_conf.plan import Plan
from nemo_dist_conf.recipe.checks import batch_problems
from nemo_dist_conf.recipe.value_checks import train_problems
from nemo_dist_conf.runtime.device_meshes import MeshContext
from nemo_dist_conf.runtime.distributed_setup import DistributedSetup
from nemo_dist_conf.runtime.engines.base import unwrapped
from nemo_dist_conf.runtime.parallelize import autocast_forward
from nemo_dist_conf.runtime.process_group import initialize_distributed, shutdown_distributed
from nemo_dist_conf.runtime.rank_agreement import together
from nemo_dist_conf.runtime.techniques.expert.routing import ExpertLoad
from nemo_dist_conf.runtime.techniques.loss import IGNORED
from nemo_dist_conf.runtime.typed_values import lower_dtype
from nemo_dist_conf.strategies import strategy_of_config, strategy_of_target
from nemo_dist_conf.topology.launched_ranks import launched
from nemo_dist_conf.train.console import Console, peak_memory_bytes
from nemo_dist_conf.train.corpus import check_vocabulary
from nemo_dist_conf.train.data import DataSource, TextData, build_data, split_microbatches
from nemo_dist_conf.train.estimate import measured, plan_of_run, planned
from nemo_dist_conf.train.learning_rate import LearningRate
from nemo_dist_conf.train.loss_scale import LossScale
from nemo_dist_conf.train.metrics import MetricsWriter, require_tensorboard
from nemo_dist_conf.train.run_report import header, not_finite, summary
from nemo_dist_conf.train.saving import Saving
from nemo_dist_conf.train.step import Microbatches, StepResult, settle, train_step
from nemo_dist_conf.wording import Spelling

__all__ = ["run"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Settings:
    """The node ``train``, checked. dtype is not among them: the model takes it from there by interpolation."""

    steps: int
    global_batch_size: int
    micro_batch_size: int | None
    max_grad_norm: float | None
    log_every: int
    tensorboard: bool
    warmup_steps: int | None
    schedule: str


def _settings(node: Any) -> _Settings:
    """The checked settings. Raises ConfigError with every wrong one at once."""
    # How the batch splits over the ranks is checked again once there are any.
    ConfigError.raise_if([*train_problems(node), *batch_problems(node.get("global_batch_size"), None, 1)])
    if node["tensorboard"]:
        require_tensorboard()
    values: dict[str, Any] = {key: node.get(key) for key in _Settings.__dataclass_fields__}
    return _Settings(**values)


def _output_folder() -> Path:
    """Hydra's folder of the run; the current one outside a Hydra app."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir) if HydraConfig.initialized() else Path.cwd()


def run(cfg: Any, output_dir: str | os.PathLike[str] | None = None) -> float:
    """Train as the config says, in every rank of a launcher or alone; returns the last loss.

    Writes metrics.jsonl into output_dir (None: Hydra's folder of the run). The process group is left at the end,
    also after an error, unless it was there before.
    Raises ConfigError or DataError where something cannot work, TrainingError on every rank where the loss or the
    gradient norm stops being finite; what was written until then stays.
    """
    began = time.perf_counter()
    joined = dist.is_available() and dist.is_initialized()
    saving: Saving | None = None
    try:
        settings = _settings(cfg.train)
        warmup = settings.steps // 10 if settings.warmup_steps is None else settings.warmup_steps
        learning_rate = LearningRate(settings.schedule, steps=settings.steps, warmup_steps=warmup)
        data = _same_data(cfg, settings)  # before the model: a wrong path is told within a second
        folder = _output_folder() if output_dir is None else Path(output_dir)
        saving = Saving(cfg, folder, _layout(cfg), settings.steps)
        setup, model, optimizer = instantiate(cfg)
        if optimizer is None:
            what = "training needs an optimizer"
            raise ConfigError(
                Problem(
                    what=what,
                    asked="optimizer=null",
                    allowed="optimizer=adamw, optimizer=sgd",
                    instead="optimizer=adamw",
                )
            )
        context = setup.mesh_context
        dtype = lower_dtype(autocast_dtype(cfg.train.get("dtype"), str(context.device.type)))
        strategy = strategy_of_config(setup.strategy_config)
        if strategy is None or strategy.compute_dtype is not None:
            dtype = None  # an option of the strategy says what to compute in
        if dtype is not None:
            autocast_forward(model, context.device, dtype)
        size, micro = settings.global_batch_size, settings.micro_batch_size
        ConfigError.raise_if(batch_problems(size, micro, context.data_size))
        _check_model_knows(cfg, data, model, context)
        _refuse_both_directions(model)
        saving.loss_scale = _loss_scale(setup, dtype)
        rows = micro or size // context.data_size
        this = _Run(cfg, settings, learning_rate, data, rows, setup, model, optimizer, folder, saving, began)
        if saving.goes_on:
            settle(model, optimizer, this.microbatches(0)[0], context)
        restored = saving.restore(model, optimizer, data, context.is_main)
        if restored is not None and restored.step >= settings.steps:
            return _nothing_left(restored, settings.steps, saving, context.is_main)
        return this.train(restored)
    finally:
        if saving is not None:
            saving.close()
        if not joined:
            shutdown_distributed()


def _same_data(cfg: Any, settings: _Settings) -> DataSource:
    """The data, once all ranks have it and it is the same; where one rank fails, all of them raise its error."""
    if launched().world_size > 1:
        initialize_distributed(device=cfg.get("device", "auto"))
    data, marks = together(
        lambda: build_data(cfg.data, global_batch_size=settings.global_batch_size, seed=cfg.seed),
        lambda data: (data.corpus.fingerprint, data.corpus.tokens.numel()) if isinstance(data, TextData) else (0, 0),
    )
    others = [rank for rank, mark in enumerate(marks) if mark != marks[0]]
    if others:
        raise DataError(
            Problem(
                what=f"data.path: rank {others[0]} reads another text than rank 0 "
                f"({marks[others[0]][1]:,} and {marks[0][1]:,} tokens)",
                asked=Spelling().set("data.path", cfg.data.get("path")),
                allowed="a path that holds the same files on every machine; null needs the same Python on all",
                instead="data.path=/a/folder/that/all/machines/share",
            )
        )
    return data


def _check_model_knows(cfg: Any, data: DataSource, model: nn.Module, context: MeshContext) -> None:
    """That the model has an embedding for every id of the text."""
    if not isinstance(data, TextData):
        return
    vocabulary = _vocabulary(model)
    if vocabulary is not None:
        checkpoint = cfg.model.get("name_or_path") if "model" in cfg else None
        check_vocabulary(data.corpus, vocabulary, checkpoint=checkpoint)
        if checkpoint and data.corpus.tokenizer is None and context.is_main:
            log.warning("data.tokenizer=null: %s is fed bytes, not the ids that its own tokenizer makes", checkpoint)


def _refuse_both_directions(model: nn.Module) -> None:
    """Raise ConfigError for an encoder of transformers: each token would see the one that it is to foretell."""
    modules = list(model.modules())
    config: Any = next((module.config for module in modules if hasattr(module, "config")), None)
    key = next((key for key in ("is_decoder", "causal") if getattr(config, key, None) is False), None)
    # Some configs have the field, and no module reads it.
    if key is not None and any(getattr(module, "is_decoder", None) is False for module in modules):
        what = f"{config.model_type} reads a row in both directions, so each token would see the one it has to foretell"
        asked, allowed = f"model.config.model_type={config.model_type}", "a causal model; an encoder as a decoder"
        raise ConfigError(Problem(what=what, asked=asked, allowed=allowed, instead=f"+model.config.{key}=true"))


def _vocabulary(model: nn.Module) -> int | None:
    """Ids of a transformers model; None for a module that does not say."""
    config: Any = getattr(unwrapped(model), "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    size = getattr(config, "vocab_size", None)
    return size if isinstance(size, int) else None


@dataclass(frozen=True)
class _Run:
    """What the steps of a run are made of.

    rows: of a microbatch on this rank. began: when the run did, on the clock of time.perf_counter.
    """

    cfg: Any
    settings: _Settings
    learning_rate: LearningRate
    data: DataSource
    rows: int
    setup: DistributedSetup
    model: nn.Module
    optimizer: Optimizer
    folder: Path
    saving: Saving
    began: float

    @property
    def context(self) -> MeshContext:
        return self.setup.mesh_context

    def train(self, restored: Restored | None) -> float:
        """Make the steps after those of ``restored``; returns the last loss."""
        settings, context, saving = self.settings, self.context, self.saving
        start = 0 if restored is None else restored.step
        last_loss = None if restored is None else restored.objects["position"]["loss"]
        console = Console(settings.steps, enabled=context.is_main, first_step=start + 1)
        plan = plan_of_run(self.cfg, context) if context.is_main else None
        facts = header(self.data, self.setup, self.model, self.folder)
        console.header({**facts, **planned(plan)})
        self.model.train()
        load = _expert_load(self.model)
        first: StepResult | None = None
        result: StepResult | None = None
        writer = MetricsWriter(
            self.folder,
            enabled=context.is_main,
            first_step=start + 1,
            tensorboard=settings.tensorboard,
            last_loss=last_loss,
        )
        with writer, console, Preemption(saving.is_on, saving.stopped) as preemption:
            for step in range(start, settings.steps):
                began = time.perf_counter()
                preemption.begin_step()
                last, lr = result, self.learning_rate.apply(self.optimizer, step)
                result, tokens = self.step(step, load)
                if not result.updated:
                    raise not_finite(self.cfg, result, last, step, self.optimizer, self.folder)
                first = first or result
                seconds = time.perf_counter() - began
                numbers: dict[str, Any] = {
                    "step": step + 1,
                    "loss": result.loss,
                    "grad_norm": result.grad_norm,
                    "tokens": tokens,
                    "seconds": seconds,
                }
                if (step + 1) % settings.log_every == 0 or step in (start, settings.steps - 1):
                    more: dict[str, Any] = {"lr": lr, "tokens_per_second": tokens / seconds, **result.more}
                    writer.write(**numbers, **more)
                console.step(**numbers)
                told = preemption.is_due() and preemption.by
                saving.after_step(step + 1, self.model, self.optimizer, self.data, result.loss, told)
            saved = saving.finish()
        assert first is not None and result is not None
        self._summarise(first, result, console, plan, saved)
        return result.loss

    def step(self, step: int, load: ExpertLoad | None) -> tuple[StepResult, int]:
        """(what a step gave, the counted tokens of its global batch)."""
        # Dropout too is a function of the step: a resumed run draws what an uninterrupted one does.
        torch.manual_seed(mix_seed(self.cfg.seed, step, self.context.data_rank))
        microbatches, labels = self.microbatches(step)
        tokens = _global_tokens(self.data, labels, self.context)
        result = train_step(
            self.model,
            self.optimizer,
            microbatches,
            self.context,
            global_tokens=tokens,
            max_grad_norm=self.settings.max_grad_norm,
            load=load,
            loss_scale=self.saving.loss_scale,
        )
        return result, tokens

    def microbatches(self, step: int) -> tuple[Microbatches, Tensor]:
        """This rank's part of a step's batch, on its device; and all of its labels, on the CPU."""
        context = self.context
        batch = self.data.batch(step, context.data_rank, context.data_size)
        input_ids, labels = context.split_sequence(*batch)
        return split_microbatches(input_ids.to(context.device), labels.to(context.device), self.rows), labels

    def _summarise(
        self, first: StepResult, last: StepResult, console: Console, plan: Plan | None, saved: dict[str, str]
    ) -> None:
        context = self.context
        peak = _largest(peak_memory_bytes(context.device), context)
        if last.more.get("expert_imbalance") and context.is_main:
            log.info("experts: the busiest had %.2f times the mean one's tokens", last.more["expert_imbalance"])
        seconds, tensorboard = time.perf_counter() - self.began, self.settings.tensorboard
        facts = summary(self.setup, self.model, first, last, peak, console, seconds, self.folder, tensorboard)
        console.summary({**facts, **measured(plan, console.tokens_per_second, peak, context), **saved})


def _layout(cfg: Any) -> str:
    """Strategy and sizes, for whoever reads a checkpoint's manifest."""
    sizes = {key: value for key, value in (cfg.get("parallelism") or {}).items() if isinstance(value, int)}
    strategy = strategy_of_target(str(cfg.strategy.get("_target_"))) if "strategy" in cfg else None
    return " ".join([strategy.name if strategy else "", *(f"{k}={v}" for k, v in sizes.items() if v != 1)]).strip()


def _nothing_left(restored: Restored, steps: int, saving: Saving, is_main: bool) -> float:
    """The last loss of a run that has made all its steps already."""
    if is_main:
        log.info("all %d steps are made; train.steps=N with a larger number goes on", steps)
    for name, path in saving.finish().items():
        if is_main:
            log.info("%s: %s", name, path)
    return float(restored.objects["position"]["loss"])


def _loss_scale(setup: DistributedSetup, dtype: torch.dtype | None) -> LossScale | None:
    """For a model that computes in float16 somewhere; None for any other. dtype: of the recipe's own autocast."""
    policies = [getattr(config, "mp_policy", None) for config in (setup.strategy_config, setup.moe_parallel_config)]
    dtypes = [policy.param_dtype for policy in policies if policy is not None]
    dtypes += [dtype, getattr(setup.strategy_config, "autocast_dtype", None)]
    return LossScale() if torch.float16 in dtypes else None


def _expert_load(model: nn.Module) -> ExpertLoad | None:
    """A counter for the experts of a transformers model; None for a dense one."""
    config: Any = getattr(unwrapped(model), "config", None)
    experts = facts_from_config(fields_of(config)).num_experts if hasattr(config, "to_dict") else None
    return ExpertLoad(model, experts) if experts else None


def _global_tokens(data: DataSource, labels_BS: Tensor, context: MeshContext) -> int:
    """Counted tokens of the global batch: known for text, asked of all data ranks for the user's own data."""
    if isinstance(data, TextData):
        return data.tokens_per_batch
    counted = (labels_BS != IGNORED).sum().to(context.device)
    return max(1, int(context.sum_over_data(counted)))


def _largest(value: int, context: MeshContext) -> int:
    """The largest of all ranks' values."""
    if context.world_size == 1:
        return value
    largest = torch.tensor(value, dtype=torch.int64, device=context.device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return int(largest)
