"""The toy's classes, which transformers knows once this module is imported. B rows, S tokens, H width."""

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from toy_family import FAMILY


class ToyConfig(PreTrainedConfig):
    model_type = "toy"
    attribute_map = {"heads": "n_heads"}

    def __init__(
        self,
        width: int = 32,
        feed_width: int = 48,
        depth: int = 2,
        n_heads: int = 4,
        n_words: int = 96,
        n_experts: int = 0,
        n_chosen: int = 2,
        **kwargs: object,
    ) -> None:
        self.width, self.feed_width, self.depth, self.n_heads, self.n_words = width, feed_width, depth, n_heads, n_words
        self.n_experts, self.n_chosen = n_experts, n_chosen
        super().__init__(**kwargs)


class Mix(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        width = config.width
        self.head_width = width // config.n_heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))

    def forward(self, x_BSH: Tensor) -> Tensor:
        q, k, v = (
            layer(x_BSH).unflatten(-1, (-1, self.head_width)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        return self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Feed(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.gate, self.wide = (nn.Linear(config.width, config.feed_width, bias=False) for _ in range(2))
        self.narrow = nn.Linear(config.feed_width, config.width, bias=False)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.narrow(silu(self.gate(x_BSH)) * self.wide(x_BSH))


class Experts(nn.Module):
    """E experts; T tokens, each of which goes to some of them."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.num_experts, wide = config.n_experts, config.feed_width
        self.gate_wide = nn.Parameter(0.1 * torch.randn(config.n_experts, 2 * wide, config.width))
        self.narrow = nn.Parameter(0.1 * torch.randn(config.n_experts, config.width, wide))

    def forward(self, x_TH: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total_TH = torch.zeros_like(x_TH)
        for expert in range(self.num_experts):
            token, place = torch.where(top_k_index == expert)
            gate, wide = nn.functional.linear(x_TH[token], self.gate_wide[expert]).chunk(2, dim=-1)
            found = nn.functional.linear(silu(gate) * wide, self.narrow[expert])
            total_TH = total_TH.index_add(0, token, found * top_k_weights[token, place, None])
        return total_TH


class Chosen(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.n_chosen, self.choose = config.n_chosen, nn.Linear(config.width, config.n_experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_TH = x_BSH.flatten(0, 1)
        weights, index = self.choose(x_TH).softmax(-1).topk(self.n_chosen, dim=-1)
        return self.experts(x_TH, index, weights).view_as(x_BSH)


class Block(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.before_mix, self.before_feed = nn.RMSNorm(config.width), nn.RMSNorm(config.width)
        self.mix, self.feed = Mix(config), Chosen(config) if config.n_experts else Feed(config)

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_BSH = x_BSH + self.mix(self.before_mix(x_BSH))
        return x_BSH + self.feed(self.before_feed(x_BSH))


class Trunk(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(config.n_words, config.width)
        self.stack = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.last = nn.RMSNorm(config.width)

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSH = self.words(ids_BS)
        for block in self.stack:
            x_BSH = block(x_BSH)
        return self.last(x_BSH)


class ToyForCausalLM(PreTrainedModel):
    config_class = ToyConfig
    base_model_prefix = "trunk"

    def __init__(self, config: ToyConfig) -> None:
        super().__init__(config)
        self.trunk = Trunk(config)
        self.to_words = nn.Linear(config.width, config.n_words, bias=False)
        self.post_init()

    def forward(self, input_ids: Tensor, **_: object) -> CausalLMOutput:
        return CausalLMOutput(logits=self.to_words(self.trunk(input_ids)))


class PlainToy(nn.Module):
    """The same model of no library; only its config says what it is."""

    def __init__(self) -> None:
        super().__init__()
        self.config: Any = SimpleNamespace(model_type="toy", **FAMILY.defaults)
        self.trunk = Trunk(self.config)
        self.to_words = nn.Linear(self.config.width, self.config.n_words, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.to_words(self.trunk(input_ids))


AutoConfig.register("toy", ToyConfig)
AutoModelForCausalLM.register(ToyConfig, ToyForCausalLM)
