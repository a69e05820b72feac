"""metrics.jsonl: one complete line a step, one trajectory a file, on the main rank only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.train.metrics import METRICS_FILE, TENSORBOARD_FOLDER, MetricsWriter


def line(step: int, **changes: Any) -> dict[str, Any]:
    return {"step": step, "loss": 5.0 / step, "grad_norm": 1.0, "tokens": 64, "seconds": 0.5, "lr": 0.1, **changes}


def steps(folder: Path) -> list[int]:
    return [json.loads(text)["step"] for text in (folder / METRICS_FILE).read_text().splitlines()]


def write(folder: Path, numbers: range, first_step: int = 1) -> None:
    with MetricsWriter(folder, first_step=first_step) as writer:
        for number in numbers:
            writer.write(**line(number))


def test_a_line_holds_what_was_written_and_is_on_disk_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path / "new" / "folder")
    writer.write(**line(1), tokens_per_second=128.0)
    [text] = writer.path.read_text().splitlines()  # the writer is still open
    assert json.loads(text) == {**line(1), "tokens_per_second": 128.0}
    writer.close()
    writer.close()


def test_each_step_is_one_line_in_order(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6))
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("key", ["loss", "grad_norm", "seconds", "lr"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_number_that_json_does_not_have_is_not_written(tmp_path: Path, key: str, value: float) -> None:
    with MetricsWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match=f"step 1: {key}"):
            writer.write(**line(1, **{key: value}))
    assert steps(tmp_path) == []


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path / "folder", enabled=False, tensorboard=True) as writer:
        writer.write(**line(1, loss=float("nan")))
    assert list(tmp_path.iterdir()) == []


def aside(folder: Path) -> dict[str, list[int]]:
    """Steps in the files that earlier runs left."""
    files = sorted(folder.glob("metrics.*.jsonl"))
    return {file.name: [json.loads(text)["step"] for text in file.read_text().splitlines()] for file in files}


def test_a_second_run_in_the_folder_starts_anew_and_keeps_the_first(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, range(1, 6))
    write(tmp_path, range(1, 3))
    assert "metrics.jsonl of an earlier run in this folder is now metrics.1.jsonl" in caplog.text
    write(tmp_path, range(1, 4))
    assert steps(tmp_path) == [1, 2, 3]
    assert aside(tmp_path) == {"metrics.1.jsonl": [1, 2, 3, 4, 5], "metrics.2.jsonl": [1, 2]}


def test_a_resumed_run_has_every_step_once_and_keeps_what_it_makes_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The first attempt got to step 7, its last checkpoint was after step 4."""
    write(tmp_path, range(1, 8))
    write(tmp_path, range(5, 10), first_step=5)
    assert steps(tmp_path) == list(range(1, 10))
    assert aside(tmp_path) == {"metrics.1.jsonl": [5, 6, 7]}
    assert "lines of step 5 and later, which are made again, are now in metrics.1.jsonl" in caplog.text
    write(tmp_path, range(10, 11), first_step=10)
    assert len(aside(tmp_path)) == 1  # nothing was left to keep


def test_a_run_that_goes_on_finds_its_own_file(tmp_path: Path) -> None:
    """Another run was started in the folder meanwhile (checkpoint.resume=null); its lines are not this one's."""
    write(tmp_path, range(1, 5))
    with MetricsWriter(tmp_path) as other:
        for number in range(1, 6):
            other.write(**line(number, loss=9.0))
    with MetricsWriter(tmp_path, first_step=5, last_loss=line(4)["loss"]) as writer:
        writer.write(**line(5))
    rows = [json.loads(text) for text in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [row["loss"] for row in rows] == [5.0 / step for step in range(1, 6)]
    assert aside(tmp_path) == {"metrics.2.jsonl": [1, 2, 3, 4, 5]}


def test_a_line_cut_short_by_a_kill_is_removed(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    with open(tmp_path / METRICS_FILE, "a") as file:
        file.write('{"step": 4, "lo')
    write(tmp_path, range(4, 6), first_step=4)
    assert steps(tmp_path) == [1, 2, 3, 4, 5]


def test_lines_that_are_not_ours_do_not_stop_a_run(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).write_bytes(b'\xff\xfe\n[1]\n{"loss": 1}\nnull\n{"step": "x"}\n{"step": 1}\n')
    write(tmp_path, range(2, 4), first_step=2)
    assert steps(tmp_path) == [1, 2, 3]


def test_a_killed_process_leaves_complete_lines(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from nemo_dist_conf.train.metrics import MetricsWriter\n"
        "writer = MetricsWriter(sys.argv[1])\n"
        "for step in (1, 2, 3):\n"
        "    writer.write(step=step, loss=1.0, grad_norm=1.0, tokens=1, seconds=1.0)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], env=dict(os.environ))
    assert done.returncode == -9
    assert steps(tmp_path) == [1, 2, 3]


def test_tensorboard_gets_the_curves(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, tensorboard=True) as writer:
        for number in (1, 2):
            writer.write(**line(number))
    events = EventAccumulator(str(tmp_path / TENSORBOARD_FOLDER)).Reload()
    assert events.Tags()["scalars"] == ["train/loss", "train/grad_norm", "train/lr"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 5.0), (2, 2.5)]


def test_curves_of_an_earlier_run_do_not_lie_under_the_new_ones(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for first_step in (1, 3, 1):
        with MetricsWriter(tmp_path, tensorboard=True, first_step=first_step) as writer:
            writer.write(**line(first_step))
    assert len(list((tmp_path / TENSORBOARD_FOLDER).iterdir())) == 1
    assert len(list((tmp_path / f"{TENSORBOARD_FOLDER}.1").iterdir())) == 2


def test_a_missing_tensorboard_names_the_pip_line_and_leaves_the_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, range(1, 4))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError) as error:
        MetricsWriter(tmp_path, tensorboard=True)
    assert error.value.asked == "train.tensorboard=true"
    assert "pip install tensorboard" in error.value.allowed
    assert error.value.type == "train.tensorboard=false"
    assert steps(tmp_path) == [1, 2, 3]
