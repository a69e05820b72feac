"""What torch does not publish of its pipelines."""

from __future__ import annotations

from typing import Any, Callable, Sequence

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining._backward import stage_backward
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, _PipelineScheduleRuntime, get_schedule_class

__all__ = ["ReducingStage", "schedule_by_name", "schedule_from_table"]


class ReducingStage(PipelineStage):
    """PipelineStage whose module is called as the whole model is, with ids, and is given what it receives beside them.

    Where asked, FSDP reduces gradients while backward runs, as it does outside of a pipeline; torch holds all of them
    back and reduces them after a stage's last backward, when nothing is left to overlap with.
    when: (in the last backward, in every one). ids: of a microbatch, by its number.
    torch 2.11 to 2.13: the methods that decide and that call the module are a stage's own, and not published.
    Test: tests/dist/test_pipeline.py, test_when_gradients_are_reduced, test_equals_one_process.
    """

    def __init__(
        self, *args: Any, ids: Callable[[int], Tensor], when: tuple[bool, bool] = (False, False), **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._in_last, self._in_every = when
        self._ids, self._microbatch = ids, 0

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        self._microbatch = fwd_chunk_id
        return super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)

    def forward_maybe_with_nosync(self, *args: Any, **kwargs: Any) -> Any:
        return self.submod(self._ids(self._microbatch), received=() if self.is_first else args)

    def backward_maybe_with_nosync(
        self, backward_type: Any, bwd_kwargs: dict[str, Any], last_backward: bool = False
    ) -> Any:
        grads, groups = self._backward(backward_type, bwd_kwargs, last_backward)
        if backward_type != "weight":  # of what is not used torch 2.11 sends nothing, for which its neighbour waits
            pairs = zip(grads, bwd_kwargs["input_values"])
            grads = tuple(torch.zeros_like(v) if g is None and v.requires_grad else g for g, v in pairs)
        return grads, groups

    def _backward(self, backward_type: Any, bwd_kwargs: dict[str, Any], last_backward: bool) -> Any:
        reduces = self._in_every or (self._in_last and last_backward)
        if backward_type != "full" or not reduces or not isinstance(self.submod, FSDPModule):
            return super().backward_maybe_with_nosync(backward_type, bwd_kwargs, last_backward)
        self.submod.set_is_last_backward(last_backward)
        self.submod.set_reshard_after_backward(last_backward)
        self.submod.set_requires_gradient_sync(True)
        return stage_backward(bwd_kwargs["stage_output"], bwd_kwargs["output_grads"], bwd_kwargs["input_values"]), None


def schedule_from_table(stages: Sequence[PipelineStage], microbatches: int, file: str, **options: Any) -> Any:
    """A schedule that runs what a table of actions (CSV) says. options: as those of torch's schedules.

    torch 2.11 to 2.13 write and read such tables, and publish the classes with an order of their own alone.
    Test: tests/dist/test_pipeline.py, test_a_schedule_from_a_file_runs.
    """
    schedule = _PipelineScheduleRuntime(list(stages), microbatches, **options)
    schedule._load_csv(file)
    return schedule


def schedule_by_name(stages: Sequence[PipelineStage], microbatches: int, name: str, **options: Any) -> Any:
    """A schedule of torch by the name of its class, in any case.

    torch 2.11 to 2.13: whether a class takes one stage or several is told by a base that the documentation leaves out.
    Test: tests/dist/test_pipeline.py, test_equals_one_process.
    """
    kind: Any = get_schedule_class(name)
    return kind(list(stages) if issubclass(kind, PipelineScheduleMulti) else stages[0], microbatches, **options)
