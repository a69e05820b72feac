"""What a transformers config says about a model's shape, read without importing transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping

from nemo_dist_conf.typed_path import typed_path

__all__ = ["ModelFacts", "facts_from_config", "facts_from_folder", "fields_of"]


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a decoder; None where the config does not say.

    num_experts None: a dense model. balances_experts: it computes a loss for an even load of its experts.
    """

    model_type: str | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    vocab_size: int | None = None
    num_experts: int | None = None
    tied: bool = False
    balances_experts: bool = False


def facts_from_config(config: Mapping[str, Any]) -> ModelFacts:
    """Facts from the fields of a transformers config; what is absent stays unknown."""
    heads = _whole(config, "num_attention_heads", "n_head")
    return ModelFacts(
        model_type=config.get("model_type"),
        hidden_size=_whole(config, "hidden_size", "n_embd"),
        intermediate_size=_whole(config, "intermediate_size"),
        num_layers=_whole(config, "num_hidden_layers", "n_layer"),
        num_heads=heads,
        num_kv_heads=_whole(config, "num_key_value_heads") or heads,
        vocab_size=_whole(config, "vocab_size"),
        num_experts=_whole(config, "num_local_experts", "num_experts", "n_routed_experts"),
        tied=bool(config.get("tie_word_embeddings", False)),
        balances_experts=bool(config.get("output_router_logits", False)),
    )


def fields_of(config: Any) -> dict[str, Any]:
    """The fields of a transformers config object, which its own to_dict copies deeply."""
    return {**vars(config), "model_type": getattr(config, "model_type", None)}


def facts_from_folder(folder: str | Path) -> ModelFacts | None:
    """Facts from a checkpoint folder's config.json; None when there is no readable one (reported when it is loaded)."""
    try:
        config = json.loads((typed_path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts_from_config(config) if isinstance(config, dict) else None


def _whole(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
