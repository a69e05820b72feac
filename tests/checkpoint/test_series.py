"""The checkpoints of a run: where it goes on, how many stay, and that no other run's are touched."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from nemo_dist_conf.checkpoint import Checkpoints, load, series, storage, whole
from nemo_dist_conf.checkpoint.folder import checkpoints_in, read_manifest
from nemo_dist_conf.errors import DataError, TrainingError
from tests.checkpoint.small import bits, make, train


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
