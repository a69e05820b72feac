"""What torch does not publish of its pipelines."""

from __future__ import annotations

from typing import Any, Sequence

from torch.distributed.pipelining import PipelineStage, _backward
from torch.distributed.pipelining.schedules import PipelineScheduleMulti, _PipelineScheduleRuntime, get_schedule_class

__all__ = ["backward_of_stage", "schedule_by_name", "schedule_from_table"]

#: ``backward_of_stage(output, output gradients, inputs)``: gradients of a stage's inputs; its graph is freed.
#: torch 2.11 to 2.13: a stage's own method runs it together with FSDP's reductions, when torch sees fit.
#: Test: tests/dist/test_pipeline.py, test_when_gradients_are_reduced.
backward_of_stage = _backward.stage_backward


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
