"""Kinds of models: each trains as in plain torch in one process, on several layouts, or is refused."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor, nn

from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.runtime.engines.pipeline_model import Pipeline
from tests.conformance.case import Case
from tests.dist import test_batch_statistics, test_entries
from tests.dist.kinds import KINDS, Block, Scale, difference
from tests.dist.layouts import composed, full_state
from tests.dist.pool import run_ranks

__all__ = ["CASES"]

AREA = "Kinds of models"

LAYOUTS: dict[str, tuple[int, tuple[str, ...], int]] = {
    "ddp 2": (2, ("strategy=ddp",), 1),
    "ddp 2, unused parameters looked for": (2, ("strategy=ddp", "strategy.find_unused_parameters=true"), 1),
    "fsdp2 2": (2, (), 1),
    "fsdp2 2, checkpointed, 2 microbatches": (2, ("activation_checkpointing=true",), 2),
    "fsdp2 2, prefetched, always freed": (
        2,
        ("strategy.enable_fsdp2_prefetch=true", "strategy.reshard_after_forward=true"),
        1,
    ),
    "hsdp 2x2": (4, ("parallelism.dp_replicate_size=2",), 1),
}
#: Kinds with parameters that a step does not use, which ddp has to be told of.
UNUSED = {"wav2vec2", "gemma3_with_images", "gemma3_text_alone", "opt_with_layerdrop", "wav2vec2_with_layerdrop"}
#: One of each mechanism; the table has all.
SAMPLE = {
    "ddp 2": {"clip", "scalars", "sparse_embedding", "opt_with_layerdrop"},
    "ddp 2, unused parameters looked for": {"gemma3_text_alone", "opt_with_layerdrop", "wav2vec2"},
    "fsdp2 2": set(KINDS) - {"bert_decoder", "gemma3_text_alone"},
    "fsdp2 2, checkpointed, 2 microbatches": {"gemma3_with_images", "two_dtypes", "scalars"},
    "fsdp2 2, prefetched, always freed": {"opt_with_layerdrop", "shared_layer"},
    "hsdp 2x2": {"scalars", "dtypes_in_one_module"},
}


def _cases() -> list[Case]:
    found = []
    for kind in KINDS:
        for layout, (ranks, words, microbatches) in LAYOUTS.items():
            looked_for = "looked for" in layout
            if looked_for and kind not in UNUSED:
                continue
            refused = "find_unused_parameters=true" if layout == "ddp 2" and kind in UNUSED else None
            if kind == "sparse_embedding" and "ddp" not in layout:
                refused = "strategy=ddp"
            if microbatches > 1 and kind == "clip":
                continue  # its loss compares the rows of a microbatch
            run = functools.partial(difference, ranks, kind, *words, microbatches=microbatches)
            name = kind.replace("_", " ")
            found.append(Case(AREA, name, layout, run, refused, in_suite=kind in SAMPLE[layout]))
    return found


# ------------------------------------------------------------------------------------------------------ in a pipeline


class Counting(nn.Module):
    """A chain with scalars in its blocks, whose numbers depend on how often it was called."""

    distributed_blocks = "stack"

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 8)
        self.calls = [0]
        self.stack = nn.ModuleList(Called(self.calls) for _ in range(4))
        self.out = nn.Linear(8, 32)

    def forward(self, ids_BS: Tensor) -> Tensor:
        self.calls[0] += 1
        x_BSH = self.table(ids_BS)
        for block in self.stack:
            x_BSH = block(x_BSH)
        return self.out(x_BSH)


class Called(Block):
    def __init__(self, calls: list[int]) -> None:
        super().__init__(Scale())
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.calls[0]


class Normalised(Counting):
    """A chain with batch normalisation over all tokens of a batch in its blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = nn.ModuleList(Block(OfTokens(8)) for _ in range(4))


class OfTokens(nn.BatchNorm1d):
    def forward(self, x_BSH: Tensor) -> Tensor:
        return super().forward(x_BSH.transpose(1, 2)).transpose(1, 2)


def in_stages(kind: type[nn.Module], words: tuple[str, ...]) -> dict[str, Tensor]:
    """Weights after two steps, as one process has them."""
    torch.manual_seed(0)
    setup, model, optimizer = instantiate(
        composed("strategy.mp_policy=null", *words), kind(), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)
    )
    context = setup.mesh_context
    ids = torch.randint(32, (4, 8), generator=torch.Generator().manual_seed(0))
    mine = ids.chunk(context.data_size)[context.data_rank]
    for _ in range(2):
        scale = context.gradient_size / ids.numel()
        if isinstance(model, Pipeline):
            model.step(mine, mine, scale)
        else:
            loss = nn.functional.cross_entropy(model(mine).flatten(0, 1), mine.flatten(), reduction="sum")
            (loss * scale).backward()
        optimizer.step()
        optimizer.zero_grad()
    return full_state(model)


def _stages(kind: type[nn.Module], ranks: int, *words: str) -> float:
    (expected,) = run_ranks(1, in_stages, kind, ())
    worst = 0.0
    for found in run_ranks(ranks, in_stages, kind, words):
        worst = max(worst, *(float((found[key] - value).abs().max()) for key, value in expected.items()))
    return worst


# ------------------------------------------------------------------------------------------------- methods, statistics


def _method(layout: str, step: str) -> float:
    return max(run_ranks(4 if "hsdp" in layout else 2, test_entries.apart, layout, step, 2))


def _statistics(layout: str) -> float:
    ranks, words = test_batch_statistics.LAYOUTS[layout]
    return max(run_ranks(ranks, test_batch_statistics.apart, words))


def _copied(strategy: str) -> float:
    run_ranks(2, test_entries.copied, strategy, "average")
    return math.nan


def _rows(count: int) -> tuple[str, str]:
    """In one microbatch."""
    return f"pipeline.pp_batch_size={count}", f"pipeline.pp_microbatch_size={count}"


PIPELINE = "parallelism.pp_size=2"
CASES: list[Case] = [
    *_cases(),
    Case(
        AREA,
        "scalars, and a forward that counts its calls",
        "pp 2",
        functools.partial(_stages, Counting, 2, PIPELINE, "pipeline=gpipe", *_rows(4)),
    ),
    Case(
        AREA,
        "scalars, and a forward that counts its calls",
        "pp 2 x fsdp2 2",
        functools.partial(_stages, Counting, 4, PIPELINE, "pipeline=gpipe", *_rows(2)),
        in_suite=False,
    ),
    Case(
        AREA,
        "batch normalisation, batch_statistics=global",
        "pp 2 x fsdp2 2",
        functools.partial(_stages, Normalised, 4, PIPELINE, "pipeline=gpipe", *_rows(2), "batch_statistics=global"),
        in_suite=False,
    ),
    Case(
        AREA,
        "layers skipped at random",
        "pp 2",
        functools.partial(difference, 2, "opt_with_layerdrop", PIPELINE, "pipeline.pp_batch_size=4"),
        refused="parallelism.pp_size=1",
    ),
    *(
        Case(AREA, f"called by its methods: {step}", layout, functools.partial(_method, layout, step), in_suite=False)
        for step in test_entries.STEPS
        for layout in test_entries.LAYOUTS
    ),
    *(
        Case(
            AREA,
            "batch normalisation, batch_statistics=global",
            name,
            functools.partial(_statistics, name),
            in_suite=False,
        )
        for name in test_batch_statistics.LAYOUTS
    ),
    *(
        Case(
            AREA,
            "a copy for averaged weights (AveragedModel)",
            f"{name} 2",
            functools.partial(_copied, name),
            refused="nemo_dist_conf.EMA(model)",
            in_suite=False,
        )
        for name in ("ddp", "fsdp2")
    ),
]
