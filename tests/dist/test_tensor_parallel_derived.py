"""Models that bring no tensor-parallel plan are split by what their blocks show, and compute what one process does."""

from __future__ import annotations

import functools
from typing import Any, Callable
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from nemo_dist_conf.gradients import clip_grad_norm_
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.runtime.techniques.tensor import parallel
from tests.dist.layouts import composed, full_tensor
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist

WORDS = ("strategy.mp_policy=null", "parallelism.tp_size=2")
SGD: dict[str, Any] = {"name": "sgd", "lr": 0.1, "momentum": 0.9}
VOCABULARY = 64
BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
DECODER: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}
NO_DROPOUT: dict[str, Any] = {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
T5: dict[str, Any] = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_heads": 4, "num_layers": 2, "dropout_rate": 0.0}
WHISPER: dict[str, Any] = {
    **{"vocab_size": VOCABULARY, "num_mel_bins": 8, "d_model": 32, "max_source_positions": 10, "pad_token_id": 0},
    **{f"{side}_layers": 2 for side in ("encoder", "decoder")},
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
    **{f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")},
    **{"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3},
}


def of_transformers(auto: str, family: str, **config: Any) -> nn.Module:
    import transformers

    torch.manual_seed(7)
    made = transformers.AutoConfig.for_model(family, **config)
    model = getattr(transformers, auto).from_config(made, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        with torch.no_grad():
            parameter.mul_(2.0 if parameter.dim() > 1 else 1.0)  # so that scores, biases of heads and norms matter
            if name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    return model.train()


def ids(seed: int, columns: int = 9) -> Tensor:
    return torch.randint(4, VOCABULARY, (4, columns), generator=torch.Generator().manual_seed(seed))


def causal(seed: int) -> dict[str, Tensor]:
    return {"input_ids": ids(seed), "labels": ids(seed)}


def classified(seed: int) -> dict[str, Tensor]:
    return {"input_ids": ids(seed), "labels": torch.arange(4) % 2}


def seen(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(4, 3, 16, 16, generator=generator), "labels": torch.arange(4) % 2}


def translated(seed: int) -> dict[str, Tensor]:
    return {"input_ids": ids(seed), "labels": ids(seed + 1, 5)}


def heard(seed: int) -> dict[str, Tensor]:
    spectrum = torch.randn(4, 8, 20, generator=torch.Generator().manual_seed(seed))
    return {"input_features": spectrum, "labels": ids(seed, 5)}


Batches = Callable[[int], dict[str, Tensor]]

#: name -> (model, batches, the style of some of its modules)
MODELS: dict[str, tuple[Callable[[], nn.Module], Batches, dict[str, str]]] = {
    "bert": (
        functools.partial(of_transformers, "AutoModelForSequenceClassification", "bert", **BERT),
        classified,
        {
            "bert.embeddings.word_embeddings": "embedding_rowwise",
            "bert.encoder.layer.1.attention.self.value": "colwise",
            "bert.encoder.layer.1.attention.output.dense": "rowwise",
            "bert.encoder.layer.1.output.dense": "rowwise",
        },
    ),
    "vit": (
        functools.partial(
            of_transformers,
            "AutoModelForImageClassification",
            "vit",
            **{**BERT, "image_size": 16, "patch_size": 4},
        ),
        seen,
        {},
    ),
    # Biases of the scores by distance, made in the first block for all of them.
    "t5": (
        functools.partial(
            of_transformers, "AutoModelForSeq2SeqLM", "t5", vocab_size=VOCABULARY, decoder_start_token_id=0, **T5
        ),
        translated,
        {
            "encoder.block.0.layer.0.SelfAttention.relative_attention_bias": "colwise",
            "decoder.block.1.layer.1.EncDecAttention.o": "rowwise",
            "decoder.block.1.layer.2.DenseReluDense.wi": "colwise",
        },
    ),
    "whisper": (
        functools.partial(of_transformers, "AutoModelForSpeechSeq2Seq", "whisper", **WHISPER),
        heard,
        {"model.decoder.layers.1.encoder_attn.v_proj": "colwise", "model.encoder.layers.0.fc2": "rowwise"},
    ),
    # Weights that are [input, output], query, key and value in one.
    "gpt2": (
        functools.partial(of_transformers, "AutoModelForCausalLM", "gpt2", **DECODER, **NO_DROPOUT),
        causal,
        {
            "transformer.h.1.attn": "split_heads",
            "transformer.h.1.attn.c_attn": "packed_qkv_colwise",
            "transformer.h.1.mlp.c_fc": "colwise",
            "transformer.h.1.mlp.c_proj": "rowwise",
        },
    ),
    # Heads counted by attributes, with a slope for each of them in what the attention is given.
    "bloom": (
        functools.partial(of_transformers, "AutoModelForCausalLM", "bloom", **DECODER),
        causal,
        {
            "transformer.h.0.self_attention": "split_heads",
            "transformer.h.0.self_attention.query_key_value": "colwise",
        },
    ),
    # A norm over all heads before the closing layer takes what every rank has made.
    "bitnet": (
        functools.partial(of_transformers, "AutoModelForCausalLM", "bitnet", **{**BERT, "num_key_value_heads": 2}),
        causal,
        {
            "model.layers.0.self_attn.q_proj": "colwise_gather_output",
            "model.layers.0.mlp.up_proj": "colwise_gather_output",
        },
    ),
}


def trained(model: Any, optimizer: torch.optim.Optimizer, batches: Batches, clip: Any) -> list[float]:
    """Loss and norm of each of three steps."""
    found: list[float] = []
    for step in range(3):
        loss = model(**batches(step)).loss
        loss.backward()
        found += [float(loss.detach()), float(clip(model, 0.5))]
        optimizer.step()
        optimizer.zero_grad()
    return found


def on_ranks(name: str) -> tuple[list[float], dict[str, Tensor], dict[str, str]]:
    """(losses and norms, weights, style of each module)."""
    make, batches, _ = MODELS[name]
    with mock.patch.object(parallel, "apply_styles", side_effect=parallel.apply_styles) as applied:
        _, model, optimizer = instantiate(composed(*WORDS, optimizer=SGD), model=make())
    steps = trained(model, optimizer, batches, clip_grad_norm_)
    weights = {key: full_tensor(p.detach()) for key, p in model.named_parameters()}
    return steps, weights, dict(applied.call_args.args[1])


@pytest.mark.parametrize("name", MODELS)
def test_a_model_without_a_plan_trains_as_in_one_process(name: str) -> None:
    make, batches, wanted = MODELS[name]
    plain = make()
    optimizer = torch.optim.SGD(plain.parameters(), lr=SGD["lr"], momentum=SGD["momentum"])
    expected = trained(plain, optimizer, batches, lambda m, norm: nn.utils.clip_grad_norm_(m.parameters(), norm))
    for steps, weights, styles in run_ranks(2, on_ranks, name):
        assert steps == pytest.approx(expected, rel=2e-5)
        for key, value in plain.named_parameters():
            assert float((weights[key] - value.detach()).norm()) <= 2e-4 * float(value.norm()) + 1e-6, key
        assert {module: styles.get(module) for module in wanted} == wanted
