"""The group ``recompute`` on real ranks: the same numbers as one process, and what runs twice is what was asked for."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch
from torch import nn

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.gradients import accumulate
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.runtime.engines.base import engine_of
from nemo_dist_conf.runtime.engines.pipeline_model import Pipeline
from nemo_dist_conf.runtime.model.blocks import find_blocks
from tests.dist.kinds import KINDS
from tests.dist.layouts import ROWS, SGD, composed, loss_sum
from tests.dist.pool import run_ranks
from tests.zoo.axes import AXES, Axis
from tests.zoo.cell import LENGTH, measure, model_of

pytestmark = pytest.mark.dist

FULL, SELECTIVE = "activation_checkpointing=true", "activation_checkpointing=selective"
EVERY, MLP, ATTENTION = "recompute.every=2", "recompute.modules=[mlp]", "recompute.modules=[self_attn,layers.0]"


def axis(name: str, *words: str) -> Axis:
    return dataclasses.replace(AXES[name], words=(*AXES[name].words, *words))


#: (family, axis of the zoo, what is asked of recomputation)
CASES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("llama", "tp+sp", (FULL, ATTENTION)),
    ("llama", "cp", (FULL, ATTENTION)),
    ("llama", "pp", (FULL, EVERY, MLP, "pipeline=zbv_zero_bubble")),
    ("llama", "megatron", (FULL, ATTENTION)),
    ("qwen3_moe", "ep", (FULL, MLP)),
)


@pytest.mark.parametrize(("family", "name", "words"), CASES, ids=[f"{case[1]}, {case[2][-1]}" for case in CASES])
def test_equals_one_process(family: str, name: str, words: tuple[str, ...]) -> None:
    outcome = measure(family, axis(name, *words))
    assert outcome.kind == "equal", outcome


#: Of four layers: what is asked -> what runs twice, whole blocks told by what is in them.
WHOLE = {"self_attn", "self_attn.q_proj", "mlp", "mlp.up_proj"}
TWICE: dict[tuple[str, tuple[str, ...]], dict[int, set[str]]] = {
    ("dp", (FULL,)): dict.fromkeys(range(4), WHOLE),
    ("dp", (FULL, EVERY)): {0: WHOLE, 2: WHOLE},
    ("fsdp2", (SELECTIVE, ATTENTION)): {0: WHOLE, **dict.fromkeys((1, 2, 3), {"self_attn.q_proj"})},
    ("pp", (FULL, EVERY, MLP)): dict.fromkeys((0, 2), {"mlp.up_proj"}),
}


@pytest.mark.parametrize(("name", "words"), TWICE, ids=lambda value: str(value))
def test_what_is_asked_for_runs_twice_and_the_rest_once(name: str, words: tuple[str, ...]) -> None:
    found: dict[str, int] = {}
    for seen in run_ranks(2, runs_of, axis(name, *words)):
        found |= seen
    twice = {f"layers.{layer}.{part}" for layer, parts in TWICE[name, words].items() for part in parts}
    every = {f"layers.{layer}.{part}" for layer in range(4) for part in WHOLE}
    assert found == {part: 2 if part in twice else 1 for part in every}


def runs_of(chosen: Axis) -> dict[str, int]:
    """On a rank: how often each part of a block ran in one microbatch's forward and backward."""
    seen: Counter[str] = Counter()
    with chosen.around():
        setup, model, _ = instantiate(composed(*chosen.words, optimizer=SGD), model=model_of("llama"))
        for part in engine_of(model).parts(model):
            for name, module in part.named_modules():
                if name.endswith(tuple(WHOLE)):
                    place = name[name.index("layers.") :]
                    module.register_forward_pre_hook(lambda *_, place=place: seen.update([place]))
        ids = torch.randint(90, (ROWS // setup.mesh_context.data_size, LENGTH))
        if isinstance(model, Pipeline):
            model.step(ids, ids, 1.0)
        else:
            with accumulate(model, last=True):
                loss_sum(model, ids, ids).backward()
    microbatches = model.microbatches if isinstance(model, Pipeline) else 1
    return {place: count // microbatches for place, count in seen.items()}


def of_kind(kind: str, *words: str) -> list[str]:
    """On a rank: the blocks of a kind of model whose first part ran twice in a step."""
    made, batch = KINDS[kind]()
    model = instantiate(composed("strategy.mp_policy=null", FULL, *words), made)[1]
    seen: Counter[str] = Counter()
    for name, block in find_blocks(made).items():
        leaf = next(module for module in block.modules() if isinstance(module, (nn.Linear, nn.Conv2d)))
        leaf.register_forward_pre_hook(lambda *_, name=name: seen.update([name]))
    output = model(**batch)
    (output if torch.is_tensor(output) else output["loss"]).sum().backward()
    return [name for name, count in seen.items() if count == 2]


SCOPES: dict[tuple[str, str], list[str]] = {
    ("qwen2_5_vl", "vision"): ["model.visual.blocks.0", "model.visual.blocks.1"],
    ("qwen2_5_vl", "language"): ["model.language_model.layers.0", "model.language_model.layers.1"],
    ("whisper_for_speech", "audio"): ["model.encoder.layers.0", "model.encoder.layers.1"],
    ("t5", "decoder"): ["decoder.block.0", "decoder.block.1"],
    ("several_lists", "encoder"): ["encoder.0", "encoder.1"],
}


@pytest.mark.parametrize(("kind", "scope"), SCOPES)
def test_a_scope_is_the_blocks_of_its_towers(kind: str, scope: str) -> None:
    assert run_ranks(1, of_kind, kind, f"recompute.scope={scope}") == [SCOPES[kind, scope]]


@pytest.mark.parametrize(
    ("words", "best"),
    [
        (("recompute.scope=audio",), "recompute.scope=all"),
        (("recompute.scope=visul",), "recompute.scope=model.visual"),
        (("recompute.modules=[qkv,mlpp]",), "'recompute.modules=[qkv,mlp]'"),
        (("recompute.scope=vision", "recompute.modules=[self_attn]"), "'recompute.modules=[attn]'"),
    ],
)
def test_what_the_model_has_not_is_refused_with_what_it_has(words: tuple[str, ...], best: str) -> None:
    with pytest.raises(ConfigError) as caught:
        run_ranks(1, of_kind, "qwen2_5_vl", *words)
    assert caught.value.instead == best, caught.value
