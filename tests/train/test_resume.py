"""The recipe goes on after a stop, a kill, a signal or a loss of ranks as if nothing had happened."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable

import pytest

from tests import warm
from tests.train.test_recipe import TINY

pytestmark = [pytest.mark.slow, pytest.mark.dist]

FOLDER = "hydra.run.dir=run"
EVERY = "checkpoint.every=2"
FP32 = "strategy.mp_policy=null"
#: A path that was typed means the folder in which it was typed.
IN_ITS_FOLDER = "hydra.job.chdir=true"
#: The learning rate of a step does not depend on the number of steps.
SAME = ("train.warmup_steps=0", "train.schedule=constant")
#: Threads change the order of sums.
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def train(folder: Path, *words: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    launcher = ["torchrun", "--nproc-per-node", str(ranks)] if ranks > 1 else ["python"]
    command = [*launcher, "-m", "nemo_dist_conf.train", *TINY, FOLDER, "device=cpu", *words]
    return warm.run(command, cwd=folder, env=ONE_THREAD)


def numbers(folder: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "run" / "checkpoints").glob("step_*"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...], int], list[tuple[Any, ...]]]:
    """The numbers of six steps without a stop."""
    found: dict[Any, list[tuple[Any, ...]]] = {}

    def of(words: tuple[str, ...], ranks: int) -> list[tuple[Any, ...]]:
        if (words, ranks) not in found:
            folder = tmp_path_factory.mktemp("whole")
            done = train(folder, *words, *SAME, ranks=ranks)
            assert done.returncode == 0, done.stderr
            found[words, ranks] = numbers(folder)
        return found[words, ranks]

    return of


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, ("strategy=fsdp2",)),
        (1, ("strategy=fsdp2", "checkpoint.async=true")),
        (4, ("strategy=ddp",)),
        (2, ("parallelism.tp_size=2", "checkpoint.async=true")),
        (2, ("parallelism.pp_size=2", "train.micro_batch_size=4")),
        (1, ("+model.config.attention_dropout=0.3",)),
    ],
    ids=str,
)
def test_a_run_that_stops_goes_on_to_the_same_bits(tmp_path: Path, undisturbed: Any, ranks: int, words: Any) -> None:
    """Loss, gradient norm and learning rate of every step, each step once."""
    expected = undisturbed(tuple(word for word in words if "async" not in word), ranks)
    first = train(tmp_path, *words, *SAME, EVERY, "train.steps=4", ranks=ranks)
    assert first.returncode == 0, first.stderr
    again = train(tmp_path, *words, *SAME, EVERY, ranks=ranks)
    assert again.returncode == 0, again.stderr
    assert numbers(tmp_path) == expected and len(expected) == 6
    assert checkpoints(tmp_path) == ["step_00000004", "step_00000006"]


def test_a_run_that_is_through_has_nothing_left(tmp_path: Path) -> None:
    train(tmp_path, EVERY)
    before = numbers(tmp_path)
    done = train(tmp_path, EVERY)
    assert done.returncode == 0 and "all 6 steps are made; train.steps=N" in (tmp_path / "run/train.log").read_text()
    assert numbers(tmp_path) == before


def test_nothing_of_an_earlier_run_is_lost_without_a_word(tmp_path: Path) -> None:
    """A second run in the folder, one that is told not to go on, and then the first once more."""
    few, export = "train.steps=2", "checkpoint.export=hf"
    assert train(tmp_path, few, export).returncode == 0
    first = numbers(tmp_path)
    done = train(tmp_path, few, "checkpoint.resume=null", "optimizer.lr=0.5")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    assert "metrics.jsonl of an earlier run in this folder is now metrics.1.jsonl" in (run / "train.log").read_text()
    assert f"the config of an earlier run in this folder is now {Path('run/.hydra.1')}" in done.stderr
    assert "lr: 0.003" in (run / ".hydra.1" / "config.yaml").read_text()
    assert "lr: 0.5" in (run / ".hydra" / "config.yaml").read_text()
    assert numbers(tmp_path) != first and checkpoints(tmp_path) == ["step_00000002"]
    done = train(tmp_path, "train.steps=3")
    assert done.returncode == 0, done.stderr
    assert numbers(tmp_path)[:2] == first and len(numbers(tmp_path)) == 3
    assert "WARNING" not in done.stdout.partition("goes on after step 2")[2].partition("model ")[0]
    done = train(tmp_path, few, EVERY, "checkpoint.resume=null")
    assert done.returncode != 0 and "  type     hydra.run.dir=run-2" in done.stderr
    assert train(tmp_path, few, EVERY, "checkpoint.resume=null", "hydra.run.dir=run-2").returncode == 0
    (run / "checkpoints").rename(tmp_path / "elsewhere")
    done = train(tmp_path, few, export)
    assert done.returncode == 0 and "hf of an earlier run in this folder is now hf.1" in done.stdout
    assert (run / "hf.1" / "config.json").is_file() and (run / "hf" / "config.json").is_file()


def test_another_batch_size_goes_on_with_the_next_unseen_rows(tmp_path: Path) -> None:
    """And the log names each setting that is another one; the learning rate is the new one."""
    assert train(tmp_path, EVERY, "train.steps=4").returncode == 0
    done = train(tmp_path, EVERY, "train.global_batch_size=4", "optimizer.lr=0.5")
    assert done.returncode == 0, done.stderr
    said = (tmp_path / "run" / "train.log").read_text()
    assert "goes on after step 4" in said
    assert "optimizer.lr=0.5 (was 0.003)" in said and "train.global_batch_size=4 (was 8)" in said
    assert numbers(tmp_path)[-1][3] > 0.003
    (state,) = [p for p in (tmp_path / "run" / "checkpoints").glob("step_00000006/state.json")]
    assert json.loads(state.read_text())["objects"]["position"]["tree"]["rows"] == 4 * 8 + 2 * 4


def test_a_checkpoint_moves_to_another_layout_and_folder(tmp_path: Path, undisturbed: Any) -> None:
    """Two ranks under tensor parallelism take over what one rank of ddp began."""
    assert train(tmp_path, "strategy=ddp", EVERY, "train.steps=4", *SAME).returncode == 0
    other = "hydra.run.dir=other"
    done = train(tmp_path, FP32, "parallelism.tp_size=2", "checkpoint.resume=run", other, *SAME, ranks=2)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "other" / "metrics.jsonl").read_text().splitlines()]
    expected = undisturbed(("strategy=ddp",), 1)[4:]
    assert [line["step"] for line in lines] == [5, 6]
    for line, (_, loss, norm, _) in zip(lines, expected):
        assert line["loss"] == pytest.approx(loss, rel=1e-5) and line["grad_norm"] == pytest.approx(norm, rel=1e-4)


def test_a_model_that_changed_is_refused_before_a_step(tmp_path: Path) -> None:
    assert train(tmp_path, EVERY).returncode == 0
    before = numbers(tmp_path)
    done = train(tmp_path, EVERY, "train.steps=8", "model.config.hidden_size=64")
    assert done.returncode == 1 and "are not those of this model" in done.stderr and "Traceback" not in done.stderr
    assert numbers(tmp_path) == before and checkpoints(tmp_path) == ["step_00000004", "step_00000006"]


def test_damage_is_told_before_training_and_the_offer_works(tmp_path: Path) -> None:
    assert train(tmp_path, EVERY).returncode == 0
    path = tmp_path / "run/checkpoints/step_00000006/rank_00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-9] ^= 4
    path.write_bytes(data)
    done = train(tmp_path, EVERY, "train.steps=8")
    assert done.returncode == 1 and "rank_00000.safetensors was changed" in done.stderr
    offer = done.stderr.partition("type     ")[2].splitlines()[0]
    assert offer.endswith("step_00000004")
    done = train(tmp_path, EVERY, "train.steps=8", offer)
    assert done.returncode == 0, done.stderr
    assert [line[0] for line in numbers(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert (tmp_path / "run/checkpoints/set-aside-1-step_00000006").is_dir()


def test_a_truncated_one_is_refused_while_composing(tmp_path: Path) -> None:
    assert train(tmp_path, EVERY).returncode == 0
    path = tmp_path / "run/checkpoints/step_00000006/rank_00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    done = train(tmp_path, "checkpoint.resume=run", "hydra.run.dir=other")
    assert done.returncode == 1 and "bytes instead of" in done.stderr and not (tmp_path / "other").exists()


def test_an_exported_folder_trains_on(tmp_path: Path) -> None:
    done = train(tmp_path, "checkpoint.export=hf", "parallelism.tp_size=2", ranks=2)
    assert done.returncode == 0, done.stderr
    assert "export" in done.stdout and (tmp_path / "run/hf/config.json").is_file()
    again = train(tmp_path, "checkpoint.export=hf", "checkpoint.resume=run", "hydra.run.dir=other", IN_ITS_FOLDER)
    assert again.returncode == 0, again.stderr  # nothing is left to be trained
    weights = [(tmp_path / name / "hf/model.safetensors").read_bytes() for name in ("run", "other")]
    assert weights[0] == weights[1]
    on = train(tmp_path, "model.name_or_path=run/hf", "hydra.run.dir=on", "train.steps=1", IN_ITS_FOLDER)
    assert on.returncode == 0, on.stderr


def start(folder: Path, *words: str, ranks: int = 1, nodes: str = "1", port: int = 0) -> warm.Program:
    """A program whose ranks can be killed one by one."""
    launcher = ["python"] if ranks == 1 else ["torchrun", "--nproc-per-node", str(ranks)]
    if nodes != "1":
        launcher += ["--nnodes", nodes, "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]
        launcher += ["--rdzv-id", "one", "--rdzv-conf", "last_call_timeout=2", "--local-addr", "127.0.0.1"]
    launcher += ["--max-restarts", "3"] if ranks > 1 else []
    recipe = ["-m", "nemo_dist_conf.train", *TINY, "device=cpu", EVERY, *words]
    return warm.Program([*launcher, *recipe], cwd=folder, env=ONE_THREAD)


def wait_for(pattern: str, folder: Path, process: warm.Program) -> None:
    until = time.monotonic() + 120
    while not list(folder.glob(pattern)):
        if process.poll() is not None or time.monotonic() > until:
            process.kill()
            raise AssertionError(f"no {pattern}: {process.communicate()}")
        time.sleep(0.02)


def ranks_of(agent: int) -> list[int]:
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent)], capture_output=True, text=True).stdout.split()
    return [int(pid) for pid in found]


def output(folder: Path) -> Path:
    (found,) = folder.glob("outputs/*/*")
    return found


def test_sigterm_saves_and_ends_in_time(tmp_path: Path) -> None:
    process = start(tmp_path, FOLDER, "train.steps=100000", "checkpoint.every=100000")
    wait_for("run/metrics.jsonl", tmp_path, process)
    time.sleep(1)
    os.kill(process.pid, signal.SIGTERM)
    text = "".join(process.communicate(timeout=30))
    assert process.returncode == 128 + signal.SIGTERM, text
    (saved,) = checkpoints(tmp_path)
    steps = [line[0] for line in numbers(tmp_path)]
    assert steps == list(range(1, len(steps) + 1)) and saved == f"step_{steps[-1]:08}"
    assert f"stopped by SIGTERM after step {steps[-1]} of 100000" in text and "Traceback" not in text
    more = f"train.steps={steps[-1] + 2}"
    assert train(tmp_path, EVERY, more).returncode == 0
    assert len(numbers(tmp_path)) == steps[-1] + 2


def test_a_killed_rank_is_started_again_and_the_run_goes_on(tmp_path: Path) -> None:
    """torchrun --max-restarts: the same folder, though its name was made of the time; no person types anything."""
    process = start(tmp_path, "train.steps=40", ranks=2)
    wait_for("outputs/*/*/checkpoints/step_00000006", tmp_path, process)
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    text = "".join(process.communicate(timeout=150))
    assert process.returncode == 0, text
    lines = [json.loads(line)["step"] for line in (output(tmp_path) / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, 41))
    assert "goes on after step" in (output(tmp_path) / "train.log").read_text()


def test_sigterm_reaches_all_ranks_through_torchrun(tmp_path: Path) -> None:
    process = start(tmp_path, "train.steps=100000", "checkpoint.every=100000", ranks=2)
    wait_for("outputs/*/*/metrics.jsonl", tmp_path, process)
    time.sleep(1)
    os.kill(process.pid, signal.SIGTERM)
    text = "".join(process.communicate(timeout=60))
    assert "stopped by SIGTERM after step" in text
    assert len(list(output(tmp_path).glob("checkpoints/step_*"))) == 1


def wait_for_a_step(folder: Path, process: Any) -> None:
    wait_for("run/metrics.jsonl", folder, process)
    while not (folder / "run/metrics.jsonl").read_text() and process.poll() is None:
        time.sleep(0.02)


def interrupted(text: str) -> list[str]:
    """The lines of the message, of which there is one."""
    assert text.count("stopped by") == 1 and "KeyboardInterrupt" not in text, text
    lines = text[text.index("stopped by") :].splitlines()
    return lines[:3]


def test_ctrl_c_says_where_the_run_stopped_what_is_saved_and_the_command_that_goes_on(tmp_path: Path) -> None:
    """Fresh: torchrun's ranks hear the terminal's signal and its own. What torchrun prints, no rank can prevent."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["-m", "nemo_dist_conf.train", *TINY, "device=cpu", FOLDER, "train.steps=9999", "checkpoint.every=9999"]
    environ = os.environ | ONE_THREAD
    both: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen([*torchrun, *words], cwd=tmp_path, env=environ, start_new_session=True, **both)
    wait_for_a_step(tmp_path, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to every process of the command
    text = process.communicate(timeout=60)[0]
    stopped, kept, go_on = interrupted(text)
    (saved,) = checkpoints(tmp_path)
    step = int(saved.rpartition("_")[2])
    assert stopped == f"stopped by Ctrl-C after step {step} of 9999"
    assert kept == f"  saved   {tmp_path}/run/checkpoints/{saved}"
    typed = [word for word in words if word != FOLDER]
    command = shlex.join(["torchrun", "--nproc-per-node", "2", *typed, f"hydra.run.dir={tmp_path}/run"])
    assert go_on == f"  go on   {command}"
    done = warm.run([*shlex.split(go_on)[2:], f"train.steps={step + 1}"], cwd=tmp_path, env=ONE_THREAD)
    assert done.returncode == 0 and f"step {step + 1}/{step + 1}" in done.stdout, done.stderr


def test_ctrl_c_ends_a_run_that_saves_nothing_at_once_and_says_so(tmp_path: Path) -> None:
    process = start(tmp_path, FOLDER, "train.steps=9999", "checkpoint.every=null")
    wait_for_a_step(tmp_path, process)
    os.kill(process.pid, signal.SIGINT)
    text = "".join(process.communicate(timeout=60))
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in text
    stopped, kept, again = interrupted(text)
    assert re.fullmatch(r"stopped by Ctrl-C after step \d+ of 9999", stopped)
    assert kept == "  saved   nothing, so it would begin anew; checkpoint.every=100 saves"
    assert again.startswith("  again   python -m nemo_dist_conf.train ") and again.endswith(" checkpoint.every=100")


def test_the_group_goes_on_with_fewer_ranks(tmp_path: Path) -> None:
    """Two nodes of two ranks each, on this machine; one is lost for good, and two ranks go on with what four saved."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = (FOLDER, "strategy=fsdp2", FP32, "train.steps=24")
    stays = start(tmp_path, *words, ranks=2, nodes="1:2", port=port)
    time.sleep(1)
    lost = start(tmp_path, *words, ranks=2, nodes="1:2", port=port)
    wait_for("run/checkpoints/step_00000006", tmp_path, stays)
    first = json.loads(next((tmp_path / "run/checkpoints").glob("step_*/manifest.json")).read_text())
    for pid in [*ranks_of(lost.pid), lost.pid]:
        os.kill(pid, signal.SIGKILL)
    text = "".join(stays.communicate(timeout=200))
    lost.communicate()
    assert stays.returncode == 0, text
    steps = [line[0] for line in numbers(tmp_path)]
    last = json.loads((tmp_path / "run/checkpoints/step_00000024/manifest.json").read_text())
    assert steps == list(range(1, 25)) and (first["world_size"], last["world_size"]) == (4, 2)
