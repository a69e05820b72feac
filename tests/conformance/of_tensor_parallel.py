"""Plans of tensor parallelism, typed and declared: the same numbers as the plain model, or refused before a start."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn

from tests.conformance.case import Case
from tests.dist.layouts import LLAMA, SGD, composed, single_process, train
from tests.dist.pool import run_ranks

__all__ = ["CASES", "HeadNorms", "heads_of", "model_of"]

AREA = "Plans of tensor parallelism"
LENGTH = 16
#: Fields of a small config, by every name that these families have for them.
SMALL: dict[str, Any] = {
    **{key: LLAMA[key] for key in ("vocab_size", "hidden_size", "tie_word_embeddings", "use_cache")},
    **{"n_embd": 64, "d_model": 64, "word_embed_proj_dim": 64, "hidden_dropout": 0.0, "resid_pdrop": 0.0},
    **{"num_hidden_layers": 2, "n_layer": 2, "num_layers": 2, "intermediate_size": 96, "ffn_dim": 96, "n_inner": 96},
    **{"num_attention_heads": 4, "n_head": 4, "num_heads": 4, "attention_heads": 4, "max_position_embeddings": 32},
    **{"attention_types": [[["global", "local"], 1]], "rotary_dim": 8, "new_decoder_architecture": False},
    **{"dropout": 0.0, "attention_dropout": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "embed_dropout": 0.0},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}


def model_of(family: str) -> dict[str, Any]:
    from transformers import AutoConfig

    known = vars(AutoConfig.for_model(family))
    renamed = {"gpt2", "gptj"} & {family}
    fields = {key: value for key, value in SMALL.items() if key in known and not (renamed and key.startswith("num_"))}
    return {"config": {"model_type": family, **fields}}


def heads_of(attention: str, *names: str) -> dict[str, str]:
    """A plan that splits the projections of an attention, the last one by its input."""
    *wide, narrow = (f"{attention}.{name}" for name in names)
    return {**dict.fromkeys(wide, "colwise"), narrow: "rowwise"}


def _rows(block: str, up: str, down: str) -> dict[str, str]:
    return {f"{block}.{up}": "colwise", f"{block}.{down}": "rowwise"}


#: What a person would write down who has read the names of the layers.
_ATTENTION: dict[str, dict[str, str]] = {
    "opt": heads_of("model.decoder.layers.*.self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    "gptj": heads_of("transformer.h.*.attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    "gpt_neo": heads_of("transformer.h.*.attn.attention", "q_proj", "k_proj", "v_proj", "out_proj"),
    "xglm": heads_of("model.layers.*.self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    "falcon": heads_of("transformer.h.*.self_attention", "query_key_value", "dense"),
}
_GOOD: dict[str, dict[str, str]] = {
    "opt": _rows("model.decoder.layers.*", "fc1", "fc2"),
    "gptj": _rows("transformer.h.*.mlp", "fc_in", "fc_out"),
    "gpt_neo": _rows("transformer.h.*.mlp", "c_fc", "c_proj"),
    "xglm": _rows("model.layers.*", "fc1", "fc2"),
    # Fused, but head by head, which splits.
    "gpt_neox": {
        **heads_of("gpt_neox.layers.*.attention", "query_key_value", "dense"),
        **_rows("gpt_neox.layers.*.mlp", "dense_h_to_4h", "dense_4h_to_h"),
    },
}


class HeadNorms(nn.Module):
    """A norm runs on what each rank has of the split features: without a style only its gradient is wrong."""

    def __init__(self, width: int = 32, vocabulary: int = LLAMA["vocab_size"]) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.up, self.norm, self.down = nn.Linear(width, 64), nn.LayerNorm(8), nn.Linear(64, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        heads = self.norm(self.up(x).unflatten(-1, (-1, 8))).flatten(-2)
        return self.head(x + self.down(heads))


OWN: dict[str, dict[str, Any]] = {"norms of heads": {"_target_": f"{__name__}.HeadNorms"}}
_SPLIT = {"up": "colwise", "down": "rowwise"}


def _run(name: str, plan: dict[str, str]) -> float:
    """The worst relative difference of a loss or a gradient norm in three steps of SGD with momentum."""
    model = OWN[name] if name in OWN else model_of(name)
    weights = run_ranks(1, _train, model, None, 0)[0].weights
    want = run_ranks(1, single_process, model["config"] if "config" in model else model, SGD, weights, LENGTH)[0]
    found = run_ranks(2, _train, model, plan, 3)
    pairs = [(a, b) for rank in found for a, b in zip([*rank.losses, *rank.norms], [*want.losses[:3], *want.norms[:3]])]
    return max(abs(a - b) / abs(b) for a, b in pairs)


def _train(model: dict[str, Any], plan: dict[str, str] | None, steps: int) -> Any:
    words = ["strategy=ddp"] if plan is None else ["strategy.mp_policy=null", "parallelism.tp_size=2"]
    cfg = composed(*words, model=model, optimizer=SGD)
    if plan is not None:
        cfg.strategy.tp_plan = plan
    return train(cfg, steps=steps, whole=steps == 0, length=LENGTH)


def _case(name: str, what: str, plan: dict[str, str], refused: str | None, in_suite: bool) -> Case:
    return Case(AREA, f"{name}, {what}", "tp 2", functools.partial(_run, name, plan), refused, in_suite=in_suite)


_APART = "computes something else than the plain model"
CASES: list[Case] = [
    *(_case(name, "attention split", plan, _APART, name in ("opt", "falcon")) for name, plan in _ATTENTION.items()),
    *(_case(name, "what splits split", plan, None, name in ("opt", "gpt_neox")) for name, plan in _GOOD.items()),
    _case("norms of heads", "without a style for the norm", _SPLIT, "the gradient of norm", True),
    _case("norms of heads", "with one", {**_SPLIT, "norm": "replicated_with_grad_allreduce"}, None, True),
]
