"""This package beside hand-written torch, Hugging Face Accelerate and Lightning Fabric, doing the same work.

    python benchmarks/peers --environments .peers --json benchmarks/results/peers.json \\
        --markdown benchmarks/results/peers.md --chart benchmarks/results/peers.svg

On one GPU, where all sides have to fit at once (about 100 GiB with the model of 1.2 B):

    python benchmarks/peers --device cuda --world 1 --strategy ddp fsdp2 --size 1.2B --dtype bf16 \\
        --side ours accelerate_side --compile off on --checkpointing off on --runs 1 --rounds 5 --no-starts

Each side runs in an environment of its own, made from environments/*.txt in the folder of --environments (kept for the
next time); without it all sides run in this one. A job is one strategy, model size, dtype and number of ranks. In each
of its runs every side starts new ranks, and the sides take turns: wrap, then rounds of steps, then the peak.

wrap    seconds from the config (ours: composed) to the wrapped model and its optimizer, the first time in a process,
        which is a fresh copy of one that did the imports, and once more at the end of the run. The process group
        exists. Slowest rank; median of the runs.
step    seconds of forward, backward, clipping and optimizer step of the slowest rank, and CPU seconds of all ranks.
        Median over steps of a run, then over runs; ratios are taken run by run before their median.
memory  peak resident MB (on a GPU: allocated) of the fullest rank, median of the runs.
MFU     on a GPU: what the model's arithmetic takes of the GPU's dense bf16 rate, by the count in work.py.
start   CPU seconds of a process until its framework, torch and transformers' Llama are imported; median.
show    CPU seconds of whole commands that only show help or a config; median.

Weights and batches are the same on all sides, and so must be the losses of every step: otherwise it fails.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from multiprocessing.connection import Connection, Listener
from pathlib import Path
from typing import Any, Iterator

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import report  # noqa: E402  (found through the line above)
from members import BASE, SIDES, Side  # noqa: E402
from tables import draw, markdown, start_table, table  # noqa: E402
from work import SIZES, TOLERANCE, Job, flops_per_token  # noqa: E402

TIMEOUT_S = 300
STRATEGIES = ("ddp", "fsdp2", "tp")
SWITCH = {"off": False, "on": True}
#: Dense bf16 TFLOP/s by what the GPU's name contains (NVIDIA's data sheets, SXM).
BF16_TFLOPS = {"H100": 989.4, "H200": 989.4, "A100": 312.0}
#: Commands of our environment that only show something, besides each side's help.
PLAIN_HYDRA = """
import hydra

@hydra.main(version_base="1.3", config_path=None)
def main(cfg):
    pass

main()
"""


class Running:
    """A side's process in its environment, which forks ranks for one job after the other."""

    def __init__(self, side: Side, python: str) -> None:
        self.side, self._folder = side, tempfile.TemporaryDirectory()
        with Listener(f"{self._folder.name}/side") as listener:
            command = [python, str(HERE / "rank.py"), side.module, listener.address]
            self._process = subprocess.Popen(list(map(str, command)), env=_environment())
            self._connection = _accept(listener, self._process, side.title)
        self.imported = _answer(self._connection, side.title)

    def end(self) -> None:
        self._connection.send(None)
        self._process.wait()
        self._folder.cleanup()

    @contextlib.contextmanager
    def ranks(self, job: Job) -> Iterator[list[Connection]]:
        with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as open_listeners:
            listeners = [open_listeners.enter_context(Listener(f"{folder}/rank{i}")) for i in range(job.world)]
            self._connection.send({"job": job.to_dict(), "folder": folder})
            ranks = [_accept(listener, self._process, self.side.title) for listener in listeners]
            for rank in ranks:
                _answer(rank, self.side.title)
            yield ranks
            for rank in ranks:
                rank.send(("end",))

    def ask(self, ranks: list[Connection], *word: Any) -> list[Any]:
        """Every rank's answer."""
        for rank in ranks:
            rank.send(word)
        return [_answer(rank, self.side.title) for rank in ranks]


def _environment() -> dict[str, str]:
    dropped = ("PYTHONDONTWRITEBYTECODE", "RANK", "WORLD_SIZE", "LOCAL_RANK")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "OMP_NUM_THREADS": "1"}


def _accept(listener: Listener, process: subprocess.Popen[bytes], title: str) -> Connection:
    import selectors

    with selectors.DefaultSelector() as ready:
        ready.register(listener._listener._socket, selectors.EVENT_READ)  # type: ignore[attr-defined]
        for _ in range(TIMEOUT_S):
            if ready.select(1.0):
                return listener.accept()
            if process.poll() is not None:
                break
    raise SystemExit(f"{title}: its process ended or did not answer (exit status {process.poll()})")


def _answer(connection: Connection, title: str) -> Any:
    if not connection.poll(TIMEOUT_S):
        raise SystemExit(f"{title}: no answer in {TIMEOUT_S} s")
    try:
        answer = connection.recv()
    except EOFError:
        raise SystemExit(f"{title}: a rank died") from None
    if isinstance(answer, dict) and "error" in answer:
        raise SystemExit(f"{title}: {answer['error']}")
    return answer


# --------------------------------------------------------------------------------------- environments


def python_of(environment: str, folder: Path | None) -> str:
    """The interpreter of an environment, which is made where it is missing or its file has changed."""
    if folder is None:
        return sys.executable
    wanted = (HERE / "environments" / f"{environment}.txt").read_text()
    home = folder.resolve() / environment
    python, stamp = home / "bin" / "python", home / "installed.txt"
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"environment {environment}: {home}", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        pip = [str(python), "-m", "pip", "install", "-q"]
        subprocess.run([*pip, "-r", str(HERE / "environments" / f"{environment}.txt")], check=True)
        stamp.write_text(wanted)
    if environment == "ours":  # this checkout as it is now
        subprocess.run([str(python), "-m", "pip", "install", "-q", "--no-deps", str(HERE.parents[1])], check=True)
    return str(python)


def cpu_of(command: list[str]) -> float:
    """CPU seconds of a whole process and its children."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(command, env=_environment(), capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def gpu_name() -> str:
    """As the driver tells it, so that this process need not import torch."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    name, memory, driver = found[0].split(", ")
    return f"{name}, {memory}, driver {driver}"


# --------------------------------------------------------------------------------------- measuring


def sides_of(job: Job, running: dict[str, Running]) -> list[Running]:
    """Accelerate has no tensor parallelism for a model built from a config; without compiling one side is another's."""
    left_out = {"accelerate_side"} if job.strategy == "tp" else set()
    left_out |= set() if job.compile else {"hand_whole"}
    return [one for name, one in running.items() if name not in left_out]


def one_run(job: Job, sides: list[Running], rounds: int, steps: int, warm_up: int) -> dict[str, dict[str, Any]]:
    """A run of a job: of each side its wrap, its steps' times and losses, and its peak."""
    found: dict[str, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        ranks = {side.side.module: stack.enter_context(side.ranks(job)) for side in sides}
        for side in sides:
            seconds, held = zip(*side.ask(ranks[side.side.module], "wrap"))
            found[side.side.module] = {"wrap_s": max(seconds), "held": max(held), "wall_s": [], "cpu_s": [], "loss": []}
        for number in range(rounds + 1):
            for side in sides if number % 2 else reversed(sides):
                name = side.side.module
                count = steps if number else warm_up
                for step in zip(*side.ask(ranks[name], "steps", count)):
                    found[name]["loss"].append(statistics.mean(loss for _, _, loss in step))
                    if number:
                        found[name]["wall_s"].append(max(wall for wall, _, _ in step))
                        found[name]["cpu_s"].append(sum(cpu for _, cpu, _ in step))
        for side in sides:
            found[side.side.module]["peak_mb"] = max(side.ask(ranks[side.side.module], "peak"))
        for side in sides:
            found[side.side.module]["rewrap_s"] = max(s for s, _ in side.ask(ranks[side.side.module], "wrap"))
    return found


def check_work(job: Job, found: dict[str, dict[str, Any]]) -> float:
    """The largest relative difference from the hand-written side's losses.

    Nobody wins by leaving parameters whole that are sharded by hand, or by computing something else.
    """
    want, worst = found[BASE]["loss"], 0.0
    for name, one in found.items():
        if one["held"] > found[BASE]["held"]:
            raise SystemExit(f"{job}: {name} keeps {one['held']} parameters on a rank, by hand {found[BASE]['held']}")
        for number, (loss, other) in enumerate(zip(one["loss"], want, strict=True)):
            worst = max(worst, abs(loss - other) / other)
            if worst > TOLERANCE[job.dtype]:
                raise SystemExit(f"{job}: {name}, step {number}: loss {loss}, by hand {other}")
    return worst


def measure(job: Job, running: dict[str, Running], options: argparse.Namespace) -> dict[str, Any]:
    sides = sides_of(job, running)
    runs, worst = [], 0.0
    for number in range(options.runs):
        order = sides if number % 2 else sides[::-1]
        run = one_run(job, order, options.rounds, options.steps, options.warm_up)
        worst = max(worst, check_work(job, run))
        runs.append(run)
    tokens = SIZES[job.size]["rows"] * SIZES[job.size]["tokens"] * (job.world // job.tp)
    result: dict[str, Any] = {**job.to_dict(), "loss_difference": worst, "sides": {}}
    for side in sides:
        name = side.side.module
        row = {
            "wrap_s": statistics.median(run[name]["wrap_s"] for run in runs),
            "rewrap_s": statistics.median(run[name]["rewrap_s"] for run in runs),
            "step_s": statistics.median(statistics.median(run[name]["wall_s"]) for run in runs),
            "step_cpu_s": statistics.median(statistics.median(run[name]["cpu_s"]) for run in runs),
            "peak_mb": statistics.median(run[name]["peak_mb"] for run in runs),
        }
        for key, of in (("step", "wall_s"), ("step_cpu", "cpu_s")):
            ratios = [statistics.median(run[name][of]) / statistics.median(run[BASE][of]) for run in runs]
            row[f"{key}_ratio"], row[f"{key}_ratios"] = statistics.median(ratios), ratios
        for key in ("wrap_s", "rewrap_s", "peak_mb"):
            ratios = [run[name][key] / run[BASE][key] for run in runs]
            row[f"{key.split('_')[0]}_ratio"] = statistics.median(ratios)
        row["tokens_per_s"] = tokens / row["step_s"]
        if job.device == "cuda":
            peak = next((1e12 * rate for name, rate in BF16_TFLOPS.items() if name in options.gpu), None)
            row["mfu"] = row["tokens_per_s"] * flops_per_token(job.size) / (peak * job.world) if peak else None
        result["sides"][name] = row
    return result


def starts(
    pythons: dict[str, str], running: dict[str, Running], repeats: int, warm_up: int
) -> dict[str, dict[str, float]]:
    """CPU seconds of importing each side, and of showing help where it has a command.

    The first ones compile and fill the disk's cache. repeats 1: what is running already is the one import.
    """
    sides = [one.side for one in running.values()]
    cpu: dict[str, dict[str, list[float]]] = {side.module: {"import": [], "help": []} for side in sides}
    plain: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        app = Path(folder, "app.py")
        app.write_text(PLAIN_HYDRA)
        for number in range(repeats + warm_up):
            for side in sides:
                fresh = running[side.module] if repeats == 1 else Running(side, pythons[side.environment])
                if fresh is not running[side.module]:
                    fresh.end()
                shown = cpu_of([pythons[side.environment], *side.help]) if side.help else 0.0
                if number >= warm_up:
                    cpu[side.module]["import"].append(fresh.imported["import_cpu_s"])
                    cpu[side.module]["help"] += [shown] if side.help else []
            if number >= warm_up:
                plain.append(cpu_of([pythons["ours"], str(app), "--help"]))
    found = {
        name: {key: statistics.median(values) for key, values in both.items() if values} for name, both in cpu.items()
    }
    return {**found, "plain_hydra": {"help": statistics.median(plain)}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, help="folder for each side's environment (default: this one)")
    parser.add_argument("--strategy", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["0.4M", "12M"])
    parser.add_argument("--dtype", nargs="+", choices=TOLERANCE, default=list(TOLERANCE))
    parser.add_argument("--world", nargs="+", type=int, default=[2, 4], help="ranks (default 2 and 4)")
    parser.add_argument("--side", nargs="+", choices=[side.module for side in SIDES], help="default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda: with --world 1")
    parser.add_argument("--compile", nargs="+", choices=SWITCH, default=["off"], help="of every decoder layer")
    parser.add_argument("--checkpointing", nargs="+", choices=SWITCH, default=["off"], help="of every decoder layer")
    parser.add_argument("--no-starts", action="store_true", help="leave out imports and help")
    parser.add_argument("--runs", type=int, default=5, help="new ranks of every side (default 5)")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side in a run (default 3)")
    parser.add_argument("--steps", type=int, default=3, help="steps in a turn (default 3)")
    parser.add_argument("--warm-up", type=int, default=3, help="steps before the first turn (default 3)")
    parser.add_argument("--quick", action="store_true", help="the smallest model, one run of one step: a smoke test")
    parser.add_argument("--chart", type=Path, help="write the chart (SVG) here")
    report.add_files(parser)
    options = parser.parse_args()
    if options.quick:
        options.size, options.dtype, options.world = ["0.04M"], ["fp32"], [2 if options.device == "cpu" else 1]
        options.runs = options.rounds = options.steps = options.warm_up = 1
    if options.environments is not None:
        os.environ.pop("PYTHONPATH", None)  # each environment's own packages
    asked = {side.module for side in SIDES} if options.side is None else {BASE, *options.side}
    if "on" not in options.compile:
        asked -= {"hand_whole"}
    wanted = [side for side in SIDES if side.module in asked]
    pythons = {side.environment: python_of(side.environment, options.environments) for side in wanted}
    pythons.setdefault("ours", sys.executable)
    measured = report.new_report(__file__, runs=options.runs, steps=options.rounds * options.steps)
    if options.environments is None:
        measured["versions"] |= {side.environment: metadata.version(side.package) for side in wanted if side.package}
    running = {side.module: Running(side, pythons[side.environment]) for side in wanted}
    options.gpu = measured["gpu"] = gpu_name() if options.device == "cuda" else ""
    measured["starts"] = {} if options.no_starts else starts(pythons, running, *((1, 0) if options.quick else (5, 1)))
    failures: list[str] = []
    switches = itertools.product(options.compile, options.checkpointing)
    every = itertools.product(switches, options.dtype, options.strategy, options.size, options.world)
    for (compiled, checkpointed), dtype, strategy, size, world in every:
        job = Job(strategy, size, dtype, world, options.device, SWITCH[compiled], SWITCH[checkpointed])
        if world % job.tp or (strategy == "tp" and world < 4 and not options.quick):
            continue  # tp over 2 ranks leaves nothing to shard over
        start = time.perf_counter()
        try:
            measured["results"].append(measure(job, running, options))
        except SystemExit as failure:
            failures.append(f"{job}: {failure}")
        print(f"{job}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        report.write(measured, options, markdown)  # all of it takes an hour, and may be stopped
    for one in running.values():
        one.end()
    shown = [table(measured["results"]), *([start_table(measured["starts"])] if measured["starts"] else [])]
    report.finish(measured, options, "\n\n".join(shown), markdown)
    if options.chart:
        draw(measured, options.chart)
    if failures:
        raise SystemExit("\n".join(failures))


if __name__ == "__main__":
    main()
