"""Two checkouts of this repository beside each other: what composing, wrapping and a step cost in each.

    python benchmarks/checkouts.py /path/to/before . --json benchmarks/results/checkouts.json \
        --markdown benchmarks/results/checkouts.md

Every round starts both sides in turn, so that a busy machine slows them alike; the figure is the median of rounds.
Composing is CPU seconds (user and system) of a whole child process; wrapping and steps are seconds on 2 gloo ranks of
one thread each, after one of either that is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import report

#: What is run whole: name -> words after ``python -m``.
COMMANDS = {
    "--cfg job": ("nemo_dist_conf.train", "--cfg", "job"),
    "--help": ("nemo_dist_conf.train", "--help"),
    "refusal": ("nemo_dist_conf.train", "strategy=ddp", "parallelism.tp_size=2"),
    "plan": ("nemo_dist_conf.plan", "world_size=64", "hardware=h100", "model=llama3_8b"),
}
STRATEGIES = ("ddp", "fsdp2")
#: Commands are short, so each is taken more often.
REPEATS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one round, of wrapping and composing only")
    report.add_files(parser)
    options = parser.parse_args()
    sides = {"before": options.before.resolve(), "after": options.after.resolve()}
    found: dict[str, dict[str, list[float]]] = {}
    for _ in range(1 if options.quick else options.rounds):
        for name, words in list(COMMANDS.items()) * (1 if options.quick else REPEATS):
            for side, folder in sides.items():
                found.setdefault(f"{name}, CPU s", {}).setdefault(side, []).append(_cpu_seconds(folder, words))
        for strategy in STRATEGIES:
            for side, folder in sides.items():
                for name, value in _in_ranks(folder, strategy, options.quick).items():
                    found.setdefault(f"{strategy}: {name}, ms", {}).setdefault(side, []).append(value * 1e3)
    written = report.new_report(__file__, commits={side: _commit(folder) for side, folder in sides.items()})
    written["command"] = written["command"].replace(str(options.before), "/path/to/before")
    for name, values in found.items():
        before, after = (statistics.median(values[side]) for side in sides)
        row = {"name": name, "before": before, "after": after, "ratio": after / before, "rounds": values}
        written["results"].append(row)
    report.finish(written, options, _table(written), _markdown)


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def _cpu_seconds(folder: Path, words: tuple[str, ...]) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", *words]
        subprocess.run(command, cwd=place, env=_environment(folder), capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _in_ranks(folder: Path, strategy: str, quick: bool) -> dict[str, float]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [str(Path(__file__).resolve()).replace("checkouts.py", "checkouts_side.py"), strategy]
    with tempfile.TemporaryDirectory() as place:
        out = Path(place, "out.json")
        command = [*launch, *words, str(out), *(["quick"] if quick else [])]
        done = subprocess.run(command, cwd=place, env=_environment(folder), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        found: dict[str, float] = json.loads(out.read_text())
    return found


def _commit(folder: Path) -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    return done.stdout.strip() or "no checkout"


def _table(written: dict[str, Any]) -> str:
    columns = ("what", "before", "after", "after / before", "lowest before", "lowest after", "rounds")
    rows = []
    for row in written["results"]:
        rounds = row["rounds"]
        numbers = (row["before"], row["after"], row["ratio"], min(rounds["before"]), min(rounds["after"]))
        rows.append((row["name"], *(f"{number:.3g}" for number in numbers), str(len(rounds["after"]))))
    return report.table(columns, rows)


def _markdown(written: dict[str, Any]) -> str:
    hardware, commits = written["hardware"], written["commits"]
    return (
        f"# Before and after a change\n\n{_table(written)}\n\n"
        f"Before is commit {commits['before']}, after {commits['after']}. Medians of the rounds, which took turns; how "
        "far the lowest lie below them is how busy the machine was.\n\n"
        f"{written['date']}, {hardware['cpu']}, {hardware['cores']} cores, load before {hardware['load_before']}; "
        f"{report.used(written)}.\n\n    {written['command']}\n"
    )


if __name__ == "__main__":
    main()
