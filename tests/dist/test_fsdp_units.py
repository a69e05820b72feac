"""Which modules FSDP2 gathers and reduces on their own, and when."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from nemo_dist_conf.instantiate import instantiate
from tests.dist.layouts import MODELS, Operators, batch, composed, loss_sum
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist

FP32 = "strategy.mp_policy=null"
WIDE: dict[str, Any] = MODELS["wide"]["config"]
BLOCKS = ["model.layers.0", "model.layers.1", "model.layers.2"]
APART = ["model.embed_tokens", "model.norm", "lm_head"]


def units(config: dict[str, Any], words: tuple[str, ...] = (), patched: bool = False) -> list[str]:
    """Names of the modules that fully_shard was called on, the root left out."""
    forward = LlamaForCausalLM.forward
    try:
        if patched:  # as packages do that put a fused loss into it
            LlamaForCausalLM.forward = lambda *args, **options: forward(*args, **options)
        model = instantiate(composed(FP32, *words, model={"config": config}))[1]
    finally:
        LlamaForCausalLM.forward = forward
    return [name for name, module in model.named_modules() if name and isinstance(module, FSDPModule)]


@pytest.mark.parametrize(
    "change, apart",
    [
        ({}, True),
        ({"vocab_size": 4095}, False),
        ({"vocab_size": 8192, "tie_word_embeddings": True}, False),
    ],
    ids=["large", "small", "tied"],
)
def test_a_large_embedding_and_head_are_units(change: dict[str, Any], apart: bool) -> None:
    found = run_ranks(2, units, {**WIDE, **change})[0]
    assert sorted(found) == sorted([*BLOCKS, *(APART if apart else [])])


def test_a_forward_of_somebody_else_keeps_them_in_the_root() -> None:
    """It may use the head's weight without calling the head, and then only the root gathers it."""
    assert run_ranks(2, units, WIDE, (), True)[0] == BLOCKS


def whole_after_forward(value: str) -> tuple[dict[str, bool], int]:
    """Which parts are whole after forward; how many gathers backward makes."""
    model = instantiate(composed(FP32, f"strategy.reshard_after_forward={value}", model={"config": WIDE}))[1]
    loss = loss_sum(model, *batch())
    parts = {"embedding": model.model.embed_tokens, "norm": model.model.norm, "head": model.lm_head}
    found = {name: not isinstance(module.weight, DTensor) for name, module in parts.items()}
    with Operators() as operators:
        loss.backward()
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())
    return found, operators.count("allgather")


@pytest.mark.parametrize(
    "value, embedding, head, gathers",
    # null: two blocks again; true: three blocks and the head; the embedding never.
    [("null", False, True, 2), ("true", False, False, 4), ("false", True, True, 0)],
)
def test_backward_does_not_gather_the_embedding(value: str, embedding: bool, head: bool, gathers: int) -> None:
    for found, count in run_ranks(2, whole_after_forward, value):
        assert found == {"embedding": embedding, "norm": head, "head": head}
        assert count == gathers


def warned(words: tuple[str, ...], viewed: bool = False) -> list[str]:
    """What a step with these words warns of. viewed: the embedding returns a view of what it found, of itself."""
    given = None
    if viewed:
        given = LlamaForCausalLM(LlamaConfig(**WIDE))
        given.get_input_embeddings().register_forward_hook(lambda module, args, output: output.view_as(output))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        model = instantiate(composed(FP32, *words, model=None if viewed else {"config": WIDE}), given)[1]
        loss_sum(model, *batch()).backward()
    return [str(warning.message) for warning in told]


@pytest.mark.parametrize("words", [(), ("strategy.sequence_parallel=true",)], ids=["tp", "sp"])
def test_parts_that_are_views_are_no_reason_to_warn(words: tuple[str, ...]) -> None:
    """With tensor parallelism the outputs of embedding and head are views of DTensors, and are not written into."""
    assert run_ranks(4, warned, ("parallelism.tp_size=2", *words)) == [[]] * 4


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older torch does not warn of views")
def test_a_view_for_another_reason_is_warned_of() -> None:
    for (told,) in run_ranks(2, warned, (), True):
        assert "FSDPEmbedding) returned a view tensor" in told
