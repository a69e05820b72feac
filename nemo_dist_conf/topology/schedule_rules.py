"""Rules of pipeline schedules: names, stages per rank, microbatches. Integers and names only."""

from __future__ import annotations

from typing import Any, Mapping

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.names import SCHEDULES, Schedule
from nemo_dist_conf.topology.schedule_file import ScheduleFile, read_schedule
from nemo_dist_conf.topology.stage_layers import stages_for
from nemo_dist_conf.wording import Spelling, assigned, unknown_name

__all__ = ["find_schedule", "pipeline_problems", "stage_count"]

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
    pipeline: Mapping[str, Any],
    pp_size: int,
    num_layers: int | None = None,
    spelling: Spelling = Spelling(),
    strategy: Mapping[str, Any] | None = None,
) -> list[Problem]:
    """What cannot work in the pipeline settings for pp_size > 1.

    num_layers None: the model is not known, so rules about stages are left to a later check. strategy: the values of
    the strategy node, of moe, and ep_size, for the options that a schedule excludes.
    """
    problems: list[Problem] = []
    schedule, file = _schedule(pipeline, spelling, problems)
    for name in ("pp_batch_size", "pp_microbatch_size", "layers_per_stage", "pp_seq_len"):
        value = pipeline[name]
        if value is not None and value < 1:
            problems.append(
                Problem(
                    what=f"pipeline.{name}={value} is not positive",
                    asked=spelling.set(f"pipeline.{name}", value),
                    allowed="1 or more",
                    instead=spelling.set(f"pipeline.{name}", 1),
                )
            )
    parts = pipeline["module_fqns_per_model_part"]
    if parts is not None and not _are_names(parts):
        problems.append(
            Problem(
                what="pipeline.module_fqns_per_model_part is not a list of lists of names, with a name or more in each",
                asked=spelling.set("pipeline.module_fqns_per_model_part", parts),
                allowed="[[model.embed_tokens,model.layers.0],[model.layers.1,model.norm,lm_head]], or null",
                instead=spelling.set("pipeline.module_fqns_per_model_part", None),
            )
        )
    if problems:
        return problems
    problems += _option_problems(pipeline, schedule, file, strategy or {}, spelling)
    stages = stage_count(pipeline, pp_size, num_layers)
    problems += _microbatch_problems(pipeline, schedule, file, stages, pp_size, spelling)
    if file is not None:
        problems += _file_problems(pipeline, file, pp_size, num_layers, spelling)
    elif schedule is not None and stages is not None and (parts is not None or pipeline["layers_per_stage"]):
        problems += _stage_problems(pipeline, schedule, stages, pp_size, num_layers, spelling)
    elif schedule is not None and num_layers is not None and num_layers < pp_size * (2 if schedule.multi else 1):
        problems.append(
            Problem(
                what=f"{num_layers} layers are too few for {pp_size} pipeline ranks with {schedule.torch_name}",
                asked=spelling.set("parallelism.pp_size", pp_size),
                allowed=f"one layer a stage or more, {2 if schedule.multi else 1} stage(s) a rank",
                instead=spelling.set("parallelism.pp_size", max(1, num_layers // (2 if schedule.multi else 1))),
            )
        )
    return problems


def stage_count(pipeline: Mapping[str, Any], pp_size: int, num_layers: int | None) -> int | None:
    """Stages of the whole pipeline; None where only the model's layers, which are not known, could tell.

    The settings have passed ``pipeline_problems``, or are about to: a name that no schedule has counts one a rank.
    """
    if pipeline["module_fqns_per_model_part"] is not None:
        return len(pipeline["module_fqns_per_model_part"])
    if pipeline["pp_schedule_csv"] is not None:
        return len(read_schedule(pipeline["pp_schedule_csv"]).ranks)
    if pipeline["layers_per_stage"] is None:
        schedule = find_schedule(pipeline["pp_schedule"] or "")
        return pp_size * (2 if schedule is not None and schedule.multi else 1)
    if num_layers is None:
        return None
    rounding = pipeline["round_virtual_stages_to_pp_multiple"]
    return stages_for(num_layers, pipeline["layers_per_stage"], pp_size, getattr(rounding, "name", rounding))


def _are_names(parts: Any) -> bool:
    return (
        isinstance(parts, (list, tuple))
        and bool(parts)
        and all(isinstance(part, (list, tuple)) and part and all(isinstance(n, str) for n in part) for part in parts)
    )


def _microbatch_problems(
    pipeline: Mapping[str, Any],
    schedule: Schedule | None,
    file: ScheduleFile | None,
    stages: int | None,
    pp_size: int,
    spelling: Spelling,
) -> list[Problem]:
    batch, micro = pipeline["pp_batch_size"], pipeline["pp_microbatch_size"]
    if batch % micro:
        return [
            Problem(
                what=f"pp_microbatch_size={micro} does not divide pp_batch_size={batch}",
                asked=spelling.set("pipeline.pp_microbatch_size", micro),
                allowed=f"a divisor of {batch}",
                instead=spelling.set(
                    "pipeline.pp_microbatch_size", max(d for d in range(1, micro + 1) if batch % d == 0)
                ),
            )
        ]
    count = batch // micro
    asked = f"{spelling.set('pipeline.pp_batch_size', batch)} {spelling.set('pipeline.pp_microbatch_size', micro)}"
    if file is not None and count != file.microbatches:
        return [
            Problem(
                what=f"the schedule file runs {file.microbatches} microbatches, and a batch has {count}",
                asked=asked,
                allowed=f"pp_batch_size / pp_microbatch_size = {file.microbatches}",
                instead=spelling.set("pipeline.pp_batch_size", file.microbatches * micro),
            )
        ]
    if schedule is None:
        return []
    needed = schedule.least(pp_size, stages or pp_size * (2 if schedule.multi else 1))
    if count < needed:
        return [
            Problem(
                what=f"{count} microbatches are too few for {schedule.torch_name} on {pp_size} pipeline ranks",
                asked=asked,
                allowed=f"{needed} microbatches or more (pp_batch_size / pp_microbatch_size)",
                instead=spelling.set("pipeline.pp_batch_size", needed * micro),
            )
        ]
    rounds = max(1, count // pp_size)
    if schedule.rounds and count % rounds:
        legal = [n for n in (count // rounds * rounds, count - count % pp_size + pp_size) if n != count]
        return [
            Problem(
                what=f"{schedule.torch_name} on {pp_size} pipeline ranks runs equal rounds, and {count} microbatches "
                f"do not divide into {rounds}",
                asked=asked,
                allowed=f"{' or '.join(map(str, legal))} microbatches (pp_batch_size / pp_microbatch_size)",
                instead=spelling.set("pipeline.pp_batch_size", legal[-1] * micro),
            )
        ]
    return []


def _option_problems(
    pipeline: Mapping[str, Any],
    schedule: Schedule | None,
    file: ScheduleFile | None,
    strategy: Mapping[str, Any],
    spelling: Spelling,
) -> list[Problem]:
    """Options that a schedule excludes, because it computes the gradients of inputs and of weights apart."""
    splits = file.splits_backward if file is not None else schedule is not None and schedule.splits_backward
    if not splits:
        return []
    name = schedule.torch_name if schedule is not None else "this schedule file"
    apart = f"{name} computes gradients of inputs and of weights apart"
    found: list[tuple[str, Any, bool, str]] = []
    if strategy.get("enable_compile"):
        key, off = "strategy.enable_compile", False
        found.append((key, True, off, f"{apart}, which compiled blocks cannot"))
    if strategy.get("defer_fsdp_grad_sync") is False:
        key, off = "strategy.defer_fsdp_grad_sync", True
        found.append((key, False, off, f"{apart}, so FSDP can reduce gradients only once, at the end of a step"))
    if strategy.get("activation_checkpointing") == "selective":
        key, off = "activation_checkpointing", True
        found.append((key, "selective", off, f"{apart}, and torch lets a selective checkpoint run backward only once"))
    if strategy.get("ep_size", 1) > 1 and strategy.get("activation_checkpointing") is True:
        if strategy["ignore_router_for_ac"]:
            key, off = "moe.ignore_router_for_ac", False
            found.append((key, True, off, f"{apart}, and torch lets a checkpoint that keeps routing run backward once"))
    if pipeline["patch_stage_backward_maybe_with_nosync"]:
        key, off = "pipeline.patch_stage_backward_maybe_with_nosync", False
        found.append((key, True, off, f"{apart}, so there is no last backward in which FSDP could reduce them"))
    others = [option for option, other in SCHEDULES.items() if not other.splits_backward]
    return [
        Problem(
            what=what,
            asked=spelling.set(key, value),
            allowed=f"{assigned(key, off)}, or {', '.join(others)}",
            instead=spelling.set(key, off),
        )
        for key, value, off, what in found
    ]


def _file_problems(
    pipeline: Mapping[str, Any], file: ScheduleFile, pp_size: int, num_layers: int | None, spelling: Spelling
) -> list[Problem]:
    asked, stages = spelling.set("pipeline.pp_schedule_csv", pipeline["pp_schedule_csv"]), len(file.ranks)
    parts, per_stage = pipeline["module_fqns_per_model_part"], pipeline["layers_per_stage"]
    if len(file.rows) != pp_size:
        what = f"the schedule file has rows for {len(file.rows)} ranks, and pp_size is {pp_size}"
        return [
            Problem(
                what=what,
                asked=asked,
                allowed=f"pp_size={len(file.rows)}",
                instead=spelling.set("parallelism.pp_size", len(file.rows)),
            )
        ]
    wanted = stage_count(pipeline, pp_size, num_layers) if parts is not None else stages
    if per_stage is not None:
        what = f"the schedule file has {stages} stages, so layers_per_stage would do nothing"
        key = "pipeline.layers_per_stage"
        return [
            Problem(
                what=what,
                asked=spelling.set(key, per_stage),
                allowed="null with a schedule file",
                instead=spelling.set(key, None),
            )
        ]
    if wanted != stages:
        what = f"the schedule file has {stages} stages, and module_fqns_per_model_part has {wanted}"
        return [
            Problem(
                what=what,
                asked=asked,
                allowed="as many parts as stages",
                instead=spelling.set("pipeline.module_fqns_per_model_part", None),
            )
        ]
    if num_layers is not None and parts is None and num_layers < stages:
        what = f"{num_layers} layers are too few for the {stages} stages of the schedule file"
        return [
            Problem(
                what=what,
                asked=asked,
                allowed="one layer a stage or more",
                instead=spelling.set("pipeline.pp_schedule_csv", None),
            )
        ]
    return []


def _schedule(
    pipeline: Mapping[str, Any], spelling: Spelling, problems: list[Problem]
) -> tuple[Schedule | None, ScheduleFile | None]:
    """The named schedule or the one of the file; neither, and a problem more, where it cannot be told."""
    name, csv = pipeline["pp_schedule"], pipeline["pp_schedule_csv"]
    if csv is not None and name is not None and find_schedule(name) is not SCHEDULES["1f1b"]:
        problems.append(
            Problem(
                what="a schedule's name and a schedule file were both given",
                asked=f"{spelling.set('pipeline.pp_schedule', name)} {spelling.set('pipeline.pp_schedule_csv', csv)}",
                allowed="one of the two",
                instead=spelling.set("pipeline.pp_schedule", None),
            )
        )
    if csv is not None:
        try:
            return None, read_schedule(csv)
        except ValueError as error:
            asked = spelling.set("pipeline.pp_schedule_csv", csv)
            allowed = "a row of actions for every pipeline rank, such as 0F0,0F1,0B0,0B1"
            what = f"pp_schedule_csv={csv} is not a schedule: {error}"
            problems.append(
                Problem(what=what, asked=asked, allowed=allowed, instead=spelling.set("pipeline.pp_schedule_csv", None))
            )
            return None, None
    if name is None:
        problems.append(
            Problem(
                what="no pipeline schedule",
                asked=spelling.set("pipeline.pp_schedule", None),
                allowed=", ".join(SCHEDULES),
                instead=spelling.choose("pipeline", "1f1b"),
            )
        )
        return None, None
    schedule = find_schedule(name)
    if schedule is None:
        problems.append(
            unknown_name(
                name,
                SCHEDULES,
                what=f"pp_schedule={name} is not a schedule of torch",
                asked=spelling.set("pipeline.pp_schedule", name),
                offer=lambda option: spelling.choose("pipeline", option),
                otherwise=spelling.choose("pipeline", "1f1b"),
                meant=_AMBIGUOUS.get(name.lower(), ()),
            )
        )
    return schedule, None


def _stage_problems(
    pipeline: Mapping[str, Any],
    schedule: Schedule,
    stages: int,
    pp_size: int,
    num_layers: int | None,
    spelling: Spelling,
) -> list[Problem]:
    by_name = pipeline["module_fqns_per_model_part"] is not None
    asked = (
        f"{spelling.key('pipeline.module_fqns_per_model_part')} with {stages} parts"
        if by_name
        else spelling.set("pipeline.layers_per_stage", pipeline["layers_per_stage"])
    )
    per_rank = "2" if schedule.v_shaped else "2 or more" if schedule.multi else "1"
    fits = stages % pp_size == 0 and (
        stages == 2 * pp_size if schedule.v_shaped else stages >= 2 * pp_size if schedule.multi else stages == pp_size
    )
    if fits and (num_layers is None or by_name or stages <= num_layers):
        return []
    if stages == pp_size and schedule.multi:
        instead = spelling.choose("pipeline", "1f1b")
    elif stages % pp_size == 0 and stages >= 2 * pp_size and not schedule.multi:
        instead = spelling.choose("pipeline", "interleaved_1f1b")
    elif by_name:
        instead = spelling.set("pipeline.module_fqns_per_model_part", None)
    else:
        wanted = pp_size * (2 if schedule.multi else 1)
        exact = num_layers and num_layers % wanted == 0
        instead = spelling.set("pipeline.layers_per_stage", num_layers // wanted if exact and num_layers else None)
    return [
        Problem(
            what=f"{stages} stages do not fit {schedule.torch_name} on {pp_size} pipeline ranks",
            asked=asked,
            allowed=f"{per_rank} stage(s) a rank, so a multiple of {pp_size}, each with a layer",
            instead=instead,
        )
    ]
