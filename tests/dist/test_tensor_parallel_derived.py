"""Models that bring no tensor-parallel plan are split by what their blocks show, and compute what one process does."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Callable
from unittest import mock

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from nemo_dist_conf.checkpoint import load, save
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.gradients import clip_grad_norm_
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.runtime.model.trial import tensors_of
from nemo_dist_conf.runtime.techniques.tensor import parallel
from nemo_dist_conf.runtime.techniques.tensor.derived_plan import likely_plan
from tests.dist.layouts import composed, full_state, full_tensor
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
    # Norms that every head shares, behind the split layers.
    "hunyuan": (
        functools.partial(
            of_transformers,
            "AutoModelForCausalLM",
            "hunyuan_v1_dense",
            **{**BERT, "num_key_value_heads": 2, "head_dim": 8, "attention_dropout": 0.0},
        ),
        causal,
        {
            "model.layers.0.self_attn.q_proj": "colwise",
            "model.layers.0.self_attn.query_layernorm": "replicated_with_grad_allreduce",
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
            assert float((weights[key] - value.detach()).norm()) <= 2e-4 * float(value.detach().norm()) + 1e-6, key
        assert {module: styles.get(module) for module in wanted} == wanted


def saved(folder: Path) -> dict[str, Tensor]:
    _, model, _ = instantiate(composed(*WORDS), model=MODELS["gpt2"][0]())
    save(folder, model)
    return full_state(model)


def loaded(words: tuple[str, ...], folder: Path) -> dict[str, Tensor]:
    model = MODELS["gpt2"][0]()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    _, model, _ = instantiate(composed(*words), model=model)
    load(folder, model)
    return full_state(model)


def test_a_checkpoint_of_three_weights_in_one_that_is_turned_loads_in_any_layout(tmp_path: Path) -> None:
    """Query, key and value of GPT-2, [input, output], on 4 ranks: split as three over two, sharded over two."""
    weights = run_ranks(4, saved, tmp_path / "gpt2")[0]
    wanted = dict(MODELS["gpt2"][0]().named_parameters())
    assert all(torch.equal(weights[name], value) for name, value in wanted.items())
    for ranks, words in ((1, WORDS[:1]), (2, WORDS)):
        found = run_ranks(ranks, loaded, words, tmp_path / "gpt2")[0]
        assert all(torch.equal(found[name], value) for name, value in wanted.items())


# Models of one's own, and in wrappers.


class Attention(nn.Module):
    """Counts its heads by attributes, and takes a bias of the scores for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.hidden_size = 4, 16
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, alibi: Tensor) -> Tensor:
        rows, length, _ = x.shape
        parts = self.qkv(x).split(self.hidden_size, dim=-1)
        q, k, v = (part.view(rows, length, self.num_heads, -1).transpose(1, 2) for part in parts)
        scores = (q @ k.transpose(-1, -2) + alibi).softmax(-1)
        return self.out((scores @ v).transpose(1, 2).reshape(rows, length, self.hidden_size))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, x: Tensor, alibi: Tensor) -> Tensor:
        x = x + self.attention(x, alibi=alibi)
        return x + self.mlp(x)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(VOCABULARY, 16)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, ids: Tensor) -> Tensor:
        distance = torch.arange(ids.size(1), device=ids.device).float()
        alibi = -(torch.arange(1.0, 5.0).view(1, 4, 1, 1) * (distance[:, None] - distance).abs())
        x = self.table(ids)
        for block in self.blocks:
            x = block(x, alibi)
        return x


def refusal(make: Callable[[], nn.Module]) -> str:
    with pytest.raises(ConfigError, match="no tensor-parallel plan is known") as refused:
        instantiate(composed(*WORDS), model=make())
    return refused.value.type


def given(make: Callable[[], nn.Module], word: str) -> tuple[float, dict[str, str]]:
    """(the largest difference of what it returns and what one process does, style of each module)."""
    plan = yaml.safe_load(word.partition("=")[2].rstrip("'").replace(":", ": ")) if word else None
    model, plain = make(), make()
    mesh = init_device_mesh("cpu", (2,))
    parallel.apply_tensor_parallel(model, mesh, plan=plan)
    one, other = (tensors_of(m.eval()(ids(0)))[0] for m in (model, plain))
    return float((one - other).abs().max() / other.abs().max()), dict(plan or {})


def test_a_model_of_ones_own_is_offered_what_was_found_in_its_blocks() -> None:
    word = run_ranks(2, refusal, Own)[0]
    for difference, plan in run_ranks(2, given, Own, word):
        assert difference < 1e-5
        assert plan == {
            "blocks.*.attention.qkv": "packed_qkv_colwise",
            "blocks.*.attention.out": "rowwise",
            "blocks.*.attention": "split_heads",
            "blocks.*.mlp.1": "colwise",
            "blocks.*.mlp.3": "rowwise",
        }


def wrapped(adapter: str) -> nn.Module:
    peft = pytest.importorskip("peft")
    model = of_transformers("AutoModelForCausalLM", "llama", **{**BERT, "num_key_value_heads": 2})
    if adapter == "prompt":
        return peft.get_peft_model(model, peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))
    if adapter == "lora":
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    config = peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[], init_ia3_weights=False)
    return peft.get_peft_model(model, config)


def test_a_model_in_a_wrapper_keeps_its_familys_plan_and_adapted_layers_are_told() -> None:
    prompt, lora, ia3 = (functools.partial(seeded, functools.partial(wrapped, a)) for a in ("prompt", "lora", "ia3"))
    for known in (prompt, lora):
        assert all(difference < 1e-5 for difference, _ in run_ranks(2, given, known, ""))
    word = run_ranks(2, refusal, ia3)[0]
    assert all(difference < 1e-5 and "base_layer" in str(plan) for difference, plan in run_ranks(2, given, ia3, word))


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(5)
    return make()


def test_a_plan_on_paper_begins_with_the_way_of_least_traffic() -> None:
    with torch.device("meta"):
        model = MODELS["gpt2"][0]()
    assert likely_plan(model) == {
        "transformer.h.*.attn.c_attn": "colwise",
        "transformer.h.*.attn.c_proj": "rowwise",
        "transformer.h.*.mlp.c_fc": "colwise",
        "transformer.h.*.mlp.c_proj": "rowwise",
        "transformer.wte": "embedding_rowwise",
        "lm_head": "colwise_gather_output",
    }
    assert all(parameter.is_meta for parameter in model.parameters())
