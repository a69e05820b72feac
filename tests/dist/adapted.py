"""A tiny model with an adapter trained through the hook on any layout, and plain peft in one process beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from nemo_dist_conf.instantiate import instantiate
from tests.dist.layouts import SGD, VOCABULARY, composed, full_state, plain_model, take_plain_steps, take_steps

__all__ = ["FAMILIES", "Seen", "Settings", "beside_plain_peft", "trained"]

_COMMON = {"vocab_size": VOCABULARY, "use_cache": False}
_LLAMA = {
    **_COMMON,
    **{"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32},
}
_EXPERTS = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.0, "output_router_logits": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "tied": {**_LLAMA, "tie_word_embeddings": True},
    "qwen3": {**_LLAMA, "model_type": "qwen3", "head_dim": 8},
    "gpt2": {
        **_COMMON,
        **{"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32},
        **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    },
    "mixtral": {**_LLAMA, **_EXPERTS, "model_type": "mixtral", "num_local_experts": 4},
    "qwen3_moe": {
        **{**_LLAMA, **_EXPERTS, "model_type": "qwen3_moe", "head_dim": 8, "num_experts": 4},
        "moe_intermediate_size": 16,
    },
    "mamba": {
        **{**_COMMON, "model_type": "mamba", "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4},
    },
}


@dataclass(frozen=True)
class Settings:
    """What is asked of the group: values by field."""

    family: str
    adapter: dict[str, Any]


@dataclass
class Seen:
    losses: list[float]
    norms: list[float]
    before: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)


def trained(
    family: str, kind: str, words: tuple[str, ...], microbatches: int = 1, steps: int = 3, **fields: Any
) -> Seen:
    """Steps through the hook on this rank. fields: of the group."""
    cfg = composed(f"adapter={kind}", *words, model={"config": dict(FAMILIES[family])}, optimizer=SGD, seed=3)
    for name, value in fields.items():
        cfg.adapter[name] = value
    setup, model, optimizer = instantiate(cfg)
    before = full_state(model)
    seen = take_steps(setup, model, optimizer, microbatches, steps, False, 16)
    after = full_state(model)
    if dist.get_rank():
        before, after = {}, {}
    return Seen(seen.losses, seen.norms, before, after)


def beside_plain_peft(seen: Seen, family: str, kind: str, steps: int = 3, **fields: Any) -> dict[str, float]:
    """How far a run is from plain peft that begins with the same weights, by what is compared."""
    import peft

    targets = fields.get("targets", ["q_proj", "v_proj"])
    model = plain_model(FAMILIES[family])
    config = peft.LoraConfig(
        r=fields.get("rank", 8),
        lora_alpha=fields.get("alpha", 16),
        use_dora=kind == "dora",
        target_modules=targets if isinstance(targets, str) else list(targets),
        modules_to_save=fields.get("modules_to_save") or None,
    )
    wrapped: nn.Module = peft.get_peft_model(model, config)
    begin = {f"base_model.model.{name}": value for name, value in seen.before.items()}
    lacking = wrapped.load_state_dict(begin, strict=False)  # stages have one of two tied names
    assert not lacking.unexpected_keys and not any("layers" in name for name in lacking.missing_keys)
    plain = take_plain_steps(wrapped, SGD, steps, 16)
    after = {name.removeprefix("base_model.model."): value for name, value in wrapped.state_dict().items()}
    moved = max(float((after[name] - seen.before[name]).abs().max()) for name in seen.after)
    assert moved > 1e-3, "nothing was trained"
    pairs = list(zip(seen.losses, plain.losses)), list(zip(seen.norms, plain.norms))
    return {
        "losses": max(abs(a - b) / abs(b) for a, b in pairs[0]),
        "norms": max(abs(a - b) / abs(b) for a, b in pairs[1]),
        "weights": max(float((after[name] - seen.after[name]).abs().max()) for name in seen.after),
    }
