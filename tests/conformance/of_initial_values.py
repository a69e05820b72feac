"""Initial values: what a constructor gives, bit for bit, played back in the order in which it drew its numbers.

As a run draws them, each from the seed and its name, constants are those of the constructor and the rest is distributed
as there. That they are the same on every layout is tested beside (tests/runtime/model/test_materialise.py).
"""

from __future__ import annotations

import functools
from typing import Any, Callable

import torch
from torch import nn

from tests.conformance.case import Case
from tests.dist.layouts import plain_model
from tests.runtime.model.replay import differences, misfits
from tests.tiny_configs import families, tiny_config

__all__ = ["CASES"]

_AREA = "Initial values"
_PLAIN = "one process, beside the plain constructor"

#: Families of the suite, for how they start: depth-scaled projections, drawn time steps, gates, lists of experts,
#: tables of positions, encoders, parametrized or replaced layers, truncated distributions, tied and padded embeddings.
_SAMPLE = (
    *("bamba", "bart", "bert", "big_bird", "bloom", "deepseek_v3", "falcon_h1", "falcon_mamba", "gemma3_text"),
    *("gpt2", "gpt_bigcode", "gpt_oss", "gptj", "granitemoehybrid", "jamba", "llama", "llama4_text", "mamba", "mamba2"),
    *("minimax", "mixtral", "modernbert-decoder", "nemotron_h", "opt", "qwen3_next", "recurrent_gemma", "rwkv"),
    *("xglm", "xlnet", "xlstm", "zamba2"),
)


def _of_family(family: str) -> float:
    from transformers import AutoModelForCausalLM

    config = tiny_config(family)

    def factory() -> nn.Module:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    found = differences(factory) + misfits(factory)
    assert found == [], found[:5]
    return 0.0


def _of_several(names: tuple[str, ...]) -> float:
    return max(map(_of_family, names))


def _of_adapter(make: Callable[[], Any]) -> float:
    from peft import get_peft_model

    def adapted() -> nn.Module:
        return get_peft_model(plain_model("llama"), make())

    found = differences(adapted)
    assert found == [], found[:5]
    return 0.0


def _adapters() -> dict[str, Callable[[], Any]]:
    """Configs of peft by what they are called here; made when they are tried."""

    def config(kind: str, **options: Any) -> Any:
        import peft

        return getattr(peft, kind)(**{"target_modules": ["q_proj", "v_proj"], **options})

    lora = functools.partial(config, "LoraConfig", r=4)
    starts = ("gaussian", "pissa", "olora", "orthogonal")
    return {
        "LoRA": lora,
        "DoRA": functools.partial(lora, use_dora=True),
        **{f"LoRA, {start}": functools.partial(lora, init_lora_weights=start) for start in starts},
        "LoRA with a head of its own": functools.partial(lora, modules_to_save=["lm_head"]),
        "LoRA with trained tokens": functools.partial(lora, trainable_token_indices=[1, 2]),
        "AdaLoRA": functools.partial(config, "AdaLoraConfig", total_step=10),
        "IA3": functools.partial(config, "IA3Config", feedforward_modules=[]),
        "VeRA": functools.partial(config, "VeraConfig", r=4, target_modules=["q_proj"]),
        "LoHa": functools.partial(config, "LoHaConfig", r=4),
        "OFT": functools.partial(config, "OFTConfig", r=0, oft_block_size=8),
        "BOFT": functools.partial(config, "BOFTConfig", boft_block_size=8),
        "HRA": functools.partial(config, "HRAConfig", r=4),
        "FourierFT": functools.partial(config, "FourierFTConfig", n_frequency=10),
    }


CASES = [
    Case(_AREA, f"{len(_SAMPLE)} families of transformers", _PLAIN, functools.partial(_of_several, _SAMPLE)),
    *(
        Case(_AREA, f"transformers: {name}", _PLAIN, functools.partial(_of_family, name), in_suite=False)
        for name in families()
    ),
    *(
        Case(_AREA, f"peft: {name}", _PLAIN, functools.partial(_of_adapter, make), in_suite=False)
        for name, make in _adapters().items()
    ),
]
