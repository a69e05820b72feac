"""Schedules played through: the orders are torch's, the bubbles those of the papers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.families.shapes import shape_of
from nemo_dist_conf.names import SCHEDULES, Schedule
from nemo_dist_conf.plan import Job, make_plan
from nemo_dist_conf.plan.schedule_timeline import Costs, Timeline, orders, play
from nemo_dist_conf.plan.step_time import quick_seconds
from nemo_dist_conf.schema.hardware import PROFILES, HardwareConf
from nemo_dist_conf.strategies import find_strategy
from nemo_dist_conf.topology.schedule_rules import pipeline_problems
from nemo_dist_conf.topology.solve import MeshSpec
from tests.dist.pool import run_ranks

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
PROBLEM = Problem(what="no", asked="a", allowed="b", instead="c")
UNSPLIT = [name for name, schedule in SCHEDULES.items() if not schedule.splits_backward]


def job(schedule: str, ranks: int, microbatches: int, layers: int = 64, **pipeline: Any) -> Job:
    settings = {"pp_schedule": schedule, "pp_schedule_csv": None, "layers_per_stage": None}
    settings |= {"module_fqns_per_model_part": None, "round_virtual_stages_to_pp_multiple": None, **pipeline}
    mesh = MeshSpec(ranks, AXES, (ranks, 1, 1, 1, 1))
    model = shape_of({"model_type": "llama", "num_hidden_layers": layers})
    hardware = HardwareConf(**PROFILES["h100"])
    return Job(find_strategy("fsdp2"), {}, mesh, model, hardware, microbatches=microbatches, pipeline=settings)


def played(schedule: str, ranks: int, microbatches: int, forward: float = 1.0, backward: float = 2.0) -> Timeline:
    made = job(schedule, ranks, microbatches)
    stages = [stage.index for stage in made.stages]
    return play(made, Costs(dict.fromkeys(stages, forward), dict.fromkeys(stages, backward)))


def torch_orders(schedule: str, ranks: int, microbatches: int, stages: int) -> list[list[str]]:
    """The computations of every rank as torch's own schedule lists them, without running any."""
    import torch
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import get_schedule_class

    kind: Any = get_schedule_class(SCHEDULES[schedule].torch_name)
    held = PipelineStage.__new__(PipelineStage)
    held.group_size, held.num_stages, held.group_rank = ranks, stages, 0
    own: Any = object.__new__(kind)
    own.pp_group_size, own._n_microbatches, own._num_stages = ranks, microbatches, stages
    own.n_local_stages = stages // ranks
    own.number_of_rounds = max(1, microbatches // ranks)
    own.microbatches_per_round = microbatches // own.number_of_rounds
    own._stages = [held] * own.n_local_stages
    assert torch.__version__
    rows = [own._calculate_single_rank_operations(rank) for rank in range(ranks)]
    words = {"FULL_BACKWARD": "B", "FORWARD": "F"}
    return [
        [f"{a.stage_index}{words[a.computation_type.name]}{a.microbatch_index}" for a in row if a is not None]
        for row in rows
    ]


@pytest.mark.dist
@pytest.mark.parametrize("ranks, microbatches", [(2, 4), (4, 8), (4, 4)])
@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "looped_bfs"])
def test_orders_of_looping_schedules_are_those_of_torch(schedule: str, ranks: int, microbatches: int) -> None:
    made = job(schedule, ranks, microbatches)
    expected = run_ranks(1, torch_orders, schedule, ranks, microbatches, len(made.stages))[0]
    found = orders(made)
    assert found is not None
    assert [[str(action) for action in row] for row in found] == expected


@pytest.mark.parametrize("ranks, microbatches", [(2, 2), (4, 8), (8, 32)])
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_the_bubble_is_the_papers(schedule: str, ranks: int, microbatches: int) -> None:
    line = played(schedule, ranks, microbatches)
    assert line.bubble == pytest.approx((ranks - 1) / (microbatches + ranks - 1))
    assert line.seconds == pytest.approx(3 * (microbatches + ranks - 1))


@pytest.mark.parametrize("ranks, microbatches", [(4, 8), (8, 16)])
def test_two_stages_a_rank_halve_the_bubble(ranks: int, microbatches: int) -> None:
    line = played("interleaved_1f1b", ranks, microbatches)
    assert line.seconds == pytest.approx(3 * (2 * microbatches + ranks - 1))


@pytest.mark.parametrize("schedule", [name for name in SCHEDULES if name not in UNSPLIT])
@pytest.mark.parametrize("ranks, microbatches", [(2, 4), (4, 8), (8, 16), (4, 32)])
def test_splitting_backward_leaves_less_of_it(schedule: str, ranks: int, microbatches: int) -> None:
    line = played(schedule, ranks, microbatches)
    assert 0 <= line.bubble < played("interleaved_1f1b", ranks, microbatches).bubble


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_everything_is_computed_once_and_in_time(schedule: str) -> None:
    made = job(schedule, 4, 8)
    line = played(schedule, 4, 8)
    done: dict[str, float] = {}
    for slot in line.slots:
        assert str(slot.action) not in done
        done[str(slot.action)] = slot.end
    kinds = "FB" if schedule in UNSPLIT else "FIW"
    assert len(done) == len(made.stages) * 8 * len(kinds)
    for slot in line.slots:
        stage, index = slot.action.stage, slot.action.microbatch
        if slot.action.kind == "F" and stage:
            assert done[f"{stage - 1}F{index}"] <= slot.start + 1e-9
        if slot.action.kind in "BI":
            assert done[f"{stage}F{index}"] <= slot.start + 1e-9
    for rank in range(4):
        own = sorted((slot.start, slot.end) for slot in line.slots if slot.rank == rank)
        assert all(end <= start + 1e-9 for (_, end), (start, _) in zip(own, own[1:]))


def test_what_a_rank_keeps() -> None:
    def kept(schedule: str, rank: int) -> int:
        return played(schedule, 4, 8).kept(rank, lambda stage: 1)

    assert [kept("gpipe", rank) for rank in range(4)] == [8, 8, 8, 8]
    assert [kept("1f1b", rank) for rank in range(4)] == [4, 3, 2, 1]
    assert kept("looped_bfs", 0) == 16
    assert kept("zbv_zero_bubble", 0) <= 12  # of the 16 that all are; the paper keeps 8


def test_a_hop_takes_its_time() -> None:
    made = job("1f1b", 2, 1)
    costs = Costs({0: 1.0, 1: 1.0}, {0: 2.0, 1: 2.0}, hop=0.5)
    assert play(made, costs).seconds == pytest.approx(1 + 0.5 + 1 + 2 + 0.5 + 2)


def test_a_schedule_file_is_played_as_it_is(tmp_path) -> None:
    file = tmp_path / "schedule.csv"
    file.write_text("0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n")
    made = job("1f1b", 2, 2, pp_schedule=None, pp_schedule_csv=str(file))
    line = play(made, Costs({0: 1.0, 1: 1.0}, {0: 1.0, 1: 1.0}))
    first = [str(slot.action) for slot in line.slots if slot.rank == 0]
    assert first == ["0F0", "0F1", "0B0", "0B1"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_is_known_to_the_plan(schedule: str) -> None:
    assert job(schedule, 2, 4).splits_backward is SCHEDULES[schedule].splits_backward
    assert played(schedule, 2, 4).seconds > 0


def test_a_schedule_that_the_plan_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that a plugin added, whose order is not known here, too."""
    with pytest.raises(ConfigError, match="no schedule 'onef1b'") as refused:
        job("onef1b", 2, 4).schedule
    assert refused.value.type == "pipeline=1f1b"
    monkeypatch.setitem(SCHEDULES, "diagonal", Schedule("Diagonal"))
    with pytest.raises(ConfigError, match="no schedule 'diagonal'"):
        played("diagonal", 2, 4)


GREEDY = "nemo_dist_conf.plan.schedule_orders:ZBV_ZERO_BUBBLE"


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"multi": True, "splits_backward": True},
        {"multi": True, "v_shaped": True},
        {"multi": True, "v_shaped": True, "played": GREEDY},
    ],
)
def test_no_schedule_is_played_as_another_one(kind: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that names no order is refused by name, whatever its kind, and wherever the plan asks for it."""
    monkeypatch.setitem(SCHEDULES, "diagonal", Schedule("Diagonal", **kind))
    made = job("diagonal", 2, 4)
    for asked in (orders, quick_seconds, make_plan):
        with pytest.raises(ConfigError, match="no schedule 'diagonal'") as refused:
            asked(made)
        assert "diagonal" not in refused.value.allowed


def test_a_schedule_that_is_not_given_is_no_schedule() -> None:
    with pytest.raises(ConfigError, match="no schedule"):
        job("1f1b", 2, 4, pp_schedule=None).schedule


def test_a_schedule_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    played = "nemo_dist_conf.plan.schedule_orders:GPIPE"
    monkeypatch.setitem(SCHEDULES, "diagonal", Schedule("Diagonal", least=lambda ranks, stages: 4, played=played))
    assert orders(job("diagonal", 2, 4)) == orders(job("gpipe", 2, 4))
    settings = {**job("diagonal", 2, 3).pipeline, "pp_batch_size": 3, "pp_microbatch_size": 1, "pp_seq_len": None}
    assert [problem.allowed.split()[0] for problem in pipeline_problems(settings, 2, 64)] == ["4"]


@pytest.mark.parametrize("schedule", [*UNSPLIT, "file"])
def test_what_a_rank_keeps_by_formula_is_what_it_keeps_in_order(schedule: str, tmp_path: Path) -> None:
    file = tmp_path / "schedule.csv"
    file.write_text("0F0,0I0,0F1,0W0,0I1,0W1\n1F0,1B0,1F1,1B1\n")
    csv: dict[str, Any] = {"pp_schedule": None, "pp_schedule_csv": str(file)} if schedule == "file" else {}
    made = job(schedule, 2, 2, **csv) if csv else job(schedule, 4, 8)
    once = dict.fromkeys([stage.index for stage in made.stages], 1.0)
    line = play(made, Costs(once, once))
    for rank in range(made.pp):
        stages = len(made.stages_of(rank))
        assert made.played.kept(rank, made.pp, stages, made.microbatches) == line.kept(rank, lambda stage: 1)


def test_a_schedule_file_that_splits_backward_is_said_to(tmp_path: Path) -> None:
    file = tmp_path / "schedule.csv"
    file.write_text("0F0,0I0,0W0\n1F0,1I0,1W0\n")
    made = job("1f1b", 2, 1, pp_schedule=None, pp_schedule_csv=str(file))
    assert made.splits_backward and quick_seconds(made) > 0


def test_nothing_in_the_plan_stops_a_run(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Neither what the plan refuses nor a defect of its own."""
    import torch

    from nemo_dist_conf.train import estimate

    context: Any = SimpleNamespace(device=torch.device("cpu"), world_size=2)
    for error in (KeyError("onef1b"), ZeroDivisionError(), AssertionError("no rank can go on"), ConfigError(PROBLEM)):

        def fails(job: Any, error: Exception = error) -> Any:
            raise error

        monkeypatch.setattr(estimate, "make_plan", fails)
        monkeypatch.setattr(estimate, "job_of", lambda *_, **__: None)
        caplog.clear()
        assert estimate.plan_of_run({}, context) is None
        assert ("no plan of this run" in caplog.text) is not isinstance(error, ConfigError)
    assert estimate.measured(None, 1.0, 1, context) == {}
