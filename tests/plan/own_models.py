"""Models that configs of the plan's tests name by ``_target_``."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["Chain", "asking_values"]


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x_BSH: Tensor) -> Tensor:
        out: Tensor = x_BSH + self.down(torch.relu(self.up(self.norm(x_BSH))))
        return out


class Chain(nn.Module):
    """ids [batch, seq] -> logits [batch, seq, words]; ``count`` blocks."""

    def __init__(self, width: int = 16, count: int = 3, words: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(_Block(width) for _ in range(count))
        self.head = nn.Linear(width, words, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x_BSH = self.embed(ids)
        for block in self.blocks:
            x_BSH = block(x_BSH)
        logits: Tensor = self.head(x_BSH)
        return logits


def asking_values() -> Chain:
    """A constructor that cannot run without values: it moves a tensor to memory that processes share."""
    model = Chain()
    model.embed.weight.share_memory_()
    return model
