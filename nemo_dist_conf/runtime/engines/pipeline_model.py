"""A model as a pipeline of stages, run by a schedule of torch.distributed.pipelining.

Shapes: B rows that a data rank hands over in one step, S tokens, H the width between stages, V ids of the vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import Any, Callable, Collection, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage

from nemo_dist_conf.errors import ConfigError, NemoDistConfError, Problem
from nemo_dist_conf.runtime.engines.averaged_gradients import Averaged
from nemo_dist_conf.runtime.engines.refused_copies import refuse_copy
from nemo_dist_conf.runtime.model.blocks import Blocks
from nemo_dist_conf.runtime.techniques.loss import token_loss_sum
from nemo_dist_conf.runtime.techniques.pipeline.flow import Placed, Shape
from nemo_dist_conf.runtime.techniques.pipeline.own_skips import OwnSkips
from nemo_dist_conf.runtime.techniques.pipeline.shared import SharedParameter, SharedParameters, shared_between
from nemo_dist_conf.runtime.techniques.pipeline.stage_forward import StageForward
from nemo_dist_conf.runtime.techniques.pipeline.stages import chain_of, plan_stages, spread
from nemo_dist_conf.runtime.torch_inside.pipelining import ReducingStage, schedule_by_name, schedule_from_table
from nemo_dist_conf.runtime.typed_configs import PipelineConfig
from nemo_dist_conf.topology.schedule_file import read_schedule
from nemo_dist_conf.topology.schedule_rules import find_schedule
from nemo_dist_conf.topology.stage_layers import rank_of_stage
from nemo_dist_conf.wording import typed_path

__all__ = ["Pipeline", "PipelinePlan", "StageRow", "plan_pipeline"]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StageRow:
    """What one stage of a pipeline is: its place, its modules by name, and their size.

    parameters: of the whole stage, however many ranks of a data or tensor axis share them.
    """

    stage: int
    pp_rank: int
    modules: tuple[str, ...]
    parameters: int
    parameter_bytes: int

    def __str__(self) -> str:
        return f"pp rank {self.pp_rank}: {_ranges(self.modules)}"


@dataclass(frozen=True)
class PipelinePlan:
    """Every stage of a pipeline, how the model's forward goes over them, and which parameters several of them hold.

    parts: names of the modules that lie on stages, or in all of them.
    """

    rows: tuple[StageRow, ...]
    placed: Placed
    shared: tuple[SharedParameter, ...]
    parts: tuple[str, ...]


def plan_pipeline(model: nn.Module, blocks: Blocks, config: PipelineConfig, pp_size: int) -> PipelinePlan:
    """Which modules of the plain model, still unwrapped, go to which stage and rank.

    Raises ConfigError for a model or settings that cannot be split so.
    """
    settings = config.to_dict()
    chain = chain_of(model, blocks, settings)
    planned = plan_stages(chain, settings, pp_size)
    if config.pp_schedule_csv is not None:
        ranks = list(read_schedule(config.pp_schedule_csv).ranks)
    else:
        schedule = find_schedule(config.pp_schedule or "")
        assert schedule is not None
        ranks = [rank_of_stage(stage, len(planned), pp_size, schedule.v_shaped) for stage in range(len(planned))]
    placed = spread(chain, planned, settings)
    held = [_parameters(model, *one) for one in zip(placed.parts, placed.loose)]
    parts = zip(ranks, placed.parts, held, strict=True)
    rows = (_row(stage, rank, modules, named) for stage, (rank, modules, named) in enumerate(parts))
    return PipelinePlan(tuple(rows), placed, tuple(shared_between(model, held)), tuple(chain.parts))


def _parameters(model: nn.Module, modules: Sequence[str], loose: Collection[str]) -> dict[str, nn.Parameter]:
    """Parameters of a stage by all of their names in the model."""
    found = {name: model.get_parameter(name) for name in loose}
    for module in modules:
        found.update(model.get_submodule(module).named_parameters(module, remove_duplicate=False))
    return found


def _row(stage: int, pp_rank: int, modules: Sequence[str], named: Mapping[str, nn.Parameter]) -> StageRow:
    parameters = list({id(parameter): parameter for parameter in named.values()}.values())
    count, size = sum(p.numel() for p in parameters), sum(p.numel() * p.element_size() for p in parameters)
    return StageRow(stage, pp_rank, tuple(modules), count, size)


class Pipeline(nn.Module):
    """The stages of a model that this rank holds, and the schedule that runs all stages of all ranks.

    ``step`` takes the place of forward and backward. Parameters have the names of the whole model, each on the rank
    that holds it. rows: every stage of the pipeline. config: that of a transformers model, else None.
    """

    def __init__(
        self,
        parts: Mapping[int, nn.Module],
        forwards: Mapping[int, StageForward | OwnSkips],
        plan: PipelinePlan,
        config: PipelineConfig,
        pp_mesh: DeviceMesh,
        *,
        cp_size: int = 1,
        dtype: torch.dtype | None = None,
        reduce_every_backward: bool = False,
        averaged: Sequence[Averaged] = (),
        is_compiled: bool = False,
    ) -> None:
        """parts: this rank's stages by index; forwards: of each. dtype: of what stages hand on. reduce_every_backward:
        FSDP reduces gradients in the backward of every microbatch, not once a step. averaged: for each stage with such,
        its parameters that FSDP does not reduce. is_compiled: whether blocks are."""
        super().__init__()
        self.parts = nn.ModuleDict({str(index): part for index, part in parts.items()})
        self.rows, self.pp_mesh, self.pipeline_config = plan.rows, pp_mesh, config
        self.config = getattr(next(iter(parts.values())), "config", None)
        self.microbatches = config.pp_batch_size // config.pp_microbatch_size
        self._averaged = averaged
        self._loss_fn: Callable[[Any, Any], Tensor] = config.loss_fn or token_loss_sum
        self._scale: float | Tensor = 1.0
        self._length = None if config.pp_seq_len is None else config.pp_seq_len // cp_size
        self._placed, self._dtype, self._reduce_every_backward = plan.placed, dtype, reduce_every_backward
        #: Parameters that several stages hold.
        self.shared = SharedParameters(plan.shared, [row.pp_rank for row in plan.rows], parts, pp_mesh)
        self._copies = sum((len(one.stages) - 1) * one.elements for one in plan.shared)
        self._microbatches: Sequence[Tensor] = ()
        self._ids_agree = False
        self._schedule: Any = None if self._length is None else self._prepared(self._length)
        self._is_first, self._is_last = "0" in self.parts, str(len(self.rows) - 1) in self.parts
        shown = config.pp_schedule_csv or config.pp_schedule
        sizes = (pp_mesh.size(), len(self.rows), shown, self.microbatches)
        for forward in forwards.values():
            forward.sent = dtype
            forward.watch(is_compiled)
        log.info("pipeline over %d ranks: %d stages, %s, %d microbatches", *sizes)

    def _prepared(self, length: int) -> Any:
        """The schedule of this rank's stages, for rows of ``length`` tokens.

        With all shapes given, torch need not find them by a forward and a backward and a message between neighbours.
        """
        config, device = self.pipeline_config, torch.device(self.pp_mesh.device_type)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        stages = [
            ReducingStage(
                part,
                int(index),
                len(self.rows),
                device,
                group=self.pp_mesh.get_group(),
                when=(config.patch_stage_backward_maybe_with_nosync, self._reduce_every_backward),
                ids=self._ids_of,
                **_shapes(int(index), config.pp_microbatch_size, length, self._placed, self._dtype),
            )
            for index, part in sorted(self.parts.items(), key=lambda entry: int(entry[0]))
        ]
        return _schedule(stages, self.microbatches, self._scaled_loss, config)

    @property
    def scales_gradients(self) -> bool:
        """Whether loss and gradients of a step are the mean over its microbatches, not the sum."""
        return self.pipeline_config.scale_grads_in_schedule

    def step(self, input_ids: Tensor, target: Tensor, scale: float | Tensor = 1.0) -> Tensor:
        """Forward and backward of one batch through all stages; every rank of the pipeline calls it.

        input_ids: [B, S] of this data rank, B = pp_batch_size, the same on every stage, which may compute positions and
        masks from them. target: what the loss function compares with,
        B rows. scale: factor on the gradients. Gradients of ``scale`` times the losses of all microbatches are added
        to those there are (scale_grads_in_schedule: of their mean).
        Returns the sum (or mean) of the losses without ``scale``, a scalar in float64, the same on every rank.
        Raises ConfigError for a batch of another shape than the pipeline was made for.
        """
        self._accept_batch(input_ids, target)
        self._agree_on_ids(input_ids)
        self._scale = scale
        self._microbatches = input_ids.tensor_split(self.microbatches)
        self.shared.fill_copies()
        held = self._put_aside() if self.scales_gradients else self.shared.put_aside()
        losses: list[Tensor] = []
        options: dict[str, Any] = {"target": target, "losses": losses} if self._is_last else {}
        if "return_outputs" in inspect.signature(self._schedule.step).parameters:
            options["return_outputs"] = False
        try:
            # Contiguous: torch 2.11 compares a microbatch's strides with those that it expects.
            self._schedule.step(*([input_ids.contiguous()] if self._is_first else []), **options)
        except RuntimeError as error:
            if isinstance(error.__cause__, NemoDistConfError):  # torch wraps what a stage's forward raises
                raise error.__cause__ from None
            raise
        for averaged in self._averaged:
            averaged.average()
        self.shared.sum_gradients()
        for parameter, gradient in held:
            parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        # Added in float64: microbatches must not change the logged number.
        total = torch.zeros((), dtype=torch.float64, device=input_ids.device)
        for loss in losses:
            total += loss.detach().double() / scale
        dist.all_reduce(total, group=self.pp_mesh.get_group())
        return total / self.microbatches if self.scales_gradients else total

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        what = "a pipeline runs forward and backward of its microbatches in one call"
        raise ConfigError(
            Problem(what=what, asked="model(input_ids)", allowed="model.step", instead="model.step(input_ids, labels)")
        )

    def __deepcopy__(self, memo: Any) -> Any:
        raise refuse_copy(self)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's parameters, by their names in the whole model; one that several stages here hold once."""
        shared = self.shared.plain
        seen: set[str] = set()
        for part in self.parts.values():
            for name, parameter in part.named_parameters("", recurse, remove_duplicate):
                plain = shared.get(name, name)
                if plain not in seen or not remove_duplicate:
                    seen.add(plain)
                    yield f"{prefix}.{plain}" if prefix else plain, parameter

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """This rank's parameters and buffers, by their names in the whole model; tied ones once."""
        shared, found = self.shared.plain, dict[str, Any]()
        for part in self.parts.values():
            for name, value in part.state_dict(*args, **kwargs).items():
                found.setdefault(shared.get(name, name), value)
        return found

    @property
    def num_parameters(self) -> int:
        """Number of parameters of the whole model."""
        return sum(row.parameters for row in self.rows) - self._copies

    def table(self) -> str:
        """What every stage is and which rank holds it, a line each."""
        lines = [("stage", "pp rank", "parameters", "MiB", "modules")]
        for row in self.rows:
            mib = f"{row.parameter_bytes / 2**20:,.1f}"
            lines.append((str(row.stage), str(row.pp_rank), f"{row.parameters:,}", mib, _ranges(row.modules)))
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        return "\n".join("  ".join([*(w.rjust(n) for w, n in zip(line, widths)), line[4]]) for line in lines)

    def _ids_of(self, microbatch: int) -> Tensor:
        return self._microbatches[microbatch]

    def _scaled_loss(self, output: Any, target: Any) -> Tensor:
        return self._loss_fn(output, target) * self._scale

    def _accept_batch(self, input_ids: Tensor, target: Tensor) -> None:
        rows, config = self.pipeline_config.pp_batch_size, self.pipeline_config
        if input_ids.size(0) != rows or target.size(0) != rows:
            got = f"{input_ids.size(0)} rows" if input_ids.size(0) != rows else f"{target.size(0)} rows of targets"
            what = f"the pipeline was made for batches of {rows} rows and was given {got}"
            asked = f"pipeline.pp_batch_size={rows}"
            raise ConfigError(
                Problem(
                    what=what,
                    asked=asked,
                    allowed=f"{rows} rows",
                    instead=f"pipeline.pp_batch_size={input_ids.size(0)}",
                )
            )
        length = input_ids.size(1)
        if self._length is None:
            self._length, self._schedule = length, self._prepared(length)
        if length != self._length:
            what = f"the pipeline runs rows of {self._length} tokens (of a rank) and was given {length}"
            asked = f"pipeline.pp_seq_len={config.pp_seq_len}" if config.pp_seq_len else f"{self._length} tokens before"
            allowed = "rows of one length, because ranks agree on the shapes they send once"
            raise ConfigError(
                Problem(
                    what=what,
                    asked=asked,
                    allowed=allowed,
                    instead="pipeline.pp_seq_len=null, and rows padded to one length",
                )
            )

    def _agree_on_ids(self, input_ids: Tensor) -> None:
        """In the first step: loaders that deal rows out by global rank give every stage other ones, in each step."""
        if self._ids_agree:
            return
        places = torch.arange(1, input_ids.numel() + 1, device=input_ids.device, dtype=torch.float64)
        mark = (input_ids.detach().flatten().double() * places.view(-1)).sum()
        marks = torch.stack([mark, -mark])
        dist.all_reduce(marks, dist.ReduceOp.MAX, group=self.pp_mesh.get_group())
        if float(marks.sum()) != 0.0:
            raise ConfigError(
                Problem(
                    what="the stages of a pipeline were given different rows, and all of them compute with theirs",
                    asked=f"parallelism.pp_size={self.pp_mesh.size()}",
                    allowed="the same rows on every stage: those of mesh_context.data_rank among data_size",
                    instead="rows.chunk(mesh_context.data_size)[mesh_context.data_rank]",
                )
            )
        self._ids_agree = True

    def _put_aside(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Gradients of earlier steps, which the schedule would divide once more."""
        held = [(p, p.grad) for p in self.parameters() if p.grad is not None]
        for parameter, _ in held:
            parameter.grad = None
        return held


def _schedule(
    stages: Sequence[PipelineStage], microbatches: int, loss_fn: Callable[[Any, Any], Tensor], config: PipelineConfig
) -> Any:
    options: dict[str, Any] = {"loss_fn": loss_fn, "scale_grads": config.scale_grads_in_schedule}
    if config.pp_schedule_csv is not None:
        return schedule_from_table(stages, microbatches, str(typed_path(config.pp_schedule_csv)), **options)
    known = find_schedule(config.pp_schedule or "")
    assert known is not None
    return schedule_by_name(stages, microbatches, known.torch_name, **options)


def _shapes(index: int, rows: int, length: int, placed: Placed, dtype: torch.dtype | None) -> dict[str, Any]:
    """What a stage takes and returns, as tensors without values."""

    def empty(shape: Shape, dtype: torch.dtype | None = None) -> Tensor:
        size = shape.of(rows, length)
        return torch.empty(size, dtype=dtype or shape.dtype, device="meta", requires_grad=True)

    def handed(stage: int) -> Any:
        found = tuple(empty(placed.flow.shape(value), dtype) for value in placed.handed[stage])
        return found[0] if len(found) == 1 else found

    ids = torch.empty(rows, length, dtype=torch.int64, device="meta")
    return {
        "input_args": handed(index - 1) if index else ids,
        "output_args": handed(index) if index < len(placed.handed) else empty(placed.flow.output),
    }


def _ranges(names: Sequence[str]) -> str:
    """``embed, layers.0-3``: names in a row that end in numbers, as one."""
    shown: list[tuple[str, int | None, int | None]] = []
    for name in names:
        stem, _, leaf = name.rpartition(".")
        number = int(leaf) if leaf.isdigit() else None
        if number is not None and shown and shown[-1][0] == stem and shown[-1][2] == number - 1:
            shown[-1] = (stem, shown[-1][1], number)
        else:
            shown.append((stem if number is not None else name, number, number))
    return ", ".join(
        stem if first is None else f"{stem}.{first}" if first == last else f"{stem}.{first}-{last}"
        for stem, first, last in shown
    )
