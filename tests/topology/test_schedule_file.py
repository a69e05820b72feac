"""Schedules from a file: torch's own are accepted, what would not run to its end is refused."""

from types import SimpleNamespace

import pytest

from nemo_dist_conf.names import SCHEDULES
from nemo_dist_conf.topology.schedule_file import read_schedule
from nemo_dist_conf.topology.schedule_rules import pipeline_problems
from nemo_dist_conf.topology.stage_layers import rank_of_stage
from tests.topology.test_schedule_rules import settings

GOOD = "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"


def written(folder, text):
    path = folder / "schedule.csv"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", [name for name, schedule in SCHEDULES.items() if schedule.multi])
@pytest.mark.parametrize("pp_size", [2, 4])
def test_what_torch_writes_is_read(tmp_path, name, pp_size):
    """Its stages lie where we say that they lie, so ours and torch's idea of a schedule are one."""
    from torch.distributed.pipelining.schedules import get_schedule_class

    schedule, total, path = SCHEDULES[name], 2 * pp_size, tmp_path / "dumped.csv"
    ranks = [rank_of_stage(stage, total, pp_size, schedule.v_shaped) for stage in range(total)]
    shared = {"group_size": pp_size, "group_rank": 0, "num_stages": total, "submod": None}
    stages = [
        SimpleNamespace(**shared, stage_index=stage, is_last=stage == total - 1)
        for stage in range(total)
        if ranks[stage] == 0
    ]
    get_schedule_class(schedule.torch_name)(stages, total)._dump_csv(path, "compute_only")
    found = read_schedule(path)
    assert (list(found.ranks), found.microbatches, len(found.rows)) == (ranks, total, pp_size)
    assert found.splits_backward == schedule.splits_backward


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read"),
        ("", "has no action"),
        ("0F0,0B0\n\n", "a rank has no action"),
        ("0F0,0X0\n1F0,1B0\n", "row 1 has '0X0'"),
        ("0F0,0B0\n2F0,2B0\n", "stage 1 has no action"),
        ("0F0,0B0,1F0\n1F0,1B0\n", "stage 1 stands in the rows of rank 0 and 1"),
        ("0F0,0B0\n1F0\n", "stage 1 has F for microbatch 0"),
        ("0F0,0I0\n1F0,1B0\n", "stage 0 has F, I for microbatch 0"),
        ("0F0,0F0,0B0\n1F0,1B0\n", "stage 0 has B, F, F"),
        ("0F0,0B0,0F1,0B1\n1F1,1F0,1B0,1B1\n", "would wait for ever before 0B0"),
        ("0F0,0W0,0I0\n1F0,1B0\n", "would wait for ever before 0W0"),
    ],
)
def test_what_would_not_run_to_its_end_is_refused(tmp_path, text, words):
    path = tmp_path / "missing.csv" if text is None else written(tmp_path, text)
    with pytest.raises(ValueError, match=words):
        read_schedule(path)
    (problem,) = pipeline_problems(settings(pp_schedule_csv=str(path), pp_batch_size=2), 2, 4)
    assert words in problem.what and "\n" not in problem.what


@pytest.mark.parametrize(
    ("changed", "pp_size", "layers", "words"),
    [
        (dict(), 4, 8, "rows for 2 ranks, and pp_size is 4"),
        (dict(pp_batch_size=4), 2, 8, "runs 2 microbatches, and a batch has 4"),
        (dict(layers_per_stage=2), 2, 8, "layers_per_stage would do nothing"),
        (dict(module_fqns_per_model_part=[["a"], ["b"], ["c"]]), 2, 8, "module_fqns_per_model_part has 3"),
        (dict(), 2, 1, "1 layers are too few for the 2 stages"),
    ],
)
def test_a_file_has_to_fit_the_rest(tmp_path, changed, pp_size, layers, words):
    path = written(tmp_path, GOOD)
    assert pipeline_problems(settings(pp_schedule_csv=path, pp_batch_size=2), 2, 8) == []
    problems = pipeline_problems(settings(pp_schedule_csv=path, **{"pp_batch_size": 2, **changed}), pp_size, layers)
    assert any(words in problem.what for problem in problems), problems
