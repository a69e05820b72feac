"""A strategy that another package adds: it composes, is explained, checked and planned, and runs as ours do.

The package lies in averaging_strategy/ as pip lays one out, and nothing of ours knows it.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent / "averaging_strategy"


def run(*words: str, cwd: Path, package: Path | None = PACKAGE) -> subprocess.CompletedProcess[str]:
    paths = [str(package)] if package is not None else []
    paths += [path for path in (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")) if path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)


def test_it_is_an_option_of_the_group_with_help_and_only_where_it_is_installed(tmp_path: Path) -> None:
    shown = run("nemo_dist_conf.train", "--help", cwd=tmp_path)
    assert "strategy: averaging, ddp, fsdp2, megatron-fsdp" in shown.stdout, shown.stderr
    assert "strategy: ddp, fsdp2" in run("nemo_dist_conf.train", "--help", cwd=tmp_path, package=None).stdout
    explained = run("nemo_dist_conf.explain", "strategy=averaging", cwd=tmp_path)
    assert "strategy.every=1" in explained.stdout and "steps of each rank between two averages" in explained.stdout


def test_its_rules_and_axes_are_checked_before_a_start(tmp_path: Path) -> None:
    words = ("strategy=averaging", "strategy.every=0", "parallelism.tp_size=2")
    done = run("nemo_dist_conf.train", *words, cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "every=0 is not a number of steps" in done.stderr
    assert "tp_size=1 (averaging keeps the whole model on every rank)" in done.stderr
    misspelt = run("nemo_dist_conf.explain", "strategy=averagin", cwd=tmp_path)
    assert "strategy=averaging" in misspelt.stderr


def test_it_is_planned(tmp_path: Path) -> None:
    done = run("nemo_dist_conf.plan", "strategy=averaging", "world_size=4", "hardware=h100", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    # The strategy has no option for a dtype, so the recipe runs it under autocast in train.dtype: bfloat16 there.
    assert "averaging" in done.stdout and ", bfloat16" in done.stdout


@pytest.mark.parametrize("part", ["engine", "costs"])
def test_a_row_that_names_what_is_not_there_is_refused_by_name(tmp_path: Path, part: str) -> None:
    other = shutil.copytree(PACKAGE, tmp_path / "package")
    row = other / "averaging_strategy.py"
    row.write_text(re.sub(rf'{part}="[^"]+"', f'{part}="averaging_engine:Absent"', row.read_text()))
    words = {"engine": ("train", "train.steps=1"), "costs": ("plan", "world_size=1", "hardware=h100")}[part]
    done = run(f"nemo_dist_conf.{words[0]}", "strategy=averaging", *words[1:], cwd=tmp_path, package=other)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert f"strategy=averaging: its {part} averaging_engine:Absent cannot be loaded: AttributeError" in done.stderr
    assert "type     strategy=fsdp2" in done.stderr


@pytest.mark.slow
@pytest.mark.dist
def test_it_trains_and_averaging_after_every_step_is_what_ddp_does(tmp_path: Path) -> None:
    """Two steps of SGD without momentum: the mean of the ranks' parameters is a step along the mean of gradients."""
    launcher = ("hydra/launcher=torchrun", "hydra.launcher.nproc_per_node=2", "hydra.sweep.dir=out")
    batch = ("train.steps=3", "train.global_batch_size=4", "data.seq_len=32", "train.max_grad_norm=null", "device=cpu")
    words = ("-m", *launcher, "optimizer=sgd", "optimizer.momentum=0", *batch)
    done = run("nemo_dist_conf.train", *words, "strategy=ddp,averaging", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    ddp, averaged = (losses(tmp_path / "out" / name) for name in ("0", "1"))
    assert averaged == pytest.approx(ddp, rel=1e-5) and len(set(ddp)) == 3
    apart = run("nemo_dist_conf.train", *words, "strategy=averaging", "strategy.every=2", cwd=tmp_path)
    assert apart.returncode == 0, apart.stdout + apart.stderr
    assert losses(tmp_path / "out" / "0")[-1] != pytest.approx(ddp[-1], rel=1e-5)


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
