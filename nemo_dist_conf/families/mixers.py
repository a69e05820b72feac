"""What mixes the tokens of a row, family by family, as far as it is known without building a model."""

from __future__ import annotations

from typing import Any, Mapping

__all__ = ["EXCHANGED_FAMILIES", "own_mixer"]

#: Families of which tests prove that context parallelism computes what one process does; others are tried when they
#: are built. Tests: tests/dist/test_context_parallel.py.
EXCHANGED_FAMILIES = frozenset({"llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe"})

_ATTENTION = "an attention of its own, which does not go through transformers' registry"
_RECURRENT = "recurrent layers, which carry a state from token to token"

#: Families of transformers 5.23 all of whose models mix tokens otherwise than by an attention of the registry.
_ALWAYS = {
    **dict.fromkeys(("bloom", "codegen", "falcon", "gpt_neo", "gptj", "mpt", "xglm"), _ATTENTION),
    **dict.fromkeys(("falcon_h1", "falcon_mamba", "mamba", "mamba2", "olmo_hybrid", "rwkv", "xlstm"), _RECURRENT),
}
#: Families whose models do it unless their config says that every layer is an attention.
_BY_LAYER = frozenset(
    {
        "bamba",
        "granitemoehybrid",
        "jamba",
        "minimax",
        "nemotron_h",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_next",
        "recurrent_gemma",
        "zamba",
        "zamba2",
    }
)
#: Fields that choose the layers of such a model.
_CHOICES = (
    "attn_layer_indices",
    "attn_layer_offset",
    "attn_layer_period",
    "block_types",
    "full_attention_interval",
    "hybrid_override_pattern",
    "layer_types",
    "layers_block_type",
)
_RECURRENT_LAYERS = frozenset({"hybrid", "linear_attention", "mamba", "recurrent"})


def own_mixer(config: Mapping[str, Any]) -> str | None:
    """What of a model with these fields of a transformers config mixes tokens and cannot be split over ranks.

    None where it is not known: the model is tried when it is built.
    """
    family = config.get("model_type")
    if family in _ALWAYS:
        return _ALWAYS[family]
    if family not in _BY_LAYER:
        return None
    chosen = [config[name] for name in _CHOICES if config.get(name) is not None]
    layers = [layer for value in chosen if isinstance(value, (list, tuple)) for layer in value]
    return _RECURRENT if not chosen or not _RECURRENT_LAYERS.isdisjoint(map(str, layers)) else None
