"""What is frozen has no gradients, no states and no reductions in a plan (measured in tests/dist/test_trainable.py)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.families.shapes import ModelShape
from nemo_dist_conf.plan.from_config import untrained_of
from nemo_dist_conf.plan.memory import memory_of
from nemo_dist_conf.plan.plan import make_plan
from nemo_dist_conf.plan.rank_shards import Place
from nemo_dist_conf.plan.traffic import traffic_of
from tests.dist.cuda_shim import cuda_shim
from tests.dist.layouts import ADAMW, LLAMA
from tests.plan.measure import job_for, shape_for

HEAD = {"freeze": [], "train": "lm_head"}
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 97}


def bytes_reduced(words: list[str], trainable: dict[str, Any] | None = None) -> int:
    with cuda_shim():
        job = job_for(words, 2, LLAMA, ADAMW, 4, 16, trainable)
    return sum(one.calls * one.size for one in traffic_of(job, 0) if one.kind in ("all_reduce", "reduce_scatter"))


@pytest.mark.parametrize(
    "words",
    [["strategy=ddp"], ["strategy=fsdp2", "strategy.mp_policy=null"]]
    + [["strategy=megatron_fsdp", f"strategy.zero_dp_strategy={zero}"] for zero in (0, 1, 3)],
)
def test_only_what_is_trained_is_reduced(words: list[str]) -> None:
    head = 4 * LLAMA["vocab_size"] * LLAMA["hidden_size"]
    padded = head + 4 * LLAMA["hidden_size"]
    assert bytes_reduced(words, HEAD) in (head, padded) and bytes_reduced(words) > 10 * head


def test_memory_of_the_update_is_of_what_is_trained_and_what_is_not_counted_is_said() -> None:
    job = job_for(["strategy=ddp"], 2, LLAMA, ADAMW, 4, 16, HEAD)
    whole, head = memory_of(replace(job, untrained=frozenset()), 0, Place()), memory_of(job, 0, Place())
    assert head.parameters == whole.parameters
    assert head.gradients * whole.parameters == whole.gradients * 4 * LLAMA["vocab_size"] * LLAMA["hidden_size"]
    assert head.peak < whole.peak - 2 * (whole.gradients - head.gradients)
    assert [note for note in make_plan(job).notes if note.startswith("trainable")] != []
    assert [note for note in make_plan(replace(job, untrained=frozenset())).notes if "trainable" in note] == []


def test_stages_send_no_gradients_of_a_frozen_tie() -> None:
    words, tied = ["parallelism.pp_size=2", "pipeline.pp_batch_size=4"], {**LLAMA, "tie_word_embeddings": True}
    for frozen, sends in (("lm_head", False), ("model.layers", True)):
        job = job_for(words, 2, tied, ADAMW, 4, 16, {"freeze": frozen, "train": []})
        assert any(one.why == "gradients of tied embeddings" for one in traffic_of(job, 0)) is sends


@pytest.mark.parametrize("config", [GPT2, {**LLAMA, "tie_word_embeddings": True}])
def test_a_tied_head_is_known_by_its_own_name(config: dict[str, Any]) -> None:
    shape = shape_for(config)
    embedding = "transformer.wte.weight" if config is GPT2 else "model.embed_tokens.weight"
    assert isinstance(shape, ModelShape) is (config is not GPT2)
    assert untrained_of({"freeze": "lm_head", "train": []}, shape) == {embedding}
    assert untrained_of({"freeze": [], "train": []}, shape) == frozenset()
    with pytest.raises(ConfigError, match="no parameter or module of the model is named lm_hed"):
        untrained_of({"freeze": ["lm_hed"], "train": []}, shape)
