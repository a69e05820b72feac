"""The checkpoints of a run: where it goes on, how many stay, and that no other run's are touched."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from torch.distributed.tensor import DTensor

from nemo_dist_conf.checkpoint import Checkpoints, load, series, storage
from nemo_dist_conf.checkpoint import save_and_load as whole
from nemo_dist_conf.checkpoint.manifest import anew, checkpoints_in, read_manifest
from nemo_dist_conf.errors import DataError, TrainingError
from tests.checkpoint.beside import LAYOUTS, named_parameters, two
from tests.checkpoint.small import bits, make, train
from tests.dist.pool import run_ranks


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def run(folder: Path, steps: list[int], **options: Any) -> tuple[int, Any]:
    """A loop as a user writes it, saving after ``steps``; (step that it went on from, the model)."""
    model, optimizer = make()
    with Checkpoints(folder, **options) as checkpoints:
        found = checkpoints.restore(model, optimizer)
        step = start = found.step if found else 0
        for until in steps:
            train(model, optimizer, step, until)
            checkpoints.save(until, model, optimizer)
            step = until
    return start, model


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_stopped_run_goes_on_to_the_same_bits(tmp_path: Path, asynchronous: bool) -> None:
    _, expected = run(tmp_path / "whole", [2, 4, 6])
    assert run(tmp_path / "parts", [2, 4], asynchronous=asynchronous)[0] == 0
    start, model = run(tmp_path / "parts", [6], asynchronous=asynchronous)
    assert start == 4 and bits(model) == bits(expected)
    runs = {read_manifest(path).run for path in checkpoints_in(tmp_path / "parts")}
    assert len(runs) == 1 and len(checkpoints_in(tmp_path / "parts")) == 3


@pytest.mark.parametrize("keep, left", [(1, [8]), (2, [6, 8]), (None, [2, 4, 6, 8])])
def test_keep_leaves_the_newest(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    run(tmp_path, [2, 4, 6, 8], keep=keep)
    assert names(tmp_path) == [f"step_{step:08}" for step in left]


def test_an_asynchronous_save_keeps_the_state_of_its_step(tmp_path: Path) -> None:
    """The file is written after training has gone on, and holds what was there when save was called."""
    model, optimizer = make()
    train(model, optimizer, 0, 2)
    before = bits(model)
    may_write = threading.Event()
    write = whole.write_snapshot

    def late(*args: Any, **kwargs: Any) -> None:
        assert may_write.wait(30)
        write(*args, **kwargs)

    with mock.patch.object(series, "write_snapshot", late), Checkpoints(tmp_path, asynchronous=True) as checkpoints:
        checkpoints.save(2, model, optimizer)
        train(model, optimizer, 2, 4)
        assert not names(tmp_path) and bits(model) != before
        may_write.set()
    again, others = make()
    load(tmp_path, again, others)
    assert bits(again) == before


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_failure_is_raised_and_the_older_one_stays(tmp_path: Path, asynchronous: bool) -> None:
    model, _ = make()
    checkpoints = Checkpoints(tmp_path, asynchronous=asynchronous)
    checkpoints.save(1, model)
    checkpoints.wait()

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(28, "No space left on device")

    with mock.patch("nemo_dist_conf.checkpoint.storage.write_tensors", full):
        with pytest.raises(TrainingError, match="step_00000002 could not be written: No space left") as failed:
            checkpoints.save(2, model)
            checkpoints.wait()
    assert "step_00000001" in str(failed.value) and names(tmp_path) == ["step_00000001"]
    checkpoints.save(3, model)  # there is room again
    checkpoints.close()
    assert names(tmp_path) == ["step_00000001", "step_00000003"]


def test_a_file_that_did_not_arrive_is_noticed_before_the_checkpoint_counts(tmp_path: Path) -> None:
    """As where another node's folder is not the same one."""
    model, _ = make()
    write = storage.write_tensors

    def lost(path: Path, *args: Any) -> tuple[int, str]:
        told = write(path, *args)
        path.unlink()
        return told

    with mock.patch.object(storage, "write_tensors", lost), Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(TrainingError, match="rank_00000.safetensors is missing"):
            checkpoints.save(1, model)
    assert not names(tmp_path)


def test_what_a_killed_run_left_half_written_goes(tmp_path: Path) -> None:
    run(tmp_path, [2])
    (tmp_path / ".partial-step_00000004-abc").mkdir()
    (tmp_path / ".partial-step_00000004-abc" / "rank_00000.safetensors").write_text("half")
    assert run(tmp_path, [4])[0] == 2
    assert names(tmp_path) == ["step_00000002", "step_00000004"]


def test_two_runs_at_a_time_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(series, "_PATIENCE_S", 0.3)
    with Checkpoints(tmp_path) as first:
        first.save(1, make()[0])
        with pytest.raises(DataError, match="another run that is still there writes its checkpoints"):
            Checkpoints(tmp_path)
        assert names(tmp_path) == ["step_00000001"]
    Checkpoints(tmp_path).close()


@pytest.mark.parametrize("mode, key", [("RUN", "hydra.run.dir"), ("MULTIRUN", "hydra.sweep.dir")])
def test_a_job_that_goes_on_from_nothing_is_offered_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str, key: str
) -> None:
    """null would be refused in the job's own folder, which has checkpoints; elsewhere it starts anew."""
    (tmp_path / "run-2").mkdir()
    values = {"mode": mode, "run": {"dir": "run"}, "sweep": {"dir": "run"}, "runtime": {"cwd": str(tmp_path)}}
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create({"hydra": values}))
    assert anew(tmp_path / "run" / "checkpoints" / "step_1") == f"{key}=run-3"
    assert anew(tmp_path / "other" / "checkpoints" / "step_1") == "checkpoint.resume=null"


def test_a_new_run_does_not_take_over_anothers_folder(tmp_path: Path) -> None:
    run(tmp_path / "one", [2])
    run(tmp_path / "other", [4])
    for resume in (None, tmp_path / "other"):
        with pytest.raises(DataError, match="holds checkpoints of another run, up to step_00000002") as refused:
            Checkpoints(tmp_path / "one", resume=resume)
        assert refused.value.type == "checkpoint.resume=auto"
    assert names(tmp_path / "one") == ["step_00000002"]


def test_a_run_that_starts_from_another_goes_on_with_its_own(tmp_path: Path) -> None:
    """The same command again after a stop: the newest of its own, not where it once started."""
    run(tmp_path / "one", [2, 4])
    assert run(tmp_path / "two", [6], resume=tmp_path / "one")[0] == 4
    start, model = run(tmp_path / "two", [8], resume=tmp_path / "one")
    assert start == 6 and bits(model) == bits(run(tmp_path / "whole", [8])[1])
    assert names(tmp_path / "one") == ["step_00000002", "step_00000004"]


def test_going_back_sets_the_later_ones_aside(tmp_path: Path) -> None:
    older = tmp_path / "step_00000002"
    run(tmp_path, [2, 4])
    assert run(tmp_path, [3], resume=older)[0] == 2
    assert names(tmp_path) == ["set-aside-1-step_00000004", "step_00000002", "step_00000003"]
    assert run(tmp_path, [4], resume=older)[0] == 3  # again after a stop
    assert read_manifest(tmp_path / "set-aside-1-step_00000004").step == 4
    assert run(tmp_path, [5])[0] == 4


def test_resume_names_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere holds no checkpoint"):
        Checkpoints(tmp_path / "new", resume=tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written: .*exists|Not a directory"):
        Checkpoints(tmp_path / "file")


def test_pruning_spares_what_it_cannot_read(tmp_path: Path) -> None:
    """A damaged checkpoint is the user's to look at."""
    run(tmp_path, [2, 4], keep=2)
    (tmp_path / "step_00000002" / "manifest.json").write_text("{")
    run(tmp_path, [6, 8], keep=1)
    assert names(tmp_path) == ["step_00000002", "step_00000008"]


# ----------------------------------------------------------------------------------------- the same step once more


def test_a_finished_loop_started_once_more_has_nothing_to_write(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A loop that saves at its end saves the step that it went on from."""
    run(tmp_path, [2, 4])
    before = (tmp_path / "step_00000004" / "manifest.json").stat()
    caplog.set_level("INFO", logger="nemo_dist_conf")
    assert run(tmp_path, [4], asynchronous=True)[0] == 4
    assert (tmp_path / "step_00000004" / "manifest.json").stat() == before
    assert "step_00000004 is there already with these values: not written again" in caplog.text
    assert names(tmp_path) == ["step_00000002", "step_00000004"]


def test_other_values_for_a_step_are_refused_and_what_is_offered_works(tmp_path: Path) -> None:
    model, optimizer = make()
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, model, optimizer, objects={"best": 1.0})
        with pytest.raises(DataError, match="not as it is now: other objects"):
            checkpoints.save(1, model, optimizer, objects={"best": 0.5})
        with pytest.raises(DataError, match="not as it is now: other objects|in one of them only"):
            checkpoints.save(1, model)
        train(model, optimizer, 0, 1)
        checkpoints.save(2, model, optimizer)
        optimizer.param_groups[0]["lr"] = 0.5
        with pytest.raises(DataError, match="other settings of the optimizer"):
            checkpoints.save(2, model, optimizer)
        optimizer.param_groups[0]["lr"] = 0.01
        model[0].weight.data[0, 0] += 1  # type: ignore[index]
        with pytest.raises(DataError, match=r"other values of model\.0\.weight") as refused:
            checkpoints.save(2, model, optimizer)
        command, source, target = refused.value.type.split()
        assert command == "mv"
        Path(source).rename(target)
        checkpoints.save(2, model, optimizer)
    assert names(tmp_path) == ["set-aside-step_00000002", "step_00000001", "step_00000002"]


def test_a_run_that_was_not_loaded_is_told_so(tmp_path: Path) -> None:
    run(tmp_path, [2])
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(DataError, match="which it has not loaded") as refused:
        checkpoints.save(2, *make())
    assert refused.value.type.startswith("found = checkpoints.restore(model, optimizer)")


def test_a_damaged_one_of_the_same_step_is_set_aside(tmp_path: Path) -> None:
    model, optimizer = make()
    with Checkpoints(tmp_path) as checkpoints:
        for damage in ("manifest.json", "rank_00000.safetensors"):
            checkpoints.save(1, model, optimizer)
            (tmp_path / "step_00000001" / damage).write_text("x")
        checkpoints.save(1, model, optimizer)
    assert names(tmp_path) == [f"set-aside-{number}-step_00000001" for number in (1, 2)] + ["step_00000001"]
    load(tmp_path, model, optimizer)


def _twice(folder: Path) -> list[str]:
    """Saved under ddp, and again under others where nothing has changed; then where one rank has another value."""
    said = []
    for layout in ("ddp 2", "fsdp2 2", "pp 2"):
        with two(LAYOUTS[layout], 1) as (model, optimizer, second, _), Checkpoints(folder) as checkpoints:
            objects = {"critic": second}
            checkpoints.restore(model, optimizer, objects=objects)
            checkpoints.save(1, model, optimizer, objects=objects)
            if dist.get_rank() == 1:
                local = [p.to_local() if isinstance(p, DTensor) else p for _, p in named_parameters(second)]
                local[-1].data.add_(1)
            try:
                checkpoints.save(1, model, optimizer, objects=objects)
            except DataError as refused:
                said.append(refused.what.partition("as it is now: ")[2].partition(" (")[0])
    return said


@pytest.mark.dist
def test_the_same_step_under_another_layout(tmp_path: Path) -> None:
    mine, others = run_ranks(2, _twice, tmp_path / "one")
    assert mine == others and len(mine) == 3 and all("other" in words for words in mine)
