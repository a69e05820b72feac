"""Kills a run of two ranks again and again: ``python -m tests.checkpoint.faults``, 100 times, writes docs/faults.md.

A run is started, killed (SIGKILL: one rank, or both) at a random moment, and started again with the same command, until
it is through; its last weights and its metrics.jsonl must be those of a run that nobody disturbed, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import random
import shutil
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir

from nemo_dist_conf.checkpoint.manifest import ROOT, checkpoints_in, read_manifest
from nemo_dist_conf.checkpoint.save_and_load import PARTIAL
from nemo_dist_conf.checkpoint.tensor_file import TensorFile
from nemo_dist_conf.recipe.yaml_folder import config_folder
from tests.dist.pool import PRELOAD

__all__ = ["EVERY", "Tally", "disturb"]

REPORT = Path(__file__).parents[2] / "docs" / "faults.md"
EVERY, STEPS = 3, 45
RANKS = 2
#: Two ranks sum two numbers: the same in any order.
WORDS = [
    "strategy=fsdp2",
    "device=cpu",
    "model.config.hidden_size=64",
    "model.config.intermediate_size=96",
    "model.config.num_hidden_layers=2",
    "data.seq_len=32",
    "data.max_mb=0.2",
    f"train.steps={STEPS}",
    "train.global_batch_size=4",
    f"checkpoint.every={EVERY}",
]
_PATIENCE_S = 60.0


@dataclass
class Tally:
    """runs: that came through. saving: kills that met a checkpoint half written. lost: steps made twice, a kill."""

    runs: int = 0
    kills: int = 0
    saving: int = 0
    asynchronous: int = 0
    lost: list[int] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def disturb(kills: int, seed: int) -> Tally:
    """Runs under fire until there were so many kills; every finding is in ``wrong``."""
    chance, tally = random.Random(seed), Tally()
    root = Path(tempfile.mkdtemp())
    try:
        expected = root / "undisturbed"
        _finish(expected, _start(expected, []))
        while tally.kills < kills:
            words = ["checkpoint.async=true"] if tally.runs % 2 else []
            folder = root / f"run{tally.runs}"
            while not _killed_run(folder, words, chance, tally, kills):
                pass
            tally.runs += 1
            tally.wrong += _differences(folder, expected)
            shutil.rmtree(folder)
        return tally
    finally:
        shutil.rmtree(root)


def _killed_run(folder: Path, words: list[str], chance: random.Random, tally: Tally, kills: int) -> bool:
    """Start the run, and kill it unless it was first; whether it came through."""
    lines = _lines(folder)
    newest = _newest(folder)
    ranks = _start(folder, words)
    first = _first_line(folder, newest, ranks)
    if first is not None and lines:
        tally.lost.append(lines - (first - 1))
        if not 0 <= tally.lost[-1] <= EVERY or first - 1 < newest:
            tally.wrong.append(f"after line {lines} and checkpoint {newest} the run went on with step {first}")
    time.sleep(chance.uniform(0.0, 0.5))
    victims = chance.choice([ranks[:1], ranks[1:], ranks])
    if tally.kills < kills and all(rank.is_alive() for rank in ranks):
        for victim in victims:
            victim.kill()
        tally.kills += 1
        tally.asynchronous += bool(words)
        tally.saving += any((folder / ROOT).glob(f"{PARTIAL}step*"))
        _wait(ranks)
        return False
    return _finish(folder, ranks)


def _start(folder: Path, words: list[str]) -> list[Any]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    made = [context.Process(target=_rank, args=(rank, port, words, str(folder))) for rank in range(RANKS)]
    for process in made:
        process.start()
    return made


def _rank(rank: int, port: int, words: list[str], folder: str) -> None:
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_PORT": port, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.makedirs(folder, exist_ok=True)
    with open(Path(folder) / f"rank{rank}.log", "a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    from nemo_dist_conf.train.loop import run

    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = compose("train", overrides=[*WORDS, *words])
    run(cfg, folder)


def _wait(ranks: list[Any]) -> None:
    """Until all have ended: a rank whose sibling is gone finds out in its next collective."""
    until = time.monotonic() + _PATIENCE_S
    for rank in ranks:
        rank.join(max(0.0, until - time.monotonic()))
        rank.kill()
        rank.join()


def _finish(folder: Path, ranks: list[Any]) -> bool:
    _wait(ranks)
    if any(rank.exitcode for rank in ranks):
        end = (folder / "rank0.log").read_text()[-2000:]
        raise RuntimeError(f"a run that nobody killed ended with {[rank.exitcode for rank in ranks]}: {end}")
    return True


def _lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _newest(folder: Path) -> int:
    found = checkpoints_in(folder / ROOT)
    return read_manifest(found[0]).step if found else 0


def _first_line(folder: Path, newest: int, ranks: list[Any]) -> int | None:
    """The first step that this start makes; None where it makes none."""
    began = time.time()
    path = folder / "metrics.jsonl"
    while all(rank.is_alive() for rank in ranks):
        if path.exists() and path.stat().st_mtime >= began:
            steps = [json.loads(line)["step"] for line in path.read_text().splitlines() if line.endswith("}")]
            later = [step for step in steps if step > newest]
            if later:
                return min(later)
        time.sleep(0.01)
    return None


def _differences(folder: Path, expected: Path) -> list[str]:
    wrong = []
    mine, theirs = (_numbers(path) for path in (folder, expected))
    if mine != theirs:
        wrong.append(f"{folder.name}: metrics.jsonl differs from the undisturbed run's")
    one, other = (checkpoints_in(path / ROOT)[0] for path in (folder, expected))
    for rank in range(RANKS):
        name = f"rank_{rank:05}.safetensors"
        mine_file, their_file = TensorFile(one / name), TensorFile(other / name)
        for tensor in json.loads((other / "index.json").read_text()):
            if tensor in their_file._entries and not torch.equal(mine_file.read(tensor), their_file.read(tensor)):
                wrong.append(f"{folder.name}: {tensor} differs on rank {rank}")
    return wrong


def _numbers(folder: Path) -> list[tuple[Any, ...]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    began = time.monotonic()
    tally = disturb(asked.kills, asked.seed)
    text = f"""# Runs under fire

{tally.kills} kills with SIGKILL (seed {asked.seed}; rank 0, rank 1 or both, at a random moment) of runs with 2 ranks,
fsdp2, {STEPS} steps, a checkpoint every {EVERY} steps. After each kill the same command went on.

| | |
|---|---|
| runs that came through | {tally.runs} |
| kills while a checkpoint was half written | {tally.saving} |
| kills of runs that save while they train (checkpoint.async=true) | {tally.asynchronous} |
| steps made again after a kill: most, mean | {max(tally.lost)}, {sum(tally.lost) / len(tally.lost):.1f} |
| final weights, optimizer state or metrics.jsonl that differ in any bit | {len(tally.wrong)} |

{date.today()}, torch {torch.__version__}, gloo, {platform.machine()}, {time.monotonic() - began:.0f} s.

    python -m tests.checkpoint.faults
"""
    print(text, *tally.wrong, sep="\n")
    if asked.kills >= 100:
        REPORT.write_text(text)
    return len(tally.wrong)


if __name__ == "__main__":
    sys.exit(main())
