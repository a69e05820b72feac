"""Models of many families with their rows split over cp ranks: equal to one process, or refused with the reason.

Weights are scaled up, so that sinks, soft caps, biases and windows matter to the loss.
"""

from __future__ import annotations

import functools
import hashlib
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conformance.case import Case
from tests.dist.layouts import SGD, composed, full_gradients
from tests.dist.pool import run_ranks

__all__ = ["CASES"]

AREA = "Rows split over ranks"
CP = ("strategy.mp_policy=null", "parallelism.cp_size=2")
ROWS, TOKENS, VOCABULARY, STEPS = 2, 32, 97, 3

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
}


def built(family: str, config: dict[str, Any], kind: str = "AutoModelForCausalLM") -> nn.Module:
    """As transformers builds it, with larger weights, the same in every process."""
    import transformers

    fields = {key: value for key, value in {**SMALL, **config}.items() if value is not None}
    made = getattr(transformers, kind).from_config(transformers.AutoConfig.for_model(family, **fields))
    enlarge(made)
    return made


def enlarge(model: nn.Module) -> None:
    """Weights of a spread at which scores are several units; each depends on its name only."""
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big"))
            drawn = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(drawn if id(parameter) in tables else drawn * 1.5 / math.sqrt(parameter.size(-1)))
            elif name.endswith("weight"):
                parameter.copy_(1 + 0.1 * drawn)
            else:
                parameter.copy_(0.5 * drawn)


def batch() -> tuple[Tensor, Tensor]:
    ids_BT = torch.randint(3, VOCABULARY, (ROWS, TOKENS + 1), generator=torch.Generator().manual_seed(0))
    return ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous()


def trained(model: nn.Module, optimizer: Any, ids: Tensor, labels: Tensor, scale: float, **more: Any) -> Any:
    """(losses of the steps, gradients of the first) on this rank's part."""
    losses, first = [], {}
    for step in range(STEPS):
        output = model(ids, **more)
        logits = getattr(output, "logits", getattr(output, "last_hidden_state", output))
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum") / (ROWS * TOKENS)
        (loss * scale).backward()
        if step == 0:
            first = full_gradients(model)
        losses.append(loss.detach())
        optimizer.step()
        optimizer.zero_grad()
    return losses, first


def compared(make: Any, positions: Tensor | None = None) -> float:
    """On a rank: the worst relative difference of losses and of the first gradients from plain torch on whole rows."""
    from nemo_dist_conf import instantiate

    ids, labels = batch()
    more = {} if positions is None else {"position_ids": positions}
    plain = make().train()
    rate = {"lr": 0.02, "momentum": 0.9}
    wanted, expected = trained(plain, torch.optim.SGD(plain.parameters(), **rate), ids, labels, 1.0, **more)
    cfg = composed(*CP, optimizer={**SGD, **rate})
    setup, model, optimizer = instantiate(cfg, model=make().train())
    mesh = setup.mesh_context
    more = {name: mesh.split_sequence(value)[0] for name, value in more.items()}
    found, gradients = trained(model, optimizer, *mesh.split_sequence(ids, labels), mesh.gradient_size, **more)
    worst = max(
        float(abs(mesh.sum_over_data(loss.double()) - want) / abs(want)) for loss, want in zip(found, wanted)
    )
    largest = max(float(gradient.norm()) for gradient in expected.values())
    for name, gradient in expected.items():
        apart = float((gradients[name] - gradient).norm())
        worst = max(worst, apart / max(float(gradient.norm()), 1e-3 * largest))
    return worst


def family(name: str, config: dict[str, Any], kind: str = "AutoModelForCausalLM") -> float:
    return max(run_ranks(2, compared, functools.partial(built, name, config, kind)))


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 5},
    "falcon": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 4},
    "gptj": {"n_embd": 32, "n_head": 4, "n_layer": 4, "rotary_dim": 4},
    "bloom": {"n_head": 4, "n_layer": 4},
    "xglm": {"d_model": 32, "attention_heads": 4, "num_layers": 4, "ffn_dim": 48},
    "gemma2": {"sliding_window": 5, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "llama4_text": {"attention_chunk_size": 8, "num_local_experts": 4, "intermediate_size_mlp": 48},
}
CASES: list[Case] = [
    Case(AREA, name, "cp 2", functools.partial(family, name, config)) for name, config in FAMILIES.items()
]
