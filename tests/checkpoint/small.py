"""A small model trained by hand in one process: enough for all that has nothing to do with ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from nemo_dist_conf.checkpoint import save
from nemo_dist_conf.checkpoint.tensor_file import bytes_of

__all__ = ["bits", "make", "saved_twice", "train"]


def make(optimizer: Any = torch.optim.AdamW, width: int = 8, **options: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Linear(width, 1))
    return model, optimizer(model.parameters(), **{"lr": 0.01, **options})


def train(model: nn.Module, optimizer: Any, first: int, last: int) -> list[float]:
    """Losses of the steps ``first`` to ``last - 1``."""
    losses = []
    for step in range(first, last):
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def bits(model: nn.Module) -> list[bytes]:
    """Of every parameter and buffer."""
    return [bytes(bytes_of(value)) for value in model.state_dict().values()]


def saved_twice(root: Path) -> tuple[Path, Path]:
    """Checkpoints after two and after four steps: (older, newer)."""
    model, optimizer = make()
    train(model, optimizer, 0, 2)
    older = save(root / "step_00000002", model, optimizer, step=2)
    train(model, optimizer, 2, 4)
    return older, save(root / "step_00000004", model, optimizer, step=4)
