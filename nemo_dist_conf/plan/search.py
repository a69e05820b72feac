"""Every layout that the rules allow for a number of ranks, those that fit, and the fastest of them."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Iterator, Mapping

from omegaconf import DictConfig, OmegaConf

from nemo_dist_conf.composition.check import check_values
from nemo_dist_conf.composition.command_line import raw_words
from nemo_dist_conf.composition.sections import SECTIONS, read_section
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.families.built_shape import BuiltShape
from nemo_dist_conf.families.config_facts import facts_from_config
from nemo_dist_conf.plan.activations import stage_bytes
from nemo_dist_conf.plan.fit import NO, usable_bytes
from nemo_dist_conf.plan.from_config import (
    autocast_of,
    hardware_of,
    model_config,
    model_shape,
    planned_start,
    refuse_adapter,
    untrained_of,
    update_of,
)
from nemo_dist_conf.plan.job import Job
from nemo_dist_conf.plan.memory import memory_of, resting_bytes
from nemo_dist_conf.plan.plan import Plan, make_plan
from nemo_dist_conf.plan.rank_shards import Place
from nemo_dist_conf.plan.schedule_orders import planned_schedules, played_schedule
from nemo_dist_conf.plan.step_time import quick_seconds
from nemo_dist_conf.plan.strategy_costs import costs_of, planned_strategies, unplanned_strategies
from nemo_dist_conf.recipe.checks import batch_problems
from nemo_dist_conf.schema import PipelineConf
from nemo_dist_conf.schema.asked import Asked
from nemo_dist_conf.schema.hardware import HardwareConf
from nemo_dist_conf.schema.own_groups import OWN_SCHEMAS, own_group
from nemo_dist_conf.strategies import Strategy, default_strategy, find_strategy
from nemo_dist_conf.topology.launched_ranks import about_to_start
from nemo_dist_conf.topology.schedule_rules import pipeline_problems
from nemo_dist_conf.topology.sequence_chunks import splits_evenly
from nemo_dist_conf.topology.solve import divisors, model_ranks
from nemo_dist_conf.wording import Spelling, assigned

__all__ = ["Found", "Result", "search"]

#: What the search chooses; words for it would be overruled.
_CHOSEN = (
    "strategy",
    "parallelism.",
    "pipeline",
    "moe.",
    "activation_checkpointing",
    "recompute",
    "train.micro_batch_size",
)
#: So many of the quick estimates' best are planned in full.
_REFINED = 2


@dataclass(frozen=True)
class Found:
    """A layout that fits. words: overrides that choose it."""

    words: str
    plan: Plan


@dataclass(frozen=True)
class Result:
    """The best layouts, fastest first; how many the rules allow, and how many of those fit.

    left_out: names of strategies that say nothing of their costs, so that no layout of theirs was planned.
    """

    best: tuple[Found, ...]
    allowed: int
    fitting: int
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Layout:
    """Sizes of the axes and what else is chosen with them."""

    strategy: Strategy
    values: Mapping[str, Any]
    sizes: Mapping[str, Any]
    schedule: str | None
    sequence: bool


def search(
    cfg: DictConfig,
    world_size: int,
    hardware: HardwareConf | str | None = None,
    top: int = 10,
    instead: str = "plan.search=false",
) -> Result:
    """The ``top`` fastest layouts of a recipe config on so many ranks, of all strategies.

    Batch, model, optimizer and dtypes stay; strategy, sizes, schedule, sequence parallelism, activation checkpointing
    and the microbatch are chosen. instead: what to type for a layout of one's own.
    Raises ConfigError where no layout is allowed, with the nearest number of ranks that one is, where none fits, and
    for typed words that the search would overrule.
    """
    typed = raw_words(OmegaConf.select(cfg, "hydra.overrides.task"))
    taken = [word for word in typed if word.lstrip("+~").startswith(_CHOSEN)]
    if taken:
        what, allowed = "a search chooses layouts itself", "words for the model, the data, the batch and the optimizer"
        raise ConfigError(Problem(what=what, asked=" ".join(taken), allowed=allowed, instead=instead))
    refuse_adapter(str(OmegaConf.select(cfg, "adapter.kind") or "none"))
    machine = hardware_of(cfg.get("hardware") if hardware is None else hardware)
    seek = _Search(cfg, machine)
    with about_to_start(planned_start(world_size, machine)):
        result = seek.best(world_size, top)
        if not result.allowed:
            raise _no_layout(seek, world_size)
    if not result.fitting:
        raise _none_fits(seek, world_size, result)
    return result


class _Search:
    def __init__(self, cfg: DictConfig, machine: HardwareConf) -> None:
        self.machine, self.model = machine, model_shape(cfg)
        self.rows, self.seq_len = cfg.train.global_batch_size, int(cfg.data.seq_len)
        problems = batch_problems(self.rows, None, 1)
        ConfigError.raise_if(problems)
        self.dtype = OmegaConf.select(cfg, "train.dtype") or "auto"
        self.update = update_of(cfg.get("optimizer"))
        self.schedules = [name for name in planned_schedules() if played_schedule(name).searched]
        wrong: list[Problem] = []
        self.sections = {name: _defaults(schema) for name, schema in SECTIONS.items()}
        self.groups = {name: read_section(cfg, name, kind, Spelling(), wrong) for name, kind in OWN_SCHEMAS.items()}
        self.sections |= self.groups
        ConfigError.raise_if(wrong)
        self.untrained = untrained_of(self.groups["trainable"], self.model)
        # What the config leaves to transformers' defaults is known from the shape.
        known = self.model.facts if isinstance(self.model, BuiltShape) else facts_from_config(model_config(cfg))
        self.facts = dataclasses.replace(
            known,
            num_layers=self.model.layers,
            num_heads=self.model.heads,
            num_kv_heads=self.model.kv_heads,
            intermediate_size=self.model.intermediate,
            num_experts=self.model.experts,
            expert_width=self.model.expert_width if self.model.experts else None,
        )
        # What no layout can have is said as such.
        first = find_strategy(default_strategy())
        asked = Asked(first, _defaults(first.schema), self.sections["parallelism"], False, self.facts, self.groups)
        ConfigError.raise_if(
            each for name in self.groups for each in own_group(name).problems(self.groups[name], asked)
        )

    @functools.cached_property
    def splits_tensors(self) -> bool:
        """Whether a tensor-parallel plan of the model is known."""
        return not self.model.experts and self._has_plan(False)

    @functools.cached_property
    def splits_sequence(self) -> bool:
        """Whether one is that splits the sequence too."""
        return self._has_plan(True)

    def _has_plan(self, sequence_parallel: bool) -> bool:
        try:
            return bool(self.model.plan(sequence_parallel))
        except ConfigError:
            return False

    def best(self, world_size: int, top: int) -> Result:
        quick: list[tuple[float, int, Job, _Layout, bool | str]] = []
        allowed = 0
        room = usable_bytes(self.machine)
        for layout in self.layouts(world_size):
            job = self.job(layout, world_size)
            if job is None:
                continue
            allowed += 1
            if sum(resting_bytes(job, 0, Place())) > room:
                continue
            largest = 0
            for mode in layout.strategy.activation_checkpointing:
                for changed in self.batches(job, mode):
                    if changed.rows <= largest:
                        continue  # it fits without recomputing as much
                    if not _may_fit(changed, room):
                        break  # larger microbatches need more
                    largest = changed.rows
                    quick.append((quick_seconds(changed), len(quick), changed, layout, mode))
        quick.sort(key=lambda entry: (entry[0], -entry[2].rows, entry[1]))
        found: list[Found] = []
        planned: set[int] = set()
        for _, _, job, layout, mode in quick:
            if len(planned) == _REFINED * top:
                break
            if id(layout) in planned:
                continue  # with another microbatch or mode, which is slower
            plan = make_plan(job)
            if plan.verdict != NO:
                planned.add(id(layout))
                found.append(Found(_words(layout, job, mode), plan))
        found.sort(key=lambda one: one.plan.step.seconds)
        fitting = len({id(layout) for _, _, _, layout, _ in quick})
        return Result(tuple(found[:top]), allowed, fitting, tuple(one.name for one in unplanned_strategies()))

    def layouts(self, world_size: int) -> Iterator[_Layout]:
        """All sizes whose product is world_size and that divide the model and the batch."""
        for strategy in planned_strategies():
            axes = strategy.axes.allowed
            values = costs_of(strategy).recipe_options(_defaults(strategy.schema), self.dtype, self.machine.device)
            widths = [w for w in (self.model.heads, self.model.kv_heads, self.model.intermediate) if w]
            for pp in divisors(world_size) if "pp" in axes else [1]:
                if pp > self.model.layers:
                    continue
                for tp in divisors(world_size // pp) if "tp" in axes and self.splits_tensors else [1]:
                    if any(width % tp for width in widths):
                        continue
                    for cp in divisors(world_size // (pp * tp)) if "cp" in axes else [1]:
                        dp = world_size // (pp * tp * cp)
                        if self.rows % dp or not splits_evenly(self.seq_len, cp):
                            continue
                        yield from self.with_data(strategy, values, pp, tp, cp, dp)

    def with_data(
        self, strategy: Strategy, values: Mapping[str, Any], pp: int, tp: int, cp: int, dp: int
    ) -> Iterator[_Layout]:
        replicas = [d for d in divisors(dp) if d < dp or d == 1] if "dp_replicate" in strategy.axes.allowed else [1]
        experts = divisors(self.model.experts) if any(self.model.sparse) and "ep" in strategy.axes.allowed else [1]
        for replicate in replicas:
            for ep in experts:
                sizes = {
                    **self.sections["parallelism"],
                    "dp_replicate_size": replicate if replicate > 1 else None,
                    "tp_size": tp,
                    "pp_size": pp,
                    "cp_size": cp,
                    "ep_size": ep,
                }
                for schedule in self.schedules if pp > 1 else (None,):
                    sequence = tp > 1 and "sequence_parallel" in values and self.splits_sequence
                    yield _Layout(strategy, values, sizes, schedule, sequence)

    def job(self, layout: _Layout, world_size: int) -> Job | None:
        """The layout's job with as small a microbatch as there is; None where a rule forbids it."""
        sizes = layout.sizes
        data_size = world_size // model_ranks(sizes)
        rows = self.rows // data_size
        pipeline = dict(self.sections["pipeline"])
        if layout.schedule is not None:
            pipeline |= {"pp_schedule": layout.schedule, "pp_batch_size": rows, "pp_microbatch_size": 1}
        values = dict(layout.values)
        if layout.sequence:
            values["sequence_parallel"] = True
        sections = {**self.sections, "parallelism": sizes, "pipeline": pipeline}
        checked, _ = check_values(
            layout.strategy, values, sections, False, world_size, facts=self.facts, seq_len=self.seq_len
        )
        if checked is None:
            return None
        return Job(
            strategy=layout.strategy,
            options=values,
            mesh=checked.mesh,
            model=self.model,
            hardware=self.machine,
            rows=1,
            seq_len=self.seq_len,
            microbatches=rows,
            pipeline=pipeline,
            moe=self.sections["moe"],
            groups=self.groups,
            autocast=autocast_of(layout.strategy, values, self.dtype, self.machine.device),
            update=self.update,
            untrained=self.untrained,
        )

    def batches(self, job: Job, mode: bool | str) -> Iterator[Job]:
        """The job with this mode and every size of a microbatch that is a power of two and divides its rows."""
        asked = {**job.options, "activation_checkpointing": mode, "ep_size": job.ep, **job.moe}
        size = 1
        while size <= job.microbatches and job.microbatches % size == 0:
            pipeline = {**job.pipeline, "pp_microbatch_size": size} if job.pp > 1 else job.pipeline
            if job.pp == 1 or not pipeline_problems(pipeline, job.pp, self.model.layers, Spelling(), asked):
                yield dataclasses.replace(
                    job, rows=size, microbatches=job.microbatches // size, pipeline=pipeline, checkpointing=mode
                )
            size *= 2


def _may_fit(job: Job, room: float) -> bool:
    """Whether the first and the last pipeline rank fit, with what a schedule keeps by its formula."""
    per_rank = len(job.stages) // job.pp

    def kept(rank: int) -> int:
        chunks = job.played.kept(rank, job.pp, per_rank, job.microbatches)
        sizes = [stage_bytes(job, stage).saved for stage in job.stages_of(rank)]
        return chunks * sum(sizes) // len(sizes)

    ranks = sorted({0, job.pp - 1})
    return all(memory_of(job, rank, Place(), kept if job.pp > 1 else None).peak <= room for rank in ranks)


@functools.cache
def _defaults(schema: type) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.structured(schema), resolve=True)
    assert isinstance(values, dict)
    return {str(key): value for key, value in values.items()}


def _words(layout: _Layout, job: Job, mode: bool | str) -> str:
    """The overrides that choose a layout in the recipe."""
    words = [f"strategy={layout.strategy.name}"]
    for name, size in layout.sizes.items():
        if size not in (None, 1):
            words.append(f"parallelism.{name}={size}")
    if layout.sequence:
        words.append("strategy.sequence_parallel=true")
    if job.pp > 1:
        words += [f"pipeline={job.schedule}"] if job.schedule != PipelineConf.pp_schedule else []
        words += [f"pipeline.pp_microbatch_size={job.rows}"] if job.rows > 1 else []
    elif job.microbatches > 1:
        words.append(f"train.micro_batch_size={job.rows}")
    if mode:
        words.append(assigned("activation_checkpointing", mode))
    return " ".join(words)


def _no_layout(seek: _Search, world_size: int) -> ConfigError:
    near = next((n for n in _outwards(world_size) if any(_legal(seek, n))), None)
    model = seek.model
    heads = f", {model.heads} heads" if model.heads else ""
    what = f"no layout of {world_size} ranks divides {seek.rows} rows{heads} and {seek.seq_len} tokens"
    allowed = "numbers of ranks that do, or another global_batch_size"
    return ConfigError(
        Problem(what=what, asked=f"world_size={world_size}", allowed=allowed, instead=f"world_size={near or 1}")
    )


def _legal(seek: _Search, world_size: int) -> Iterator[bool]:
    with about_to_start(planned_start(world_size, seek.machine)):
        for layout in seek.layouts(world_size):
            if seek.job(layout, world_size) is not None:
                yield True
                return


def _outwards(number: int) -> Iterator[int]:
    """The numbers beside one, nearest first, the smaller before the larger."""
    for step in range(1, number + 1):
        if number - step > 0:
            yield number - step
        yield number + step


def _none_fits(seek: _Search, world_size: int, result: Result) -> ConfigError:
    what = (
        f"none of the {result.allowed:,} layouts of {world_size} ranks fits into {seek.machine.memory_gib:g} GiB a rank"
    )
    asked = f"world_size={world_size} hardware.memory_gib={seek.machine.memory_gib:g}"
    return ConfigError(
        Problem(
            what=what,
            asked=asked,
            allowed="more ranks, or ranks with more memory",
            instead=f"world_size={2 * world_size}",
        )
    )
