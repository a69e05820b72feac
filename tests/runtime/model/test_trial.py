"""Twins that techniques are tried on: the model's own modules, nothing of the model itself touched."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nemo_dist_conf.runtime.model.blocks import find_blocks
from nemo_dist_conf.runtime.model.trial import observed, parted, small_input, twin

SMALL: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "max_position_embeddings": 64,
}


def built(family: str, device: str = "cpu") -> nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SMALL))


class Rescaled(nn.Module):
    """Halves what a linear layer of an own class returns, after its own count of calls."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5000, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)) for _ in range(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.scale = torch.full((8,), 0.5)

    def forward(self, ids_BS: Tensor) -> Tensor:
        self.calls += 1
        x_BSH = self.embed(ids_BS)
        for block in self.blocks:
            x_BSH = block(x_BSH)
        return x_BSH * self.scale


@pytest.mark.parametrize("family", ["llama", "gpt_oss", "gpt2"])
def test_runs_one_block_of_each_kind_alike_from_values_and_from_meta(family: str) -> None:
    outputs = []
    for device in ("cpu", "meta"):
        model = built(family, device)
        tried = twin(model, find_blocks(model))
        inputs = small_input(tried, 16)
        assert inputs is not None and inputs["input_ids"].shape == (2, 16)
        outputs.append(observed(tried, inputs)[-1].outputs[0])
        blocks = list(find_blocks(tried).values())
        run = [index for index, block in enumerate(blocks) if not any(p.is_meta for p in block.parameters())]
        assert run == ([0, 1] if family == "gpt_oss" else [0])  # a window and full attention in turn
    assert torch.equal(*outputs)


def test_nothing_of_the_model_changes() -> None:
    model = Rescaled().train()
    before = copy.deepcopy(model.state_dict())
    versions = [tensor._version for tensor in (*model.parameters(), *model.buffers())]
    generator = torch.get_rng_state()
    tried = twin(model, find_blocks(model))
    inputs = small_input(tried, 6)
    assert inputs is not None and list(inputs) == ["ids_BS"]
    first, again = observed(tried, inputs), observed(tried.train(), inputs)
    assert parted(first, again) is None  # nothing drops out
    assert tried.get_buffer("calls") == 2 and tried.get_parameter("embed.weight").shape == (64, 8)
    assert torch.equal(generator, torch.get_rng_state())
    assert [tensor._version for tensor in (*model.parameters(), *model.buffers())] == versions
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert not any(module._forward_hooks for module in (*model.modules(), *tried.modules()))


def test_names_the_innermost_module_where_two_runs_part() -> None:
    model = built("llama", "meta")
    tried = twin(model, find_blocks(model))
    inputs = small_input(tried, 8)
    assert inputs is not None
    plain = observed(tried, inputs)
    with torch.no_grad():
        tried.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1.1)
    where = parted(plain, observed(tried, inputs))
    assert str(where) == "model.layers.0.mlp.up_proj (Linear)"
