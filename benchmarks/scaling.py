"""How our own work grows: with the layers of a model, with the number of ranks, with the jobs of a sweep.

    python benchmarks/scaling.py --json benchmarks/results/scaling.json --markdown benchmarks/results/scaling.md

wrap    a Llama with the widths of the 70B model and more or fewer layers, on the meta device, wrapped as one rank of
        many on torch's fake process group, which starts no other: seconds of checking the config, of the meshes, and of
        the wrapping; beside it the calls of torch that it stands for, written by hand. Medians of processes in turns.
sweep   `-m hydra/launcher=torchrun` over jobs of one rank that do nothing: seconds from one job's start to the next
        one's, of the first and of the last fifth of the jobs.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import Any

import report

LAYERS = (32, 80, 126)
RANKS = (8, 64, 1024)
LAYOUTS = {"fsdp2": "parallelism.tp_size=1", "fsdp2, tp 8": "parallelism.tp_size=8"}
WIDTHS = {
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "use_cache": False,
}
APP = """
    import os, time
    import hydra

    @hydra.main(version_base="1.3", config_path=None)
    def main(cfg):
        with open("starts.txt", "a") as file:
            file.write(f"{time.time()}\\n")

    if __name__ == "__main__":
        main()
"""


def llama(layers: int) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=layers, **WIDTHS))


def ours(layers: int, ranks: int, words: str) -> dict[str, float]:
    from hydra import compose, initialize
    from omegaconf import open_dict

    from nemo_dist_conf.composition.check import check
    from nemo_dist_conf.runtime.distributed_setup import setup_from_checked
    from nemo_dist_conf.strategies.fsdp2 import FSDP2Manager

    with initialize(config_path=None, version_base="1.3"):
        cfg = compose("nemo_dist_conf", [words])
    with open_dict(cfg):
        cfg.model = {"config": {"model_type": "llama", "num_hidden_layers": layers, **WIDTHS}}
    model = llama(layers)
    start = time.perf_counter()
    checked = check(cfg, ranks)
    check_s = time.perf_counter() - start
    start = time.perf_counter()
    setup = setup_from_checked(checked, "cpu")
    mesh_s = time.perf_counter() - start
    config: Any = setup.strategy_config
    mesh: Any = setup.mesh_context.device_mesh
    start = time.perf_counter()
    FSDP2Manager(config, mesh).parallelize(model)
    return {"check_s": check_s, "mesh_s": mesh_s, "wrap_s": time.perf_counter() - start}


def by_hand(layers: int, ranks: int, words: str) -> dict[str, float]:
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    tp = int(words.rpartition("=")[2])
    model = llama(layers)
    start = time.perf_counter()
    mesh = init_device_mesh("cpu", (ranks // tp, tp), mesh_dim_names=("dp", "tp"))
    mesh_s = time.perf_counter() - start
    start = time.perf_counter()
    plan: dict[str, Any] = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
    plan |= {f"mlp.{name}_proj": ColwiseParallel() for name in ("gate", "up")}
    plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    for layer in model.model.layers:
        if tp > 1:
            parallelize_module(layer, mesh["tp"], plan)
        fully_shard(layer, mesh=mesh["dp"], mp_policy=policy)
    fully_shard(model, mesh=mesh["dp"], mp_policy=policy)
    return {"mesh_s": mesh_s, "wrap_s": time.perf_counter() - start}


def in_a_fork(call: Any, *args: Any) -> dict[str, float]:
    """The call's result from a process of its own, as rank 0 of so many ranks."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        import torch.distributed as dist
        from torch.testing._internal.distributed.fake_pg import FakeStore

        status = 1
        try:
            dist.init_process_group("fake", rank=0, world_size=args[1], store=FakeStore())
            os.write(write, json.dumps(call(*args)).encode())
            status = 0
        finally:
            os._exit(status)
    os.close(write)
    with os.fdopen(read) as pipe:
        found = pipe.read()
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"{call.__name__}{args} failed")
    return json.loads(found)


def wraps(layers: tuple[int, ...], ranks: tuple[int, ...], repeats: int) -> list[dict[str, Any]]:
    import torch  # noqa: F401  (what the forks share)
    import transformers.models.llama.modeling_llama  # noqa: F401

    import nemo_dist_conf.instantiate  # noqa: F401

    cases = [(layout, count, world) for layout in LAYOUTS for count in layers for world in ranks]
    found: dict[Any, dict[str, list[dict[str, float]]]] = {case: {"ours": [], "hand": []} for case in cases}
    for number in range(repeats):
        for case in cases if number % 2 else cases[::-1]:
            layout, count, world = case
            for name, call in (("ours", ours), ("hand", by_hand)):
                found[case][name].append(in_a_fork(call, count, world, LAYOUTS[layout]))
    results = []
    for case, both in found.items():
        row: dict[str, Any] = {"what": "wrap", "layout": case[0], "layers": case[1], "ranks": case[2]}
        for key in ("check_s", "mesh_s", "wrap_s"):
            row[key] = statistics.median(one[key] for one in both["ours"])
        for key in ("mesh_s", "wrap_s"):
            row[f"hand_{key}"] = statistics.median(one[key] for one in both["hand"])
        results.append(row)
    return results


def sweep(jobs: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "app.py").write_text(textwrap.dedent(APP))
        words = ["hydra/launcher=torchrun", "hydra.launcher.nproc_per_node=1", f"+x=range({jobs})"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "app.py", "-m", *words]
        done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stdout + done.stderr)
        starts = sorted(float(line) for path in folder.rglob("starts.txt") for line in path.read_text().split())
    if len(starts) != jobs:
        raise SystemExit(f"{len(starts)} of {jobs} jobs ran")
    gaps = [later - earlier for earlier, later in zip(starts, starts[1:])]
    fifth = max(1, jobs // 5)
    first, last = statistics.median(gaps[:fifth]), statistics.median(gaps[-fifth:])
    return {"what": "sweep", "jobs": jobs, "first_s": first, "last_s": last, "ratio": last / first, "gaps_s": gaps}


def table(results: list[dict[str, Any]]) -> str:
    times = ("check [ms]", "meshes [ms]", "by hand", "wrap [ms]", "by hand", "ms a layer")
    columns = ("layout", "layers", "ranks", *times)
    rows = []
    for r in results:
        if r["what"] != "wrap":
            continue
        seconds = (r["check_s"], r["mesh_s"], r["hand_mesh_s"], r["wrap_s"], r["hand_wrap_s"])
        shown = [f"{1e3 * value:.1f}" for value in seconds]
        each = f"{1e3 * r['wrap_s'] / r['layers']:.2f}"
        rows.append((r["layout"], str(r["layers"]), f"{r['ranks']:,}", *shown, each))
    return report.table(columns, rows)


def sweep_table(results: list[dict[str, Any]]) -> str:
    rows = [
        (str(r["jobs"]), f"{r['first_s']:.3f}", f"{r['last_s']:.3f}", f"{r['ratio']:.2f}")
        for r in results
        if r["what"] == "sweep"
    ]
    return report.table(("jobs", "first fifth, s a job", "last fifth, s a job", "ratio"), rows)


def markdown(measured: dict[str, Any]) -> str:
    machine = measured["hardware"]
    return f"""# How our own work grows

How it is measured stands at the top of [scaling.py](../scaling.py). The last column is ours. What grows with the ranks
is torch's: fully_shard cuts each parameter into as many chunks as there are shards, by hand too. A mesh makes a group
for each part of each axis on every rank; ours does so for axes above 1 only (decision 14).

{table(measured["results"])}

A sweep of jobs that do nothing, one rank each; no job may cost more for those before it:

{sweep_table(measured["results"])}

Measured {measured["date"]} on {machine["cpu"]}, {machine["cores"]} cores, {machine["ram_gib"]} GiB; load before the run
{machine["load_before"]}; medians of {measured["repeats"]}. Versions: {report.used(measured)}.

    {measured["command"]}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes of each wrap (default 3)")
    parser.add_argument("--jobs", type=int, default=100, help="jobs of the sweep (default 100)")
    parser.add_argument("--quick", action="store_true", help="a small model, two worlds, five jobs: a smoke test")
    report.add_files(parser)
    options = parser.parse_args()
    layers, ranks = ((2,), (8, 16)) if options.quick else (LAYERS, RANKS)
    repeats, jobs = (1, 5) if options.quick else (options.repeats, options.jobs)
    measured = report.new_report(__file__, repeats=repeats)
    measured["results"] = [*wraps(layers, ranks, repeats), sweep(jobs)]
    report.finish(measured, options, f"{table(measured['results'])}\n\n{sweep_table(measured['results'])}", markdown)


if __name__ == "__main__":
    main()
