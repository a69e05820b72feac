"""Every layout that the rules allow, each held against one process.

``python -m tests.dist.matrix`` writes docs/parity.md.

    python -m tests.dist.matrix              every layout on 2, 4 and 8 ranks, then the table
    python -m tests.dist.matrix --ranks 2    those of 2 ranks only, and no table
    python -m tests.dist.matrix --keep FILE  notes each result in FILE, and goes on from there after an interruption
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import sys
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Iterator

import torch
import yaml
from omegaconf import OmegaConf

from nemo_dist_conf.composition.check import check
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.names import SCHEDULES
from nemo_dist_conf.topology.solve import divisors
from tests.dist.layouts import ADAMW, LLAMA, ROWS, STEPS, Trajectory, composed, single_process, train
from tests.dist.pool import close_pools, run_ranks

__all__ = ["Layout", "TABLE", "layouts", "run", "worst_difference"]

TABLE = Path(__file__).parents[2] / "docs" / "parity.md"
RANKS = (2, 4, 8)
#: 16 chunks on eight cp ranks.
LENGTH = 16
TOLERANCE = 1e-5
#: The recipe's rate: at three times of it, five steps make 1e-7 of rounding in a gradient of zero into 1e-5 of loss.
OPTIMIZER = {**ADAMW, "lr": 0.003}
_RUNS = itertools.count(1)


@dataclass(frozen=True)
class Layout:
    """Ranks along each axis; schedule of the pipeline; sequence: sequence parallelism beside tensor parallelism.

    dp counts shards and replicas together, as ``parallelism.dp_size`` does.
    """

    pp: int = 1
    dp_replicate: int = 1
    dp: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1
    schedule: str | None = None
    sequence: bool = False

    @property
    def ranks(self) -> int:
        return self.pp * self.dp * self.cp * self.tp

    @property
    def words(self) -> list[str]:
        """The overrides of a user who wants this layout."""
        sizes = {"pp": self.pp, "dp_replicate": self.dp_replicate, "cp": self.cp, "tp": self.tp, "ep": self.ep}
        words = [f"parallelism.{axis}_size={size}" for axis, size in sizes.items() if size > 1]
        if self.schedule is not None:
            rows = ROWS // self.dp
            # Twice as many microbatches as ranks: DualPipeV needs one for each stage.
            micro = f"pipeline.pp_microbatch_size={rows // (2 * self.pp)}"
            words += [f"pipeline={self.schedule}", f"pipeline.pp_batch_size={rows}", micro]
        return [*words, *(["strategy.sequence_parallel=true"] if self.sequence else [])]

    def __str__(self) -> str:
        shards = self.dp // self.dp_replicate
        sizes = {"pp": self.pp, "dp_replicate": self.dp_replicate, "dp_shard": shards, "cp": self.cp, "tp": self.tp}
        named = [f"{axis} {size}" for axis, size in {**sizes, "ep": self.ep}.items() if size > 1]
        return " x ".join(named) + (" + sp" if self.sequence else "")


def model_of(layout: Layout) -> dict[str, Any]:
    """Two layers for each pipeline rank, so that there is one for each stage of any schedule.

    With ep: Mixtral, eight experts of which a token takes two.
    """
    config = {**LLAMA, "num_key_value_heads": 8, "num_hidden_layers": 2 * layout.pp}
    if layout.ep > 1:
        config |= {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
    return {"config": config}


def layouts(ranks: int) -> Iterator[Layout]:
    """All factorisations of ``ranks`` over the axes that the rules allow, with every schedule, with and without sp.

    With ep, which lies across the others, one schedule stands for all.
    """
    for pp, dp, cp, tp in itertools.product(divisors(ranks), repeat=4):
        if pp * dp * cp * tp != ranks:
            continue
        for replicate, ep in itertools.product(divisors(dp), divisors(ranks)):
            names = list(SCHEDULES) if ep == 1 else ["1f1b"]
            for schedule in names if pp > 1 else [None]:
                for sequence in (False, True) if tp > 1 else (False,):
                    layout = Layout(pp, replicate, dp, cp, tp, ep, schedule, sequence)
                    if _allowed(layout):
                        yield layout


def _allowed(layout: Layout) -> bool:
    cfg = _config(Layout())  # composing each of some hundred layouts would take minutes
    cfg.model = model_of(layout)
    for word in layout.words:
        key, _, value = word.replace("pipeline=", "pipeline.pp_schedule=").partition("=")
        OmegaConf.update(cfg, key, value if key == "pipeline.pp_schedule" else yaml.safe_load(value))
    try:
        check(cfg, layout.ranks, seq_len=LENGTH)
    except ConfigError:
        return False
    return True


def _config(layout: Layout) -> Any:
    return composed("strategy.mp_policy=null", *layout.words, model=model_of(layout), optimizer=OPTIMIZER)


def _train(layout: Layout, steps: int, whole: bool = False) -> Trajectory:
    return train(_config(layout), steps=steps, whole=whole, length=LENGTH)


@functools.cache
def _one_process(model: str) -> Trajectory:
    """Plain transformers and torch on the whole batch; only the initial weights are ours."""
    kinds = (Layout(pp=pp, ep=ep) for pp in (1, 2, 4, 8) for ep in (1, 2))
    layout = next(layout for layout in kinds if str(model_of(layout)) == model)
    alone = run_ranks(1, _alone, layout)[0]
    return run_ranks(1, single_process, model_of(layout)["config"], OPTIMIZER, alone.weights, LENGTH)[0]


def _alone(layout: Layout) -> Trajectory:
    """One rank, no step: the initial weights."""
    cfg = composed("strategy=ddp", model=model_of(layout), optimizer=OPTIMIZER)
    return train(cfg, steps=0, whole=True, length=LENGTH)


def run(layout: Layout) -> float:
    """Train here and on one process; the worst relative difference of a loss or a gradient norm of any rank."""
    want = _one_process(str(model_of(layout)))
    found = run_ranks(layout.ranks, _train, layout, STEPS, timeout_s=300)
    if layout.ranks > 2 and next(_RUNS) % 4 == 0:
        close_pools()  # gloo keeps a thread for every group that a rank ever had, and each wakes all the time
    return max(worst_difference(rank, want) for rank in found)


def worst_difference(found: Trajectory, want: Trajectory) -> float:
    pairs = [*zip(found.losses, want.losses, strict=True), *zip(found.norms, want.norms, strict=True)]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def table(rows: dict[Layout, float], seconds: float) -> str:
    """docs/parity.md."""
    worst = max(rows.values())
    lines = [
        "# Every layout against one process",
        "",
        f"Llama (hidden {LLAMA['hidden_size']}, 8 heads, two layers for each pipeline rank), with `ep` Mixtral "
        f"(8 experts, 2 a token), float32, {ROWS} rows of {LENGTH} tokens, {STEPS} AdamW steps with gradient clipping, "
        "against plain transformers and torch on one process with the same initial weights. Difference: the worst "
        "relative one of any loss or gradient norm, on any rank. `sp`: sequence parallelism.",
        "",
        f"{len(rows)} layouts: all that the rules allow on {', '.join(map(str, RANKS))} ranks (with ep, one schedule). "
        f"Worst difference {worst:.1e} (allowed {TOLERANCE:.0e}).",
        "",
        f"torch {torch.__version__}, gloo, CPU ({platform.machine()}), {date.today()}, {seconds / 60:.0f} minutes: "
        "`python -m tests.dist.matrix`.",
        "",
        "| ranks | layout | schedule | worst relative difference |",
        "|---|---|---|---|",
    ]
    lines += [f"| {row.ranks} | {row} | {row.schedule or ''} | {off:.1e} |" for row, off in rows.items()]
    return "\n".join(lines) + "\n"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.dist.matrix", description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=None, help="only these world sizes, and no file")
    parser.add_argument("--keep", type=Path, help="results, a JSON object a line; what is there is not run again")
    options = parser.parse_args(arguments)
    chosen, keep = options.ranks, options.keep
    kept = [json.loads(line) for line in keep.read_text().splitlines()] if keep and keep.exists() else []
    known = {(row["ranks"], row["layout"], row["schedule"]): row for row in kept}
    rows: dict[Layout, float] = {}
    seconds, wrong = 0.0, []
    for ranks in chosen or RANKS:
        for layout in layouts(ranks):
            name = (ranks, str(layout), layout.schedule)
            if name in known:
                rows[layout] = known[name]["worst"]
                seconds += known[name]["seconds"]
                continue
            began = time.monotonic()
            try:
                rows[layout] = run(layout)
            except Exception as error:  # the table is of no use without the others
                rows[layout] = float("inf")
                print(f"{layout}: {error}", file=sys.stderr)
            if not rows[layout] < TOLERANCE:
                wrong.append(layout)
            took = time.monotonic() - began
            seconds += took
            shown = f"{ranks} ranks  {layout!s:40}  {layout.schedule or '':24}"
            print(f"{shown}{rows[layout]:.1e}  {took:.1f} s", flush=True)
            if keep and rows[layout] < TOLERANCE:
                row = dict(zip(("ranks", "layout", "schedule"), name)) | {"worst": rows[layout], "seconds": took}
                with keep.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        close_pools()
    print(f"{len(rows)} layouts, {len(wrong)} above {TOLERANCE:.0e}")
    if chosen is None and not wrong:
        TABLE.write_text(table(rows, seconds), encoding="utf-8")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
