"""Models of many families with their rows split over cp ranks: equal to one process, or refused with the reason.

Weights are scaled up, so that sinks, soft caps, windows and documents matter to the loss and its gradients.
"""

from __future__ import annotations

import functools
import hashlib
import math
from typing import Any, Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conformance.case import Case
from tests.dist.cuda_shim import cuda_shim
from tests.dist.layouts import SGD, composed, full_gradients
from tests.dist.pool import run_ranks

__all__ = ["CASES", "SMALL", "built", "compared", "documents"]

AREA = "Rows split over ranks"
ROWS, TOKENS, VOCABULARY, STEPS = 2, 32, 97, 3
OPTIMIZER: dict[str, Any] = {"lr": 0.02, "momentum": 0.9}
CAUSAL, MASKED = "AutoModelForCausalLM", "AutoModelForMaskedLM"

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "use_cache": False,
    **dict.fromkeys(("attention_dropout", "dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop", "activation_dropout", "residual_dropout"), 0.0),
}


def built(family: str, config: dict[str, Any], kind: str = CAUSAL) -> nn.Module:
    """As transformers builds it, with larger weights, the same in every process."""
    import transformers

    fields = {key: value for key, value in {**SMALL, **config}.items() if value is not None}
    config_of = transformers.AutoConfig.for_model(family, **fields)
    maker = getattr(transformers, kind)
    model = maker.from_config(config_of) if kind.startswith("Auto") else maker(config_of)
    enlarge(model)
    return model


def enlarge(model: nn.Module) -> None:
    """Weights of a spread at which scores are of the size of 1; each depends on its name only."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big"))
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(drawn if id(parameter) in tables else drawn * 0.8 / math.sqrt(parameter.size(-1)))
            else:
                parameter.copy_(1 + 0.1 * drawn if name.endswith("weight") else 0.5 * drawn)


def batch() -> tuple[Tensor, Tensor]:
    ids_BT = torch.randint(3, VOCABULARY, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    return ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous()


def documents(*rows: tuple[int, ...]) -> Tensor:
    """Position ids of rows that were packed of documents of so many tokens."""
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in rows])


def trained(
    model: nn.Module, optimizer: Any, ids: Tensor, labels: Tensor, scale: float, more: dict[str, Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """(loss of every step, gradients of the first) of this rank's part."""
    losses, first = [], {}
    for step in range(STEPS):
        output = model(ids, **more)
        logits = getattr(output, "logits", output)
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum") / (ROWS * TOKENS)
        (loss * scale).backward()
        if step == 0:
            first = full_gradients(model)
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return losses, first


def compared(make: Callable[[], nn.Module], words: tuple[str, ...] = (), positions: Tensor | None = None) -> float:
    """On a rank: the worst relative difference of losses and of the first gradients from plain torch on whole rows."""
    from nemo_dist_conf import instantiate

    ids, labels = batch()
    more = {} if positions is None else {"position_ids": positions}
    plain = make().train()
    wanted, expected = trained(plain, torch.optim.SGD(plain.parameters(), **OPTIMIZER), ids, labels, 1.0, more)
    cfg = composed("parallelism.cp_size=2", *words, optimizer={**SGD, **OPTIMIZER})
    setup, model, optimizer = instantiate(cfg, model=make().train())
    mesh = setup.mesh_context
    rows = slice(mesh.data_rank * ROWS // mesh.data_size, (mesh.data_rank + 1) * ROWS // mesh.data_size)
    more = {name: mesh.split_sequence(value[rows])[0] for name, value in more.items()}
    ids, labels = mesh.split_sequence(ids[rows], labels[rows])
    found, gradients = trained(model, optimizer, ids, labels, mesh.gradient_size, more)
    sums = [mesh.sum_over_data(loss.double()) for loss in found]
    worst = max(float(abs(one - other) / abs(other)) for one, other in zip(sums, wanted))
    if "strategy=megatron_fsdp" in words:  # its gradients are flat pieces; the losses of later steps show them
        return worst
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        apart = float((gradients[name] - gradient).norm())
        worst = max(worst, apart / max(float(gradient.norm()), 1e-3 * largest))
    return worst


FP32 = ("strategy.mp_policy=null",)


def family(
    name: str,
    config: dict[str, Any],
    kind: str = CAUSAL,
    *,
    ranks: int = 2,
    words: tuple[str, ...] = FP32,
    positions: Tensor | None = None,
) -> float:
    return max(run_ranks(ranks, compared, functools.partial(built, name, config, kind), words, positions))


def wrapped(name: str, config: dict[str, Any], kind: str) -> float:
    """Whether it is let through at all."""
    return max(run_ranks(2, wrapped_on_rank, functools.partial(built, name, config, kind)))


def wrapped_on_rank(make: Callable[[], nn.Module]) -> float:
    from nemo_dist_conf import instantiate

    instantiate(composed("parallelism.cp_size=2", *FP32), model=make())
    return 0.0


def on_megatron(make: Callable[[], nn.Module], *words: str) -> float:
    with cuda_shim():
        return compared(make, ("strategy=megatron_fsdp", "strategy.preserve_fp32_weights=true", *words))


GPT_OSS = {"num_local_experts": 4, "sliding_window": 5}
LLAMA4 = {"attention_chunk_size": 8, "num_local_experts": 4, "intermediate_size_mlp": 48}
LATENT = {
    **dict.fromkeys(("head_dim", "_"), None),
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 2,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2}
GPT = {"n_embd": 32, "n_head": 4, "n_layer": 4, "n_positions": 64}
DELTA = dict(zip(("linear_num_value_heads", "linear_num_key_heads"), (4, 2))) | {
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LONG = {
    "original_max_position_embeddings": 26,
    "rope_parameters": {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0] * 4,
        "long_factor": [4.0, 5.0, 6.0, 7.0],
        "original_max_position_embeddings": 26,
    },
}
DYNAMIC = {
    "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0},
    "max_position_embeddings": 26,
}
UNTIED = {"tie_word_embeddings": False}

#: what is brought -> (family, its config, the class that builds it); in the suite: one for every mechanism.
EQUAL_IN_SUITE: dict[str, tuple[str, dict[str, Any], str]] = {
    "mistral, a window": ("mistral", {"sliding_window": 5}, CAUSAL),
    "mixtral": ("mixtral", EXPERTS, CAUSAL),
    "qwen2, windows in some layers": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},
        CAUSAL,
    ),
    "qwen3, norms of queries and keys": ("qwen3", {}, CAUSAL),
    "qwen3_moe": ("qwen3_moe", EXPERTS, CAUSAL),
    "gpt_oss, sinks": ("gpt_oss", GPT_OSS, CAUSAL),
    "gemma2, soft caps": (
        "gemma2",
        {"sliding_window": 5, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 3.0},
        CAUSAL,
    ),
    "llama4, chunks, positions counted in a layer": (
        "llama4_text",
        {**LLAMA4, "floor_scale": 4, "attn_scale": 0.5},
        CAUSAL,
    ),
    "deepseek_v3, values narrower than keys": ("deepseek_v3", LATENT, CAUSAL),
    "bert, sees both ways": ("bert", UNTIED, MASKED),
    "llama, frequencies that depend on the length": ("llama", DYNAMIC, CAUSAL),
}
EQUAL: dict[str, tuple[str, dict[str, Any], str]] = {
    **{name: (name, {}, CAUSAL) for name in ("apertus", "arcee", "bitnet", "cohere", "ernie4_5", "gemma", "glm")},
    **{name: (name, {}, CAUSAL) for name in ("gpt_neox", "granite", "helium", "hunyuan_v1_dense", "internlm3")},
    **{name: (name, {}, CAUSAL) for name in ("nanochat", "nemotron", "olmo", "olmo2", "persimmon", "phi", "smollm3")},
    **{name: (name, {}, CAUSAL) for name in ("biogpt", "diffllama", "glm4", "jais2", "stablelm")},
    **{name: (name, {"sliding_window": 5}, CAUSAL) for name in ("cohere2", "cwm", "exaone4", "gemma3_text", "laguna")},
    **{name: (name, {"sliding_window": 5}, CAUSAL) for name in ("ministral", "ministral3", "olmo3", "starcoder2")},
    **{name: (name, EXPERTS, CAUSAL) for name in ("granitemoe", "minimax_m2", "olmoe", "qwen2_moe")},
    **{name: (name, GPT, CAUSAL) for name in ("gpt2", "gpt_bigcode")},
    "ctrl": ("ctrl", {"n_embd": 32, "n_layer": 4, "n_head": 4, "dff": 48}, CAUSAL),
    "deepseek_v2": ("deepseek_v2", LATENT, CAUSAL),
    "distilbert": (
        "distilbert",
        {"dim": 32, "hidden_dim": 48, "n_heads": 4, "n_layers": 4, **UNTIED},
        MASKED,
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_num_experts": 4, "moe_intermediate_size": 16, "moe_k": 2},
        CAUSAL,
    ),
    "gemma3n_text": (
        "gemma3n_text",
        {
            "num_kv_shared_layers": 2,
            "intermediate_size": [48] * 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": 5,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "altup_num_inputs": 2,
        },
        CAUSAL,
    ),
    "modernbert, windows both ways": (
        "modernbert",
        {"local_attention": 8, "embedding_dropout": 0.0, **UNTIED},
        MASKED,
    ),
    "nemotron_h, attention alone": (
        "nemotron_h",
        {"hybrid_override_pattern": "*-*-", "num_hidden_layers": None},
        CAUSAL,
    ),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, CAUSAL),
    "phi3, frequencies for long rows": ("phi3", {**LONG, "head_dim": None}, CAUSAL),
}
#: Families with modules that are run on whole rows, or that count what is no padding.
WHOLE_ROWS_IN_SUITE: dict[str, tuple[str, dict[str, Any], str]] = {
    "falcon, attention of its own": ("falcon", {"head_dim": None}, CAUSAL),
    "mamba": ("mamba", {"state_size": 8}, CAUSAL),
    "roberta, counts what is no padding": ("roberta", {"is_decoder": True, "num_hidden_layers": 2, **UNTIED}, CAUSAL),
}
WHOLE_ROWS: dict[str, tuple[str, dict[str, Any], str]] = {
    "bamba": (
        "bamba",
        {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [2], "mamba_d_state": 8, "mamba_chunk_size": 8},
        CAUSAL,
    ),
    "bloom": ("bloom", {"n_head": 4, "n_layer": 4}, CAUSAL),
    "codegen": ("codegen", {**GPT, "rotary_dim": 4, "n_ctx": 64}, CAUSAL),
    "falcon_h1": (
        "falcon_h1",
        {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8},
        CAUSAL,
    ),
    "gpt_neo": (
        "gpt_neo",
        {"num_layers": 4, "num_heads": 4, "attention_types": [[["global", "local"], 2]], "window_size": 4},
        CAUSAL,
    ),
    "gptj": ("gptj", {**GPT, "rotary_dim": 4}, CAUSAL),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **EXPERTS,
            "layer_types": ["mamba", "attention"] * 2,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 8,
        },
        CAUSAL,
    ),
    "jamba": (
        "jamba",
        {"num_experts": 4, "use_mamba_kernels": False, "mamba_d_state": 8, "mamba_dt_rank": 4},
        CAUSAL,
    ),
    "lfm2": ("lfm2", {"layer_types": ["conv", "full_attention"] * 2}, CAUSAL),
    "mamba2": (
        "mamba2",
        {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1, "chunk_size": 8},
        CAUSAL,
    ),
    "minimax": ("minimax", {"num_local_experts": 4, "block_size": 8}, CAUSAL),
    "mpt": ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 4}, CAUSAL),
    "nemotron_h": (
        "nemotron_h",
        {
            "mamba_num_heads": 4,
            "mamba_head_dim": 16,
            "ssm_state_size": 8,
            "n_groups": 2,
            "hybrid_override_pattern": "M-M*",
            "chunk_size": 8,
            "num_hidden_layers": None,
        },
        CAUSAL,
    ),
    "qwen3_5_text": ("qwen3_5_text", DELTA, CAUSAL),
    "qwen3_next": (
        "qwen3_next",
        {**EXPERTS, **DELTA, "shared_expert_intermediate_size": 16},
        CAUSAL,
    ),
    "recurrent_gemma": (
        "recurrent_gemma",
        {"lru_width": 32, "attention_window_size": 5},
        CAUSAL,
    ),
    "rwkv, token shift": ("rwkv", {"attention_hidden_size": 32}, CAUSAL),
    "xglm": ("xglm", {"d_model": 32, "attention_heads": 4, "num_layers": 4, "ffn_dim": 48}, CAUSAL),
    "zamba2": (
        "zamba2",
        {
            "mamba_d_state": 8,
            "n_mamba_heads": 4,
            "mamba_headdim": 16,
            "chunk_size": 8,
            "attention_head_dim": 8,
            "layers_block_type": ["mamba", "hybrid"] * 2,
            "head_dim": None,
        },
        CAUSAL,
    ),
}
#: what is brought -> (family, its config, the class that builds it, text of the refusal)
REFUSED_KINDS: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "bert, the first token of a row pooled": ("bert", {}, "AutoModel", "BertPooler) computes something else"),
    "llama, a class for a row": ("llama", {}, "AutoModelForSequenceClassification", "returns nothing for each"),
    "falcon, alibi": ("falcon", {"head_dim": None, "alibi": True}, CAUSAL, "FalconAttention) mixes the tokens"),
}
#: Not a causal language model, and let through.
T5_ENCODER = ("t5", {"d_model": 32, "d_kv": 8, "num_heads": 4, "num_layers": 2, "d_ff": 48, "num_hidden_layers": None})
PACKED = documents((5, 9, 11, 7), (TOKENS,))
PACKED_TOO: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 1.0},
    "gpt2": GPT,
    "llama4_text": LLAMA4,
    "mistral": {"sliding_window": 5},
}


def _equal(name: str, row: tuple[str, dict[str, Any], str], in_suite: bool, positions: Tensor | None = None) -> Case:
    return Case(AREA, name, "cp 2", functools.partial(family, *row, positions=positions), in_suite=in_suite)


CASES: list[Case] = [
    *(_equal(name, row, True) for name, row in EQUAL_IN_SUITE.items()),
    *(_equal(name, row, False) for name, row in EQUAL.items()),
    *(_equal(name, row, True) for name, row in WHOLE_ROWS_IN_SUITE.items()),
    *(_equal(name, row, False) for name, row in WHOLE_ROWS.items()),
    Case(
        AREA,
        "gpt_oss, packed rows",
        "cp 2 x dp 2, full checkpointing",
        functools.partial(
            family, "gpt_oss", GPT_OSS, ranks=4, words=(*FP32, "activation_checkpointing=true"), positions=PACKED
        ),
    ),
    *(
        Case(AREA, name, "cp 2", functools.partial(wrapped, *row[:3]), refused=row[3], in_suite=False)
        for name, row in REFUSED_KINDS.items()
    ),
    Case(
        AREA,
        "t5's encoder, a bias for pairs of tokens",
        "cp 2",
        functools.partial(wrapped, *T5_ENCODER, "T5EncoderModel"),
        in_suite=False,
    ),
    _equal("llama, packed rows", ("llama", {}, CAUSAL), True, PACKED),
    *(_equal(f"{name}, packed rows", (name, config, CAUSAL), False, PACKED) for name, config in PACKED_TOO.items()),
    Case(
        AREA,
        "gemma2, soft caps",
        "megatron_fsdp, cp 2",
        lambda: max(run_ranks(2, on_megatron, functools.partial(built, *EQUAL_IN_SUITE["gemma2, soft caps"]))),
    ),
]
