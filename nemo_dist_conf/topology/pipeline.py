"""Rules of pipeline schedules: names, stages per rank, microbatches. Integers and names only."""

from __future__ import annotations

from typing import Any, Mapping

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.names import SCHEDULES, Schedule, nearest
from nemo_dist_conf.topology.paths import Paths

__all__ = ["find_schedule", "pipeline_problems"]

#: Words that others use for several of torch's schedules at once, with what they can mean.
_AMBIGUOUS = {
    "zero_bubble": ("interleaved_zero_bubble", "zbv_zero_bubble"),
    "v_schedule": ("zbv_zero_bubble", "dualpipe_v"),
    "dfs": ("1f1b", "interleaved_1f1b"),
}


def find_schedule(name: str) -> Schedule | None:
    """The schedule for an option name or for torch's class name, case ignored as torch does."""
    lowered = name.lower()
    for option, schedule in SCHEDULES.items():
        if lowered in (option, schedule.torch_name.lower(), f"schedule{schedule.torch_name.lower()}"):
            return schedule
    return None


def pipeline_problems(
    pipeline: Mapping[str, Any], pp_size: int, num_layers: int | None = None, paths: Paths = Paths()
) -> list[Problem]:
    """What cannot work in the pipeline settings for pp_size > 1.

    num_layers None: the model is not known, so rules about stages are left to a later check.
    """
    problems: list[Problem] = []
    schedule = _schedule(pipeline, paths, problems)
    batch, micro = pipeline["pp_batch_size"], pipeline["pp_microbatch_size"]
    for name in ("pp_batch_size", "pp_microbatch_size", "layers_per_stage", "pp_seq_len"):
        value = pipeline[name]
        if value is not None and value < 1:
            problems.append(
                Problem(
                    f"pipeline.{name}={value} is not positive",
                    paths.set(f"pipeline.{name}", value),
                    "1 or more",
                    paths.set(f"pipeline.{name}", 1),
                )
            )
    if problems:
        return problems
    stages = _stages(pipeline, pp_size, num_layers)
    if batch % micro:
        problems.append(
            Problem(
                f"pp_microbatch_size={micro} does not divide pp_batch_size={batch}",
                paths.set("pipeline.pp_microbatch_size", micro),
                f"a divisor of {batch}",
                paths.set("pipeline.pp_microbatch_size", max(d for d in range(1, micro + 1) if batch % d == 0)),
            )
        )
    elif schedule is not None and schedule.torch_name != "GPipe":
        total = stages or pp_size * (2 if schedule.multi else 1)
        needed = total if schedule.torch_name == "DualPipeV" else pp_size
        if batch // micro < needed:
            problems.append(
                Problem(
                    f"{batch // micro} microbatches are too few for {schedule.torch_name} on {pp_size} pipeline ranks",
                    f"{paths.set('pipeline.pp_batch_size', batch)} {paths.set('pipeline.pp_microbatch_size', micro)}",
                    f"{needed} microbatches or more (pp_batch_size / pp_microbatch_size)",
                    paths.set("pipeline.pp_batch_size", needed * micro),
                )
            )
    if schedule is not None and stages is not None:
        problems += _stage_problems(pipeline, schedule, stages, pp_size, num_layers, paths)
    elif schedule is not None and num_layers is not None and num_layers < pp_size * (2 if schedule.multi else 1):
        problems.append(
            Problem(
                f"{num_layers} layers are too few for {pp_size} pipeline ranks with {schedule.torch_name}",
                paths.set("parallelism.pp_size", pp_size),
                f"one layer a stage or more, {2 if schedule.multi else 1} stage(s) a rank",
                paths.set("parallelism.pp_size", max(1, num_layers // (2 if schedule.multi else 1))),
            )
        )
    return problems


def _schedule(pipeline: Mapping[str, Any], paths: Paths, problems: list[Problem]) -> Schedule | None:
    name, csv = pipeline["pp_schedule"], pipeline["pp_schedule_csv"]
    if csv is not None and name is not None and find_schedule(name) is not SCHEDULES["1f1b"]:
        problems.append(
            Problem(
                "a schedule's name and a schedule file were both given",
                f"{paths.set('pipeline.pp_schedule', name)} {paths.set('pipeline.pp_schedule_csv', csv)}",
                "one of the two",
                paths.set("pipeline.pp_schedule", None),
            )
        )
    if csv is not None:
        return None
    if name is None:
        problems.append(
            Problem(
                "no pipeline schedule",
                paths.set("pipeline.pp_schedule", None),
                ", ".join(SCHEDULES),
                paths.choose("pipeline", "1f1b"),
            )
        )
        return None
    schedule = find_schedule(name)
    if schedule is None:
        likely = _AMBIGUOUS.get(name.lower()) or nearest(name, SCHEDULES) or ["1f1b"]
        rest = [option for option in SCHEDULES if option not in likely]
        problems.append(
            Problem(
                f"pp_schedule={name} is not a schedule of torch",
                paths.set("pipeline.pp_schedule", name),
                ", ".join([*likely, *rest]),
                paths.choose("pipeline", likely[0]),
            )
        )
    return schedule


def _stages(pipeline: Mapping[str, Any], pp_size: int, num_layers: int | None) -> int | None:
    """Total number of stages that the splitting options ask for; None: the default split."""
    parts = pipeline["module_fqns_per_model_part"]
    if parts is not None:
        return len(parts)
    per_stage = pipeline["layers_per_stage"]
    if per_stage is None or num_layers is None:
        return None
    stages = -(-num_layers // per_stage)
    rounding = pipeline["round_virtual_stages_to_pp_multiple"]
    rounding = getattr(rounding, "name", rounding)
    if rounding == "up":
        stages = -(-stages // pp_size) * pp_size
    elif rounding == "down":
        stages = max(pp_size, stages // pp_size * pp_size)
    return stages


def _stage_problems(
    pipeline: Mapping[str, Any], schedule: Schedule, stages: int, pp_size: int, num_layers: int | None, paths: Paths
) -> list[Problem]:
    by_name = pipeline["module_fqns_per_model_part"] is not None
    asked = (
        f"{paths.key('pipeline.module_fqns_per_model_part')} with {stages} parts"
        if by_name
        else paths.set("pipeline.layers_per_stage", pipeline["layers_per_stage"])
    )
    per_rank = "2" if schedule.v_shaped else "2 or more" if schedule.multi else "1"
    fits = stages % pp_size == 0 and (
        stages == 2 * pp_size if schedule.v_shaped else stages >= 2 * pp_size if schedule.multi else stages == pp_size
    )
    if fits and (num_layers is None or by_name or stages <= num_layers):
        return []
    if stages == pp_size and schedule.multi:
        instead = paths.choose("pipeline", "1f1b")
    elif stages % pp_size == 0 and stages >= 2 * pp_size and not schedule.multi:
        instead = paths.choose("pipeline", "interleaved_1f1b")
    elif by_name:
        instead = paths.set("pipeline.module_fqns_per_model_part", None)
    else:
        wanted = pp_size * (2 if schedule.multi else 1)
        exact = num_layers and num_layers % wanted == 0
        instead = paths.set("pipeline.layers_per_stage", num_layers // wanted if exact and num_layers else None)
    return [
        Problem(
            f"{stages} stages do not fit {schedule.torch_name} on {pp_size} pipeline ranks",
            asked,
            f"{per_rank} stage(s) a rank, so a multiple of {pp_size}, each with a layer",
            instead,
        )
    ]
