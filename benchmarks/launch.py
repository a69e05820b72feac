"""Seconds that starting the ranks of a job takes: `hydra/launcher=torchrun` beside `torchrun` called for each job.

    python benchmarks/launch.py --json benchmarks/results/launch.json --markdown benchmarks/results/launch.md

Every job joins the gloo group with 2 ranks on this machine, adds one number with an all_reduce and returns, so that
nearly all of its time is starting and ending processes.

torchrun   `torchrun --standalone --nproc-per-node 2 app.py ...`, a process of its own for each job, start to end.
launcher   one sweep for each start method, from Hydra's on_job_start to its on_job_end. The sweeps wait before each job
           until they are told to go on: jobs of all sides run in turns, never at once, so that a busy machine slows all
           of them alike. Given apart: what a sweep does once before its first job, and that job, which runs at once and
           waits for the forkserver to import torch.
grid       one sweep that runs without waiting: medians of the first and the last third of its jobs, without job 0.
refusal    seconds until a sweep that holds combinations which cannot work has ended with a message.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any, Sequence

import report

RANKS = 2
HAND = "torchrun"
METHODS = ("forkserver", "spawn", "fork")
APP = """
    import hydra
    import torch
    import torch.distributed as dist

    @hydra.main(version_base="1.3", config_path=None)
    def main(cfg):
        dist.init_process_group("gloo")
        ones = torch.ones(1)
        dist.all_reduce(ones)
        assert int(ones) == 2
        dist.destroy_process_group()
        return int(ones)

    if __name__ == "__main__":
        main()
"""
#: in the launcher's process only: the ranks run no callbacks
GATE = """
    import sys
    import time
    from hydra.experimental.callback import Callback

    class Gate(Callback):
        def on_job_start(self, config, **kwargs):
            print("gate ready", flush=True)
            sys.stdin.readline()
            self.start = time.perf_counter()

        def on_job_end(self, config, job_return, **kwargs):
            job_return.return_value
            print("gate", time.perf_counter() - self.start, flush=True)
"""


def environment() -> dict[str, str]:
    """As a user's: bytecode is kept, and one thread a rank."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "OMP_NUM_THREADS": "1"}


class Sweep:
    """A sweep that runs one job when it is told to."""

    def __init__(self, folder: Path, method: str, jobs: int) -> None:
        words = [f"hydra.launcher.nproc_per_node={RANKS}", f"hydra.launcher.start_method={method}"]
        words += [f"hydra.sweep.dir={method}", "+hydra.callbacks.gate._target_=gate.Gate", f"+x=range({jobs})"]
        self.words = [sys.executable, "app.py", "-m", "hydra/launcher=torchrun", *words]
        start = time.perf_counter()
        self.child = subprocess.Popen(
            self.words, cwd=folder, env=environment(), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self._next()
        self.before_first_s = time.perf_counter() - start

    def run_job(self, last: bool) -> float:
        assert self.child.stdin is not None
        self.child.stdin.write("\n")
        self.child.stdin.flush()
        seconds = float(self._next())
        if not last:
            self._next()
        return seconds

    def _next(self) -> str:
        assert self.child.stdout is not None
        seen = []
        for line in self.child.stdout:
            if line.startswith("gate "):
                return line.removeprefix("gate ")
            seen.append(line)
        raise AssertionError(f"{shlex.join(self.words)} ended:\n{''.join(seen)}")

    def end(self) -> None:
        """The sweep must have ended well: jobs that failed would have been quick."""
        self.child.communicate(timeout=60)
        if self.child.returncode:
            raise AssertionError(f"{shlex.join(self.words)} ended with {self.child.returncode}")


def by_hand(folder: Path, job: int) -> float:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}"]
    return timed([*torchrun, "app.py", f"+x={job}", f"hydra.run.dir=hand/{job}"], folder)


def timed(command: Sequence[str], folder: Path, code: int = 0, expect: str = "") -> float:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=environment(), text=True, capture_output=True)
    seconds = time.perf_counter() - start
    if done.returncode != code or expect not in done.stderr:
        raise AssertionError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return seconds


def starts(folder: Path, methods: Sequence[str], jobs: int) -> list[dict[str, Any]]:
    """Of each side the seconds of a first job and of ``jobs`` more."""
    sweeps, found = {}, {HAND: [by_hand(folder, 0)]}
    for method in methods:
        sweeps[method] = Sweep(folder, method, jobs + 1)
        found[method] = [sweeps[method].run_job(last=False)]
    for job in range(1, jobs + 1):
        order = list(found)
        for side in order if job % 2 else reversed(order):
            found[side].append(by_hand(folder, job) if side == HAND else sweeps[side].run_job(last=job == jobs))
    for sweep in sweeps.values():
        sweep.end()
    return [
        {
            "side": side,
            "before_first_s": sweeps[side].before_first_s if side in sweeps else None,
            "first_s": seconds[0],
            "job_s": statistics.median(seconds[1:]),
            "ratio": statistics.median(one / hand for one, hand in zip(seconds[1:], found[HAND][1:], strict=True)),
            "all_s": seconds,
        }
        for side, seconds in found.items()
    ]


def grid(folder: Path, jobs: int) -> dict[str, Any]:
    """Whether the jobs of a long sweep take longer towards its end."""
    words = [f"hydra.launcher.nproc_per_node={RANKS}", "hydra.sweep.dir=grid", f"+x=range({jobs})"]
    wall = timed([sys.executable, "app.py", "-m", "hydra/launcher=torchrun", *words], folder)
    records = [json.loads(line) for line in (folder / "grid" / "sweep.jsonl").read_text().splitlines()]
    assert [record["status"] for record in records] == ["completed"] * jobs
    seconds = [record["seconds"] for record in records][1:]
    third = max(1, len(seconds) // 3)
    first, last = statistics.median(seconds[:third]), statistics.median(seconds[-third:])
    return {"jobs": jobs, "wall_s": wall, "first_third_s": first, "last_third_s": last, "all_s": seconds}


def refusal(folder: Path, repeats: int) -> dict[str, Any]:
    """The recipe, four jobs of which two cannot work."""
    words = ["hydra/launcher=torchrun", f"hydra.launcher.nproc_per_node={RANKS}"]
    words += ["strategy=ddp,fsdp2", "parallelism.tp_size=1,3"]
    command = [sys.executable, "-m", "nemo_dist_conf.train", "-m", *words]
    seconds = [timed(command, folder, 1, "jobs cannot work, so none was started") for _ in range(repeats + 1)]
    kept = seconds[1:] or seconds  # the first warms the file cache
    return {"wall_s": statistics.median(kept), "all_s": kept}


COLUMNS = ("jobs started by", "before the first [s]", "first job [s]", "a job [s]", "least", "most", "ratio")


def table(results: list[dict[str, Any]]) -> str:
    rows = []
    for r in results:
        side = "torchrun, by hand" if r["side"] == HAND else f"hydra/launcher=torchrun, {r['side']}"
        once = "" if r["before_first_s"] is None else f"{r['before_first_s']:.2f}"
        spread = (f"{limit(r['all_s'][1:]):.2f}" for limit in (min, max))
        rows.append((side, once, *(f"{r[name]:.2f}" for name in ("first_s", "job_s")), *spread, f"{r['ratio']:.3f}"))
    return report.table(COLUMNS, rows)


def markdown(measured: dict[str, Any]) -> str:
    machine, many, refused = measured["hardware"], measured["grid"], measured["refusal"]
    return f"""# Starting the ranks of a job

Wall seconds of jobs that do next to nothing on {RANKS} ranks: medians of {measured["jobs"]} after a first one,
all sides in turns; ratios to `torchrun` by hand are medians of pairs.
How it is measured stands at the top of [launch.py](../launch.py).

{table(measured["results"])}

- a sweep of {many["jobs"]} jobs (forkserver, not waiting for others): {many["first_third_s"]:.2f} s a job in its first
  third, {many["last_third_s"]:.2f} s in its last; {many["wall_s"]:.1f} s in all
- a sweep with combinations that cannot work is refused after {refused["wall_s"]:.2f} s (the recipe, 2 of 4 jobs)

Measured {measured["date"]} on {machine["cpu"]}, {machine["cores"]} cores, {machine["ram_gib"]} GiB;
gloo, 1 thread a rank, load before the run {machine["load_before"]}, after it {measured["load_after"]}.
Versions: {report.used(measured)}.

    {measured["command"]}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--jobs", type=int, default=7, help="jobs of each side after the first (default 7)")
    parser.add_argument("--grid", type=int, default=30, help="jobs of the sweep that does not wait (default 30)")
    parser.add_argument("--refusals", type=int, default=5, help="refused sweeps (default 5)")
    parser.add_argument("--quick", action="store_true", help="forkserver and few of everything: a smoke test")
    report.add_files(parser)
    options = parser.parse_args()
    if options.quick:
        options.method, options.jobs, options.grid, options.refusals = ["forkserver"], 1, 2, 0
    measured = report.new_report(__file__, jobs=options.jobs)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for file, text in (("app.py", APP), ("gate.py", GATE)):
            (folder / file).write_text(textwrap.dedent(text))
        measured["refusal"] = refusal(folder, options.refusals)
        measured["results"] = starts(folder, options.method, options.jobs)
        measured["grid"] = grid(folder, options.grid)
    measured["load_after"] = round(os.getloadavg()[0], 2)
    report.finish(measured, options, table(measured["results"]), markdown)


if __name__ == "__main__":
    main()
