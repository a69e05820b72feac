"""What saving and loading take: ours, plain torch.distributed.checkpoint, and torch.save of a gathered state.

save, load: of model and AdamW state, on the slowest rank, to files that are on the disk (fsync) when it returns; ours
also hashes what it writes, and what it reads before it is used. pause: what a step waits for an asynchronous save.
The sides take turns within one run; ratios are medians of neighbours.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any, Callable

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.ranks import joined, on_ranks, timed
from benchmarks.report import add_files, finish, new_report, table, used

AIM = 1.10
RANKS = 2


def measure(rank: int, folder: str, width: int, layers: int, rounds: int) -> None:
    """On one rank; rank 0 writes seconds by measure and side, a list of rounds each."""
    with joined(rank, folder, RANKS):
        found = _measure(Path(folder), width, layers, rounds)
    if rank == 0:
        Path(folder, "found.json").write_text(json.dumps(found))


def _measure(folder: Path, width: int, layers: int, rounds: int) -> dict[str, Any]:
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from torch import nn
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        get_state_dict,
        set_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    from nemo_dist_conf.checkpoint import Checkpoints, load, save

    torch.manual_seed(0)
    model: Any = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, width)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    group = dist.new_group(backend="gloo")
    seconds: dict[str, dict[str, list[float]]] = {}

    def note(measure: str, side: str, work: Callable[[], Any]) -> Any:
        taken, result = timed(work)
        seconds.setdefault(measure, {}).setdefault(side, []).append(taken)
        return result

    def whole_to_one_file(path: Path) -> None:
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_state_dict(model, optimizer, options=options)
        if dist.get_rank() == 0:
            torch.save(state, path)

    def plain_save(path: Path) -> None:
        weights, state = get_state_dict(model, optimizer)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=path)

    def plain_load(path: Path) -> None:
        weights, state = get_state_dict(model, optimizer)
        held: dict[str, Any] = {"model": weights, "optimizer": state}
        dcp.load(held, checkpoint_id=path)
        set_state_dict(model, optimizer, model_state_dict=held["model"], optim_state_dict=held["optimizer"])

    def plain_pause(path: Path) -> Any:
        weights, state = get_state_dict(model, optimizer)
        return dcp.async_save({"model": weights, "optimizer": state}, checkpoint_id=path, process_group=group)

    checkpoints = Checkpoints(folder / "series", asynchronous=True, keep=1)
    for number in range(rounds):
        ours, plain, one = (folder / f"{side}{number}" for side in ("ours", "plain", "one"))
        note("save", "ours", lambda: save(ours, model, optimizer))
        note("save", "plain dcp", lambda: plain_save(plain))
        note("save", "torch.save", lambda: whole_to_one_file(one))
        note("load", "ours", lambda: load(ours, model, optimizer))
        note("load", "plain dcp", lambda: plain_load(plain))
        note("pause", "ours", lambda: checkpoints.save(number, model, optimizer))
        checkpoints.wait()
        note("pause", "plain dcp", lambda: plain_pause(folder / f"async{number}")).result()
        dist.barrier()
        if dist.get_rank() == 0:
            for path in folder.iterdir():
                if path.name.startswith(("ours", "plain", "async")):
                    shutil.rmtree(path)
                elif path.name.startswith("one"):
                    path.unlink()
        dist.barrier()
    checkpoints.close()
    weights: dict[str, Any] = get_model_state_dict(model)
    size = 3 * sum(p.numel() * p.element_size() for p in weights.values())
    return {"bytes": size, "seconds": seconds}


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """The first round, in which memory is mapped and modules are imported, is left out."""
    made = []
    for measure, sides in found["seconds"].items():
        for side, all_rounds in sides.items():
            taken = all_rounds[1:] or all_rounds
            ratios = [mine / theirs for mine, theirs in zip(sides["ours"][-len(taken) :], taken)]
            made.append(
                {
                    "measure": measure,
                    "side": side,
                    "seconds": statistics.median(taken),
                    "mb_per_s": found["bytes"] / 1e6 / statistics.median(taken),
                    "ours_to_it": None if side == "ours" else statistics.median(ratios),
                }
            )
    return made


def shown(report: dict[str, Any]) -> str:
    lines = []
    for row in report["results"]:
        ratio = "" if row["ours_to_it"] is None else f"{row['ours_to_it']:.2f}"
        aim = f"{AIM:.2f}" if row["side"] == "plain dcp" else ""
        taken, rate = f"{row['seconds'] * 1e3:.0f}", f"{row['mb_per_s']:.0f}"
        lines.append((row["measure"], row["side"], taken, rate, ratio, aim))
    return table(("measure", "side", "ms", "MB/s", "ours / it", "aim"), lines)


def markdown(report: dict[str, Any]) -> str:
    hardware = report["hardware"]
    return f"""# Saving and loading

What each measure means stands at the top of [checkpoint.py](../checkpoint.py).

{shown(report)}

{report["megabytes"]:.0f} MB of weights and AdamW state under fully_shard, {RANKS} gloo ranks,
{report["rounds"]} rounds.
In "load", ours also compares the SHA-256 of every file before any value is used, which plain DCP does not do.
Measured {report["date"]} on {hardware["cpu"]}, {hardware["cores"]} cores, {hardware["ram_gib"]} GiB;
load before the run {hardware["load_before"]}. Versions: {used(report)}.

    {report["command"]}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a small model, two rounds: only to see that it runs")
    add_files(parser)
    options = parser.parse_args()
    width, layers, rounds = (64, 2, 2) if options.quick else (2048, 8, 7)
    report = new_report(__file__, rounds=rounds)
    found = on_ranks(RANKS, measure, width, layers, rounds)
    report["megabytes"] = found["bytes"] / 1e6
    report["results"] = rows(found)
    finish(report, options, shown(report), markdown)


if __name__ == "__main__":
    main()
