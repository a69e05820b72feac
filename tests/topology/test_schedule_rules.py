"""Rules of pipeline schedules."""

from types import SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf

from nemo_dist_conf.names import SCHEDULES
from nemo_dist_conf.schema import PipelineConf
from nemo_dist_conf.topology.schedule_rules import find_schedule, pipeline_problems


def settings(**changed):
    values: Any = OmegaConf.to_container(OmegaConf.structured(PipelineConf))
    return values | {"pp_batch_size": 8} | changed


def test_every_option_names_a_schedule_that_torch_has():
    from torch.distributed.pipelining.schedules import get_schedule_class

    for option, schedule in SCHEDULES.items():
        assert get_schedule_class(schedule.torch_name) is not None
        assert find_schedule(option) is schedule is find_schedule(schedule.torch_name.upper())


def test_multi_says_what_torch_says():
    from torch.distributed.pipelining.schedules import PipelineScheduleMulti, get_schedule_class

    for schedule in SCHEDULES.values():
        assert issubclass(get_schedule_class(schedule.torch_name), PipelineScheduleMulti) == schedule.multi


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_defaults_with_enough_microbatches_and_layers_pass(schedule):
    assert pipeline_problems(settings(pp_schedule=schedule), 2, num_layers=8) == []


@pytest.mark.parametrize(
    ("changed", "pp_size", "layers", "words"),
    [
        (dict(pp_schedule="zero_bubble"), 2, 8, "not a schedule of torch"),
        (dict(pp_schedule=None), 2, 8, "no pipeline schedule"),
        (dict(pp_schedule="gpipe", pp_schedule_csv="x.csv"), 2, 8, "both given"),
        (dict(module_fqns_per_model_part="a,b"), 2, 8, "not a list of lists"),
        (dict(module_fqns_per_model_part=[["a"], []]), 2, 8, "not a list of lists"),
        (dict(pp_schedule="interleaved_1f1b", pp_batch_size=5), 2, 8, "5 microbatches do not divide into 2"),
        (dict(pp_schedule="interleaved_zero_bubble", pp_batch_size=11), 4, 8, "11 microbatches do not divide into 2"),
        (dict(pp_batch_size=0), 2, 8, "not positive"),
        (dict(pp_microbatch_size=3), 2, 8, "does not divide"),
        (dict(pp_batch_size=2), 4, 8, "too few"),
        (dict(pp_schedule="dualpipe_v", pp_batch_size=3), 2, 8, "too few"),
        (dict(layers_per_stage=2), 2, 8, "4 stages do not fit 1F1B"),
        (dict(pp_schedule="interleaved_1f1b", layers_per_stage=4), 2, 8, "2 stages do not fit"),
        (dict(pp_schedule="interleaved_1f1b", layers_per_stage=3), 2, 8, "3 stages do not fit"),
        (dict(pp_schedule="zbv_zero_bubble", layers_per_stage=1), 2, 8, "8 stages do not fit"),
        (dict(module_fqns_per_model_part=[["a"], ["b"], ["c"]]), 2, 8, "3 stages do not fit"),
        (dict(), 16, 8, "too few"),
        (dict(pp_schedule="interleaved_1f1b", pp_batch_size=16), 8, 8, "8 layers are too few"),
    ],
)
def test_what_cannot_work_is_refused(changed, pp_size, layers, words):
    problems = pipeline_problems(settings(**changed), pp_size, layers)
    assert any(words in problem.what for problem in problems), problems


def test_rounding_makes_a_remainder_fit():
    odd = settings(pp_schedule="interleaved_1f1b", layers_per_stage=3)
    assert pipeline_problems(odd, 2, 8)
    assert pipeline_problems(odd | {"round_virtual_stages_to_pp_multiple": "up"}, 2, 8) == []


def test_without_a_known_model_rules_about_layers_wait():
    assert pipeline_problems(settings(layers_per_stage=100), 2, None) == []


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("count", range(1, 13))
def test_microbatches_are_refused_where_torch_refuses_them(schedule, count):
    from torch.distributed.pipelining.schedules import get_schedule_class

    known = SCHEDULES[schedule]
    total = 3 * (2 if known.multi else 1)
    held = [0, total - 1] if known.v_shaped else range(0, total, 3)
    stages = [
        SimpleNamespace(
            group_size=3, group_rank=0, num_stages=total, stage_index=stage, submod=None, is_last=stage == total - 1
        )
        for stage in held
    ]
    problems = pipeline_problems(settings(pp_schedule=schedule, pp_batch_size=count), 3, 12)
    try:
        get_schedule_class(known.torch_name)(stages if known.multi else stages[0], count)
    except ValueError:
        assert "microbatches" in problems[0].what and len(problems) == 1
        typed = int(problems[0].instead.rpartition("=")[2])
        assert pipeline_problems(settings(pp_schedule=schedule, pp_batch_size=typed), 3, 12) == []
    else:
        assert problems == []


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("options", "changed"),
    [
        (dict(enable_compile=True), dict()),
        (dict(defer_fsdp_grad_sync=False), dict()),
        (dict(activation_checkpointing="selective"), dict()),
        (dict(), dict(patch_stage_backward_maybe_with_nosync=True)),
    ],
)
def test_a_schedule_that_splits_backward_excludes_some_options(schedule, options, changed):
    problems = pipeline_problems(settings(pp_schedule=schedule, **changed), 2, 8, strategy=options)
    assert [("apart" in problem.what) for problem in problems] == [True] * SCHEDULES[schedule].splits_backward
