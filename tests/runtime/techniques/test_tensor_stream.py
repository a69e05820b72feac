"""What each module does with the residual stream, seen in one run of a plain model; no ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from nemo_dist_conf.runtime.techniques.tensor.stream import CannotFollow, sequence_ways


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.down(self.up(x).relu()))


class Scaled(Mlp):
    """Changes what the row-split layer gives."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


class Gated(Mlp):
    """Another layer, which is not split, reads what the split one does."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x + self.gate(x))


class Shift(nn.Module):
    """Mixes each token with the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.scale * x.roll(1, dims=1)


class Block(nn.Module):
    def __init__(self, mlp: type[Mlp], mixer: nn.Module) -> None:
        super().__init__()
        self.norm, self.mixer, self.mlp, self.dropout = nn.LayerNorm(8), mixer, mlp(), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.mixer(self.norm(x))
        return x + self.dropout(self.mlp(self.norm(x)))


class Model(nn.Module):
    def __init__(self, mlp: type[Mlp] = Mlp, mixer: nn.Module | None = None, width: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.layers = nn.ModuleList(Block(mlp, Shift() if mixer is None else copy.deepcopy(mixer)) for _ in range(2))
        self.final, self.head, self.width = nn.LayerNorm(8), nn.Linear(8, 32), width

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        x = x if self.width == 3 else x.flatten(0, 1)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.final(x))


def ways(model: nn.Module, **plan: str) -> list[dict[str, Any]]:
    styles = {
        f"layers.{i}.mlp.{name}": style for i in range(2) for name, style in (("up", "colwise"), ("down", "rowwise"))
    }
    return sequence_ways(
        model.eval(), ["layers.0", "layers.1"], {**styles, **plan}, {"ids": torch.arange(12).view(2, 6)}
    )


def test_each_part_is_told_by_what_it_does() -> None:
    first, *others = ways(Model(), embed="embedding_rowwise")
    assert first == {
        "embed": "embedding_rowwise_scatter_output",
        **{
            f"layers.{i}{name}": style
            for i in range(2)
            for name, style in {
                "": "scatter_input",
                ".norm": "sequence_parallel",
                ".mixer": "whole_sequence",
                ".mlp": "gather_input",
                ".mlp.up": "colwise",
                ".mlp.down": "rowwise_scatter_output",
            }.items()
        },
        "final": "sequence_parallel",
        "head": "whole_inputs",  # it is not in the plan
    }
    assert [way["layers.1.mlp"] for way in others] == ["whole_inputs", "whole_inputs"]
    assert [way["final"] for way in others] == ["sequence_parallel", "whole_inputs"]


def test_a_sum_that_is_changed_and_an_input_that_others_read_are_whole() -> None:
    scaled, *_ = ways(Model(Scaled))
    assert (scaled["layers.0.mlp"], scaled["layers.0.mlp.down"]) == ("whole_sequence", "rowwise")
    gated, *_ = ways(Model(Gated))
    assert (gated["layers.0.mlp"], gated["layers.0.mlp.down"]) == ("whole_inputs", "rowwise_scatter_output")


def test_a_part_that_does_the_same_to_each_token_gets_its_own() -> None:
    first, *_ = ways(Model(mixer=nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 8))))
    assert first["layers.0.mixer"] == "sequence_parallel"
    experts = nn.Linear(8, 8)
    experts._is_expert_parallel = True  # type: ignore[assignment]  # as transformers marks them
    for mixer in (experts, nn.Dropout(0.1)):
        first, *_ = ways(Model(mixer=nn.Sequential(mixer, nn.Linear(8, 8))))
        assert first["layers.0.mixer"] == "whole_sequence"


def test_why_there_is_no_stream() -> None:
    with pytest.raises(CannotFollow, match=r"layers\.0 \(Block\) is given \[12, 8\], not \[batch, seq, hidden\]"):
        ways(Model(width=2))
    with pytest.raises(CannotFollow, match="splits no layer of a repeated block"):
        sequence_ways(Model().eval(), ["layers.0", "layers.1"], {"head": "colwise"}, {"ids": torch.zeros(2, 6).long()})
