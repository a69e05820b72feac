"""How long a plan takes, and how it compares with published runs.

    python benchmarks/plan.py --json benchmarks/results/plan.json --markdown benchmarks/results/plan.md

CPU seconds of whole processes, and tables of others computed again from their layouts: TorchTitan's pages
(github.com/pytorch/torchtitan: docs/performance.md, benchmarks/llama3_h100_202412_torchtitan.md) and Llama 3
(arXiv:2407.21783, table 4). The efficiencies of the hardware profiles were chosen with the A100 rows in sight; the
others were not used for it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import report

from nemo_dist_conf.families.shapes import shape_of
from nemo_dist_conf.plan import Job, Plan, Update, make_plan
from nemo_dist_conf.schema.hardware import PROFILES, HardwareConf
from nemo_dist_conf.strategies import find_strategy
from nemo_dist_conf.topology.solve import MeshSpec

LLAMA3_8B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}
LLAMA3_70B = {
    **LLAMA3_8B,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
LLAMA3_405B = {
    **LLAMA3_8B,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
}
LLAMA2_13B = {
    "model_type": "llama",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "num_hidden_layers": 40,
    "num_attention_heads": 40,
    "vocab_size": 32000,
}
LLAMA2_70B = {**LLAMA3_70B, "vocab_size": 32000}
BIG_BATCH = ["model=llama3_70b", "data.seq_len=8192", "plan.json=-"]
COMMANDS = {
    "plan, 2,048 ranks": ["world_size=2048", "parallelism.tp_size=8", "parallelism.pp_size=4"],
    "search, 8 ranks": ["plan.search=true", "world_size=8", "model=llama3_8b", "hardware=h100"],
    "search, 1,024 ranks": ["plan.search=true", "world_size=1024"],
}
BATCH = {"plan, 2,048 ranks": 2048, "search, 8 ranks": 64, "search, 1,024 ranks": 1024}
AIM = 0.15
#: TorchTitan's selective checkpointing keeps every second matrix product; ours keeps all.
HALF = "keeps every second product, ours all"
ROUNDS = "how its 16 microbatches are interleaved is not said; here four stages a rank"
POWER = "GPUs limited to 500 W, so products are slower than the profile's"


@dataclass(frozen=True)
class Run:
    """A published run. kind: ``MFU`` or ``GiB``; why: what a miss comes from."""

    title: str
    source: str
    kind: str
    published: float
    model: dict[str, Any]
    hardware: str
    shards: int
    rows: int
    seq_len: int
    checkpointing: bool | str
    tp: int = 1
    pp: int = 1
    cp: int = 1
    microbatches: int = 1
    compiled: bool = False
    why: str = ""


TITAN, PAPER = "TorchTitan", "Llama 3"
RUNS = (
    Run("Llama 3 8B, 64 A100, selective", TITAN, "MFU", 58.2, LLAMA3_8B, "a100", 64, 1, 8192, "selective", why=HALF),
    Run("Llama 3 70B, 64 A100, full", TITAN, "MFU", 51.7, LLAMA3_70B, "a100", 64, 1, 8192, True),
    Run("Llama 2 13B, 64 A100, none", TITAN, "MFU", 61.1, LLAMA2_13B, "a100", 64, 2, 4096, False),
    Run("Llama 2 13B, 64 A100, selective", TITAN, "MFU", 53.8, LLAMA2_13B, "a100", 64, 2, 4096, "selective", why=HALF),
    Run("Llama 2 70B, 64 A100, full", TITAN, "MFU", 50.5, LLAMA2_70B, "a100", 64, 2, 4096, True),
    Run("Llama 2 70B, 64 A100, selective", TITAN, "MFU", 50.8, LLAMA2_70B, "a100", 64, 1, 4096, "selective", why=HALF),
    Run("Llama 3.1 8B, 8 H100, selective", TITAN, "GiB", 82.4, LLAMA3_8B, "h100", 8, 2, 8192, "selective", why=HALF),
    Run("Llama 3.1 8B, 128 H100, select.", TITAN, "GiB", 67.0, LLAMA3_8B, "h100", 128, 2, 8192, "selective", why=HALF),
    Run("Llama 3.1 8B, 8 H100, selective", TITAN, "MFU", 33.0, LLAMA3_8B, "h100", 8, 2, 8192, "selective", why=POWER),
    Run("Llama 3.1 405B, 8,192 H100", PAPER, "MFU", 43.0, LLAMA3_405B, "h100", 64, 1, 8192, False, 8, 16, 1, 32),
    Run(
        "Llama 3.1 405B, 16,384 H100",
        PAPER,
        "MFU",
        41.0,
        LLAMA3_405B,
        "h100",
        128,
        1,
        8192,
        False,
        8,
        16,
        1,
        16,
        why=ROUNDS,
    ),
    Run(
        "Llama 3.1 405B, 16,384 H100, 131,072 tokens",
        PAPER,
        "MFU",
        38.0,
        LLAMA3_405B,
        "h100",
        8,
        1,
        131072,
        False,
        8,
        16,
        16,
        16,
        why="masks of documents, and gathers of keys that wait for the slowest rank",
    ),
)


def plan_of(run: Run) -> Plan:
    """The plan of a published run. Llama 3's pipeline: interleaved, two layers a stage, which its page leaves open."""
    strategy = find_strategy("fsdp2")
    mesh = MeshSpec(
        run.shards * run.tp * run.pp * run.cp,
        strategy.axes.mesh,
        (run.pp, 1, run.shards, run.cp, run.tp),
        strategy.axes.flattened,
    )
    policy = {"enabled": True, "param_dtype": "bfloat16", "reduce_dtype": "float32", "output_dtype": "bfloat16"}
    pipeline = {
        "pp_schedule": "interleaved_1f1b",
        "pp_schedule_csv": None,
        "layers_per_stage": 2,
        "round_virtual_stages_to_pp_multiple": "up",
        "module_fqns_per_model_part": None,
    }
    job = Job(
        strategy=strategy,
        options={"mp_policy": policy, "enable_compile": run.compiled, "sequence_parallel": run.tp > 1},
        mesh=mesh,
        model=shape_of(run.model),
        hardware=HardwareConf(**PROFILES[run.hardware]),
        rows=run.rows,
        seq_len=run.seq_len,
        microbatches=run.microbatches,
        pipeline=pipeline,
        checkpointing=run.checkpointing,
        update=Update(fused=True),
    )
    return make_plan(job)


def compare(run: Run) -> dict[str, Any]:
    plan = plan_of(run)
    planned = 100 * plan.step.mfu if run.kind == "MFU" else plan.most.peak_gib
    off = planned / run.published - 1
    return {
        "run": run.title,
        "source": run.source,
        "kind": run.kind,
        "published": run.published,
        "planned": round(planned, 1),
        "off": round(off, 3),
        "within": abs(off) <= AIM,
        "why": run.why if abs(off) > AIM else "",
    }


def cpu_seconds(words: list[str]) -> float:
    """Of one process, user and system."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.times()
        command = [sys.executable, "-m", "nemo_dist_conf.plan", *words]
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def measure(repeats: int, quick: bool) -> list[dict[str, Any]]:
    results = []
    for name, words in COMMANDS.items():
        if quick and "1,024" in name:
            continue
        batch = f"train.global_batch_size={BATCH[name]}"
        taken = [cpu_seconds([*BIG_BATCH, batch, *words]) for _ in range(repeats)]
        results.append({"command": name, "cpu_s": statistics.median(taken)})
    return results


def tables(measured: dict[str, Any]) -> tuple[str, str]:
    seconds = [(row["command"], f"{row['cpu_s']:.2f}") for row in measured["results"]]
    runs = [
        (
            row["run"],
            row["source"],
            row["kind"],
            f"{row['published']:g}",
            f"{row['planned']:g}",
            f"{100 * row['off']:+.0f} %",
            row["why"],
        )
        for row in measured["published"]
    ]
    columns = ("run", "source", "of", "published", "planned", "off", "a miss because")
    return report.table(("command", "CPU s"), seconds), report.table(columns, runs)


def markdown(measured: dict[str, Any]) -> str:
    machine = measured["hardware"]
    first, second = tables(measured)
    near = sum(row["within"] for row in measured["published"])
    return f"""# What a plan takes, and how near it comes

CPU seconds of a whole process, medians of {measured["repeats"]}; no process imports torch.

{first}

Published runs computed again: {near} of {len(measured["published"])} within {100 * AIM:.0f} %. Sources, and what was
fitted, stand at the top of [plan.py](../plan.py). Peak memory is that of torch's allocations, without the reserve.

{second}

Measured {measured["date"]} on {machine["cpu"]}, {machine["cores"]} cores, {machine["ram_gib"]} GiB; load before the run
{machine["load_before"]}. Versions: {report.used(measured)}.

    {measured["command"]}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs of each command (default 5)")
    parser.add_argument("--quick", action="store_true", help="one run of each, the long search left out: a smoke test")
    report.add_files(parser)
    options = parser.parse_args()
    repeats = 1 if options.quick else options.repeats
    measured = report.new_report(__file__, repeats=repeats)
    measured["results"] = measure(repeats, options.quick)
    measured["published"] = [compare(run) for run in RUNS]
    report.finish(measured, options, "\n\n".join(tables(measured)), markdown)


if __name__ == "__main__":
    main()
