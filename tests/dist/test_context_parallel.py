"""Context parallelism: sequences split over ranks, the numbers of one process."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.runtime.context_parallel import local_positions, split_sequence
from tests.dist.layouts import ADAMW, FEWER_STEPS, LLAMA, MODELS, SGD, Trajectory, batch, composed, single_process, train
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist

FP32 = "strategy.mp_policy=null"
CP = "parallelism.cp_size=2"
#: Eight chunks on four cp ranks, of two tokens each.
LENGTH = 16

#: name -> (ranks, words, microbatches)
LAYOUTS: dict[str, tuple[int, tuple[str, ...], int]] = {
    "cp 2": (2, (CP,), 1),
    "cp 2, 4 microbatches": (2, (CP,), 4),
    "cp 2, full checkpointing": (2, (CP, "activation_checkpointing=true"), 1),
    "cp 2, selective checkpointing, prefetch": (
        2,
        (CP, "activation_checkpointing=selective", "strategy.enable_fsdp2_prefetch=true"),
        1,
    ),
    "cp 4": (4, ("parallelism.cp_size=4",), 1),
    "cp 2 x dp 2": (4, (CP,), 2),
    "hsdp 2x2 x cp 2": (8, (CP, "parallelism.dp_replicate_size=2"), 1),
    "cp 2 x tp 2": (4, (CP, "parallelism.tp_size=2"), 1),
    "cp 2 x tp 2, sequence parallel": (4, (CP, "parallelism.tp_size=2", "strategy.sequence_parallel=true"), 2),
}


def run_layout(name: str, sgd: bool) -> Trajectory:
    _, words, microbatches = LAYOUTS[name]
    cfg = composed(FP32, *words, model=MODELS["llama"], optimizer=SGD if sgd else ADAMW)
    return train(cfg, microbatches, FEWER_STEPS, sgd, LENGTH)


@functools.cache
def expected(sgd: bool) -> Trajectory:
    cfg = composed("strategy=ddp", model=MODELS["llama"], optimizer=SGD)
    weights = run_ranks(1, train, cfg, steps=0, whole=True)[0].weights
    return run_ranks(1, single_process, "llama", SGD if sgd else ADAMW, weights, LENGTH)[0]


#: SGD shows a wrong scale of the gradients, which Adam divides away.
RUNS = [(name, True) for name in LAYOUTS] + [("cp 2 x dp 2", False)]


@pytest.mark.parametrize(("name", "sgd"), RUNS, ids=[f"{name}, {'sgd' if sgd else 'adamw'}" for name, sgd in RUNS])
def test_equals_one_process(name: str, sgd: bool) -> None:
    want = expected(sgd)
    found = run_ranks(LAYOUTS[name][0], run_layout, name, sgd)
    for rank in found:
        assert rank.losses == pytest.approx(want.losses[:FEWER_STEPS], rel=1e-5)
        assert rank.norms == pytest.approx(want.norms[:FEWER_STEPS], rel=1e-5)
    for key, gradient in (want.gradients if sgd else {}).items():
        assert float((found[0].gradients[key] - gradient).norm() / gradient.norm()) < 1e-5, key


def _pieces(length: int) -> tuple[list[int], Tensor]:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    whole = torch.arange(2 * length).view(2, length)
    return local_positions(length // mesh.size(), mesh, torch.device("cpu")).tolist(), split_sequence(whole, mesh)


def test_a_rank_holds_one_early_and_one_late_chunk_and_all_tokens_are_held_once() -> None:
    pieces = run_ranks(2, _pieces, 8)
    assert [positions for positions, _ in pieces] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert pieces[1][1].tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert sorted(torch.cat([part for _, part in pieces], 1).flatten().tolist()) == list(range(16))


def test_a_length_that_does_not_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="10 tokens do not split"):
        run_ranks(2, _pieces, 10)


#: A window of 5 tokens reaches into chunks of other ranks; the third has norms of queries and keys.
FAMILIES = {
    "mistral, window": {"model_type": "mistral", "sliding_window": 5, "head_dim": 8},
    "qwen2": {"model_type": "qwen2"},
    "qwen3": {"model_type": "qwen3", "head_dim": 8},
}


def run_family(family: str, *words: str) -> Trajectory:
    cfg = composed(FP32, *words, model={"config": {**LLAMA, **FAMILIES[family]}}, optimizer=SGD)
    return train(cfg, steps=2, length=LENGTH)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_families_equal_one_rank(family: str) -> None:
    (one,) = run_ranks(1, run_family, family)
    for rank in run_ranks(2, run_family, family, CP):
        assert (rank.losses, rank.norms) == (pytest.approx(one.losses, rel=1e-5), pytest.approx(one.norms, rel=1e-5))


def _refused(kind: str, masked: bool) -> str:
    from nemo_dist_conf.instantiate import instantiate

    with pytest.raises(ConfigError) as caught:
        _, model, _ = instantiate(composed(FP32, CP, model=MODELS[kind], optimizer=SGD))
        ids_BS = batch(LENGTH)[0]
        model(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS) if masked else None)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "masked", "text"),
    [
        ("module", False, "the attention of Net cannot be exchanged"),
        ("llama", True, "an attention mask cannot be split"),
        ("llama", False, "rows that were not split"),
    ],
)
def test_what_cannot_be_split_is_refused(kind: str, masked: bool, text: str) -> None:
    assert all(text in message for message in run_ranks(2, _refused, kind, masked))
