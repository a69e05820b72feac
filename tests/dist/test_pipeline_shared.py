"""Pipelines of models that are no plain chain, on real ranks: tied embeddings, parameters at the root, several tensors
handed on; with clipping and momentum, beside one process.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nemo_dist_conf.checkpoint import load, save
from nemo_dist_conf.checkpoint.export import export_hf
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.runtime.ema import EMA
from tests.checkpoint.exchange import Layout, exchange, worst
from tests.dist.layouts import (
    FEWER_STEPS,
    LLAMA,
    ROWS,
    SGD,
    VOCABULARY,
    Block,
    Trajectory,
    composed,
    full_state,
    full_tensor,
    take_steps,
)
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist

FP32, LENGTH = "strategy.mp_policy=null", 16
PP, TP = "parallelism.pp_size=2", "parallelism.tp_size=2"
TIED = {"config": {**LLAMA, "num_hidden_layers": 4, "tie_word_embeddings": True}}
EMBEDDING = "model.embed_tokens.weight"


class Pairs(nn.Module):
    """A block that returns a tuple; the second goes on as it is, and is used by every block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = Block(width)

    def forward(self, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, None]:
        bias = torch.tanh(x.mean(-1, keepdim=True)) if bias is None else bias
        return self.inner(x) + bias, bias, None


class Around(nn.Module):
    """Learned positions at the root, a norm that runs twice, scales, and a head that is the embedding's weight."""

    distributed_blocks = "stack"

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.randn(64, 32))
        self.table = nn.Embedding(VOCABULARY, 32)
        self.norm = nn.LayerNorm(32)
        self.stack = nn.ModuleList(Pairs(32) for _ in range(4))

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSH, bias = self.norm(self.table(ids_BS) * 3.0 + self.places[: ids_BS.size(1)]), None
        for block in self.stack:
            x_BSH, bias, _ = block(x_BSH, bias)
        x_BSH = self.norm(x_BSH * bias) + self.places[: ids_BS.size(1)]
        return x_BSH @ self.table.weight.T * 0.5


class Writing(nn.Module):
    """Writes into what a block has returned, which is what a stage is handed."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY)
        self.stack = nn.ModuleList(Block(32) for _ in range(4))

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSH = self.table(ids_BS)
        for block in self.stack:
            x_BSH = block(x_BSH)
            x_BSH *= 0.9
        return self.head(x_BSH)


AROUND = {"_target_": "tests.dist.test_pipeline_shared.Around"}


WRITING = {"_target_": "tests.dist.test_pipeline_shared.Writing"}
MODELS = {"tied": TIED, "around": AROUND, "writing": WRITING}


def rows(count: int) -> str:
    return f"pipeline.pp_batch_size={count}"


#: name -> (ranks, words, microbatches of the loop, model, names that ranks of several stages have)
CASES: dict[str, tuple[int, tuple[str, ...], int, dict[str, Any], list[str]]] = {
    "tied": (2, (PP, rows(ROWS)), 1, TIED, [EMBEDDING]),
    "tied, one microbatch": (
        2,
        (PP, "pipeline=gpipe", rows(ROWS), f"pipeline.pp_microbatch_size={ROWS}"),
        1,
        TIED,
        [EMBEDDING],
    ),
    "tied, accumulated": (2, (PP, rows(ROWS // 4)), 4, TIED, [EMBEDDING]),
    "tied, accumulated means": (
        2,
        (PP, rows(ROWS // 2), "pipeline.scale_grads_in_schedule=true"),
        2,
        TIED,
        [EMBEDDING],
    ),
    "tied, interleaved": (2, (PP, rows(ROWS), "pipeline=interleaved_1f1b"), 1, TIED, [EMBEDDING]),
    "tied, both ends on a rank": (2, (PP, rows(ROWS // 2), "pipeline=zbv_zero_bubble"), 2, TIED, []),
    "tied x dp": (4, (PP, rows(ROWS // 2)), 1, TIED, [EMBEDDING]),
    "tied x tp": (4, (PP, TP, rows(ROWS)), 1, TIED, [EMBEDDING]),
    "around": (2, (PP, rows(ROWS)), 1, AROUND, ["norm.bias", "norm.weight", "places", "table.weight"]),
    "around, V x dp": (
        4,
        (PP, rows(ROWS // 2), "pipeline=zbv_zero_bubble", "activation_checkpointing=true"),
        1,
        AROUND,
        [],
    ),
    "around, looped": (
        2,
        (PP, rows(ROWS), "pipeline=looped_bfs"),
        1,
        AROUND,
        ["norm.bias", "norm.weight", "places", "table.weight"],
    ),
    "writing x dp": (4, (PP, rows(ROWS // 2)), 1, WRITING, []),
}


def run_case(name: str) -> tuple[Trajectory, dict[str, Tensor], dict[str, Tensor]]:
    """What was seen, every parameter in the end, and what this rank has of those that several stages have."""
    _, words, microbatches, model, _ = CASES[name]
    cfg = composed(FP32, *words, model=model, optimizer=SGD)
    setup, pipeline, optimizer = instantiate(cfg)
    seen = take_steps(setup, pipeline, optimizer, microbatches, FEWER_STEPS, True, LENGTH)
    named = dict(pipeline.named_parameters())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(named)
    shared = {key: full_tensor(named[key].detach()) for key in pipeline.shared.on_several_ranks() if key in named}
    assert pipeline.num_parameters == sum(value.numel() for value in full_state(pipeline).values())
    return seen, full_state(pipeline), shared


@functools.cache
def expected(model: str) -> tuple[Trajectory, dict[str, Tensor]]:
    return run_ranks(1, one_rank, MODELS[model])[0]


def one_rank(model: dict[str, Any]) -> tuple[Trajectory, dict[str, Tensor]]:
    setup, wrapped, optimizer = instantiate(composed(FP32, model=model, optimizer=SGD))
    seen = take_steps(setup, wrapped, optimizer, 1, FEWER_STEPS, True, LENGTH)
    return seen, full_state(wrapped)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name: str) -> None:
    want, after = expected(name.split()[0].rstrip(","))
    found = run_ranks(CASES[name][0], run_case, name)
    for rank, _, shared in found:
        assert rank.losses == pytest.approx(want.losses, rel=1e-5)
        assert rank.norms == pytest.approx(want.norms, rel=1e-5)
        assert sorted(shared) == CASES[name][4]
        for key, value in shared.items():
            assert torch.equal(value, found[0][2][key]), f"copies of {key} have gone apart"
    seen, parameters, _ = found[0]
    assert [key for key in seen.weights if not torch.equal(want.weights[key], seen.weights[key])] == []
    assert want.gradients.keys() == seen.gradients.keys()
    off = {key: float((seen.gradients[key] - g).norm() / g.norm()) for key, g in want.gradients.items()}
    assert max(off.values()) < 1e-5, max(off.items(), key=lambda entry: entry[1])
    moved = {key: float((parameters[key] - after[key]).norm() / after[key].norm()) for key in parameters}
    assert max(moved.values()) < 1e-5, max(moved.items(), key=lambda entry: entry[1])


def test_what_is_compared_moves() -> None:
    for model, name in (("tied", EMBEDDING), ("around", "places"), ("writing", "table.weight")):
        want, after = expected(model)
        apart = {key: float((after[key] - value).norm() / value.norm()) for key, value in want.weights.items()}
        assert apart[name] > 1e-4


def other_rows() -> str:
    _, pipeline, _ = instantiate(composed(FP32, PP, rows(ROWS), model=WRITING, optimizer=SGD))
    ids = torch.full((ROWS, LENGTH), 1 + torch.distributed.get_rank())
    try:
        pipeline.step(ids, ids)
    except ConfigError as error:
        return error.what
    return ""


def test_stages_that_are_given_different_rows_are_refused_in_the_first_step() -> None:
    assert all("stages of a pipeline were given different rows" in said for said in run_ranks(2, other_rows))


# Checkpoints.

_EVEN = {"config": {**LLAMA, "num_hidden_layers": 4, "tie_word_embeddings": True}}
LAYOUTS = {
    "ddp 2": Layout(2, ("strategy=ddp",), _EVEN),
    "pp 2": Layout(2, ("strategy=fsdp2", FP32, PP, rows(ROWS)), _EVEN),
    "pp 2, V": Layout(2, ("strategy=fsdp2", FP32, PP, rows(ROWS), "pipeline=zbv_zero_bubble"), _EVEN),
}


def test_a_checkpoint_has_a_tied_embedding_once_and_any_layout_loads_it() -> None:
    found = exchange(LAYOUTS)
    assert len(found) == 9 and not worst(found), "\n".join(worst(found))


def _kept(folder: Path, words: tuple[str, ...]) -> dict[str, Tensor]:
    """Averages of weights after two steps, saved among the objects."""
    setup, model, optimizer = instantiate(composed(FP32, *words, model=TIED, optimizer=SGD))
    ema = EMA(model, 0.5)
    for _ in range(2):
        take_steps(setup, model, optimizer, 1, 1, False, LENGTH)
        ema.update()
    save(folder, model, optimizer, objects={"ema": ema})
    return {name: full_tensor(value) for name, value in ema.state_dict()["averages"].items()}


def _loaded(folder: Path, words: tuple[str, ...]) -> dict[str, Tensor]:
    _, model, _ = instantiate(composed(FP32, *words, model=TIED, optimizer=SGD))
    ema = EMA(model, 0.5)
    load(folder, model, objects={"ema": ema})
    return {name: full_tensor(value) for name, value in ema.state_dict()["averages"].items()}


def test_averages_of_a_tied_embedding_are_kept_once_too(tmp_path: Path) -> None:
    stages = (PP, rows(ROWS // 2))
    kept = run_ranks(4, _kept, tmp_path / "kept", stages)
    last = next(one for one in kept if "model.norm.weight" in one)
    assert torch.equal(kept[0][EMBEDDING], last[EMBEDDING])
    for rank in run_ranks(2, _loaded, tmp_path / "kept", ()):
        for one in (kept[0], last):
            assert all(torch.equal(rank[name], value) for name, value in one.items())
    whole = run_ranks(2, _loaded, tmp_path / "kept", ())[0]
    for rank in run_ranks(2, _loaded, tmp_path / "kept", (PP, rows(ROWS))):
        assert EMBEDDING in rank and all(torch.equal(value, whole[name]) for name, value in rank.items())


def _weights_of(folder: Path, words: tuple[str, ...]) -> dict[str, Tensor]:
    return full_state(instantiate(composed(FP32, *words, model={"name_or_path": str(folder)}, optimizer=SGD))[1])


def test_a_folder_of_transformers_has_it_once(tmp_path: Path) -> None:
    """Exported from a pipeline, and loaded into one."""
    from transformers import AutoModelForCausalLM

    run_ranks(2, _kept, tmp_path / "kept", (PP, rows(ROWS)))
    export_hf(tmp_path / "kept", tmp_path / "folder")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", dtype=torch.float32)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    found = run_ranks(2, _weights_of, tmp_path / "folder", (PP, rows(ROWS)))[0]
    assert found.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(found[name], value) for name, value in plain.named_parameters())
