"""The tables, the page and the chart of what was measured."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import chart
import report
from members import BASE, SIDES
from work import TOLERANCE, Job

__all__ = ["draw", "markdown", "start_table", "table"]


def table(results: list[dict[str, Any]]) -> str:
    timed = ("wrap s", "again", "step ms", "ratio", "step CPU ms", "ratio", "tokens/s")
    on_gpu = any(result["device"] == "cuda" for result in results)
    columns = ("job", "side", *timed, *(["MFU"] if on_gpu else []), "peak MB", "ratio")
    rows = []
    for result in results:
        for side in SIDES:
            row = result["sides"].get(side.module)
            if row is None:
                continue
            rows.append(
                (
                    str(Job(**{field.name: result[field.name] for field in dataclasses.fields(Job)})),
                    side.title,
                    f"{row['wrap_s']:.3f}",
                    f"{row['rewrap_s']:.3f}",
                    f"{1e3 * row['step_s']:.1f}",
                    f"{row['step_ratio']:.3f}",
                    f"{1e3 * row['step_cpu_s']:.1f}",
                    f"{row['step_cpu_ratio']:.3f}",
                    f"{row['tokens_per_s']:,.0f}",
                    *([f"{100 * row['mfu']:.1f} %" if row["mfu"] else "unknown"] if "mfu" in row else []),
                    f"{row['peak_mb']:.0f}",
                    f"{row['peak_ratio']:.3f}",
                )
            )
    return report.table(columns, rows)


def start_table(found: dict[str, dict[str, float]]) -> str:
    titles = {**{side.module: side.title for side in SIDES}, "plain_hydra": "an empty Hydra app"}
    rows = [
        (titles[name], *(f"{values[key]:.2f}" if key in values else "" for key in ("import", "help")))
        for name, values in found.items()
    ]
    return report.table(("side", "import, CPU s", "--help, CPU s"), rows)


def markdown(measured: dict[str, Any]) -> str:
    starting = f"\n## Starting\n\n{start_table(measured['starts'])}\n" if measured["starts"] else ""
    differences = {dtype: 0.0 for dtype in TOLERANCE}
    for result in measured["results"]:
        differences[result["dtype"]] = max(differences[result["dtype"]], result["loss_difference"])
    worst = ", ".join(f"{dtype} {value:.1e}" for dtype, value in differences.items() if value)
    kept_in = "" if measured["gpu"] else "; the peers' stand in environments"
    return f"""# Beside hand-written torch and its peers

This package beside hand-written torch, Hugging Face Accelerate and Lightning Fabric, doing the same work.
What each measure means stands at the top of [peers](../peers/__main__.py), what each side does in
[sides](../peers/sides), its pinned versions in [environments](../peers/environments). Ratios are to "by hand": DDP,
or fully_shard on each block and the root with torch's defaults. A job is strategy, size of the model, dtype and ranks;
`tp` is tensor parallelism over 2 ranks and fully_shard over the others (not by Accelerate, which takes it from
transformers' loading of a checkpoint).

{table(measured["results"])}

Every side starts from the same weights and has the same losses in every step; the largest relative difference:
{worst}.

{ON_GPU if measured["gpu"] else ON_CPU + (FUSED_TOO if "hand_fused" in measured["results"][0]["sides"] else "")}
{starting}
Measured {measured["date"]} on {_machine(measured)}, {measured["runs"]} runs of {measured["steps"]} steps.
Versions: {report.used(measured)}{kept_in}.

    {measured["command"]}
"""


ON_CPU = """Ours updates with AdamW's fused kernel by default, the others with what `torch.optim.AdamW(parameters)`
chooses."""
FUSED_TOO = " The second row of each job is the same choice made by hand."
ON_GPU = """All sides update with AdamW's fused kernel and run on one GPU, in turns, each in a process of its own.
"compile" and "checkpointing" are of every decoder layer: by hand `checkpoint_wrapper` and `layer.compile()`; ours
`activation_checkpointing=true` and, under fsdp2, `strategy.enable_compile=true` (under ddp the loop that is written by
hand); Accelerate its plugins' own, and transformers' checkpointing under ddp. MFU counts 6 operations for each weight
that is multiplied by and attention's two products over the whole sequence, without what checkpointing repeats, of
the GPU's dense bf16 rate. Memory is the peak of what torch's allocator gave out. On one process Accelerate and ours
leave out DDP's reducer, which has nothing to reduce; by hand it is there."""


def _machine(measured: dict[str, Any]) -> str:
    machine = measured["hardware"]
    host = f"{machine['cpu']}, {machine['cores']} cores, {machine['ram_gib']} GiB"
    if measured["gpu"]:
        return f"{measured['gpu']}; {host}"
    return f"{host}; gloo, 1 thread a rank, load before the first {machine['load_before']}"


def draw(measured: dict[str, Any], path: Path) -> None:
    """Step time and memory of every side relative to by hand, of the jobs in fp32 on the fewest ranks."""
    fewest = min(result["world"] for result in measured["results"])
    shown = [r for r in measured["results"] if r["dtype"] == "fp32" and r["world"] == fewest]
    measured_here = {module for result in shown for module in result["sides"]} - {BASE}
    titles = {side.module: side.title for side in SIDES if side.module in measured_here}
    for result in shown:
        result["title"] = f"{result['strategy']}, {result['size']}"
    panels = [
        chart.Panel(
            f"{what} (by hand = 1)",
            [r["title"] for r in shown],
            {t: [r["sides"].get(m, {}).get(key) for r in shown] for m, t in titles.items()},
        )
        for what, key in (("Step time", "step_ratio"), ("Peak memory of a rank", "peak_ratio"))
    ]
    path.write_text(chart.bars(panels))
