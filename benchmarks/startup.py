"""What the recipe takes before its first step, beside a script without a framework that does the same.

    python benchmarks/startup.py --json benchmarks/results/startup.json --markdown benchmarks/results/startup.md

Both sides read the same text, join a process group of one rank, build the same Llama, shard it and make an optimizer;
each run is a process of its own, sides take turns. Imports are timed apart, the outermost ones only, because they are
what the work needs; what is left is the side's own, and the difference of both is what the recipe costs.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SIDES = {"ours": "the recipe", "hand": "by hand"}
MEASURES = ("imports", "rest")
bootstrap: Any = importlib.import_module("importlib._bootstrap")

WORDS = ("train.steps=1", "train.global_batch_size=4", "data.max_mb=1")


class Imports:
    """Wall and CPU seconds spent in imports, counted where nothing is being imported yet."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0
        self._depth = 0
        self._find = bootstrap._find_and_load
        bootstrap._find_and_load = self._timed  # what import statements and import_module both end in

    def _timed(self, *args: Any) -> Any:
        wall, cpu = time.perf_counter(), time.process_time()
        self._depth += 1
        try:
            return self._find(*args)
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.wall += time.perf_counter() - wall
                self.cpu += time.process_time() - cpu


class FirstStep(BaseException):
    """Reached: nothing after it is measured."""


def measured_side(side: str) -> None:
    """In a process of its own: print what was spent until the first step."""
    imports = Imports()
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        ours() if side == "ours" else by_hand()
    except FirstStep:
        pass
    total = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    found = {
        f"{kind}_{measure}_s": getattr(imports, kind) if measure == "imports" else total[kind] - getattr(imports, kind)
        for kind in ("wall", "cpu")
        for measure in MEASURES
    }
    print(json.dumps(found), flush=True)
    os._exit(0)


def ours() -> None:
    step = importlib.import_module("nemo_dist_conf.train.step")

    def stop(*args: Any, **kwargs: Any) -> None:
        raise FirstStep

    step.train_step = stop  # type: ignore[attr-defined]
    sys.argv = ["train", *WORDS]
    runpy.run_module("nemo_dist_conf.train", run_name="__main__")


def by_hand() -> None:
    import argparse as arguments
    import sysconfig

    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from transformers import LlamaConfig, LlamaForCausalLM

    parser = arguments.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1)
    parser.parse_args([])
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")):
        if not {"site-packages", "dist-packages", "test", "tests"} & set(path.parts) and len(text) < 1_000_000:
            text += path.read_bytes()
    tokens = torch.frombuffer(text, dtype=torch.uint8).long()
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    torch.manual_seed(0)
    fields = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_key_value_heads=4, use_cache=False, **fields))
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    torch.optim.AdamW(model.parameters(), lr=3e-3)
    order = torch.randperm(len(tokens) // 128)
    torch.stack([tokens[128 * i : 128 * i + 129] for i in order[:4].tolist()])
    raise FirstStep


def measure(runs: int, warm_up: int) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    for number in range(warm_up + runs):  # the first compiles and fills the disk's cache
        for side in SIDES if number % 2 else reversed(SIDES):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, str(Path(__file__).resolve()), "--side", side]
                done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
            if done.returncode or not done.stdout.strip():
                raise SystemExit(done.stdout + done.stderr)
            if number >= warm_up:
                found[side].append(json.loads(done.stdout.splitlines()[-1]))
    results: list[dict[str, Any]] = []
    for side, rows in found.items():
        medians = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        results.append({"side": side, **medians})
    return results


def table(results: list[dict[str, Any]]) -> str:
    import report

    columns = ("side", "imports, wall s", "the rest, wall s", "imports, CPU s", "the rest, CPU s")
    keys = ("wall_imports_s", "wall_rest_s", "cpu_imports_s", "cpu_rest_s")
    rows = [(SIDES[row["side"]], *(f"{row[key]:.3f}" for key in keys)) for row in results]
    one, other = results
    rows.append(("difference", *(f"{one[key] - other[key]:.3f}" for key in keys)))
    return report.table(columns, rows)


def markdown(measured: dict[str, Any]) -> str:
    import report

    machine = measured["hardware"]
    return f"""# Before the first step

What is compared stands at the top of [startup.py](../startup.py). The aim is 0.3 s for the difference of the rest.

{table(measured["results"])}

Measured {measured["date"]} on {machine["cpu"]}, {machine["cores"]} cores, {machine["ram_gib"]} GiB; load before the run
{machine["load_before"]}; medians of {measured["runs"]} runs. Versions: {report.used(measured)}.

    {measured["command"]}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, default=9, help="processes of each side (default 9)")
    parser.add_argument("--quick", action="store_true", help="one run of each: a smoke test")
    if "--side" in sys.argv:
        measured_side(parser.parse_known_args()[0].side)
    import report

    report.add_files(parser)
    options = parser.parse_args()
    runs = 1 if options.quick else options.runs
    measured = report.new_report(__file__, runs=runs)
    measured["results"] = measure(runs, warm_up=0 if options.quick else 1)
    report.finish(measured, options, table(measured["results"]), markdown)


if __name__ == "__main__":
    main()
