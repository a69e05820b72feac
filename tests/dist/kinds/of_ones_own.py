"""Models of one's own. Shapes: B rows, H width."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.dist.kinds.difference import ROWS, Made, ids, kind, of_towers

__all__ = ["Block", "Scale", "Stack", "rows"]


class Block(nn.Module):
    """A residual block with something of the kind in it."""

    def __init__(self, inner: nn.Module | None = None, width: int = 8) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(width), nn.Linear(width, width)
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.up(self.norm(x)).tanh()
        return x if self.inner is None else x + self.inner(x)


class Stack(nn.Module):
    """Blocks one after the other, and a head."""

    def __init__(self, *inner: nn.Module | None, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(module, width) for module in (inner or (None, None, None)))
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def rows(width: int = 8) -> dict[str, Any]:
    return {"x": torch.randn(ROWS, width) * torch.arange(1, ROWS + 1).view(-1, 1)}


@kind
def scalars() -> Made:
    """Parameters without a dimension, of the root, of a block, and one that is frozen."""

    class Model(Stack):
        def __init__(self) -> None:
            super().__init__(Scale(), Scale(), Scale())
            self.temperature = nn.Parameter(torch.tensor(1.3))
            self.blocks[1].inner.factor.requires_grad_(False)  # type: ignore[union-attr]

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * self.temperature

    return Model(), rows()


@kind
def without_elements() -> Made:
    """Parameters of no elements, as tables of prompts of length 0."""

    class Prompt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.prompt = nn.Parameter(torch.zeros(0, 8))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.prompt.sum(0)

    return Stack(Prompt(), Prompt()), rows()


@kind
def levels() -> Made:
    """Levels whose parts stand in dictionaries, as a U-Net's."""

    class Levels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            parts = [{"first": Block(), "then": nn.Linear(8, 8), "act": nn.Tanh()} for _ in range(2)]
            self.down = nn.ModuleList(nn.ModuleDict(part) for part in parts)
            self.up: Any = nn.ModuleList(nn.ModuleList([Block(), Block()]) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for level in self.down:
                x = level["act"](level["then"](level["first"](x)))  # type: ignore[index]
            for first, second in self.up:
                x = second(first(x))
            return x

    return Levels(), rows()


@kind
def complex_parameters() -> Made:
    """Filters in the frequency domain."""

    class Filter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, dtype=torch.complex64) / 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=8)

    return Stack(Filter(), nn.Linear(8, 8)), rows()


@kind
def shared_layer() -> Made:
    """A layer that every block uses, and a matrix that a block has from outside of it."""
    shared = nn.Linear(8, 8)
    model: Any = Stack(shared, nn.Linear(8, 8), nn.Linear(8, 8))
    model.blocks[2].up.weight = model.head.weight
    model.last = shared
    return model, rows()


@kind
def two_dtypes() -> Made:
    """Norms in float64 inside of blocks in float32, and a head that is all in float64."""

    class Norm(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.double()).float()

    class Model(Stack):
        def __init__(self) -> None:
            super().__init__()
            for block in self.blocks:
                block.norm = Norm(8, dtype=torch.float64)
            self.head = self.head.double()

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return self.head(x.double())

    return Model(), rows()


@kind
def dtypes_in_one_module() -> Made:
    """A module with parameters of two dtypes of its own."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8) / 3)
            self.bias = nn.Parameter(torch.zeros(8, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + self.bias.float()

    return Stack(Mixed(), Mixed()), rows()


@kind
def sparse_embedding() -> Made:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(32, 8, sparse=True)
            self.body = Stack()

        def forward(self, tokens: Tensor) -> Tensor:
            return self.body(self.embedding(tokens).mean(1))

    return Model(), {"tokens": ids(32, 6)}


@kind
def plain_attributes() -> Made:
    """Tensors that are neither parameters nor buffers."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.linspace(0, 1, 8)
            self.tables = {"twice": torch.linspace(0, 2, 8)}

        def forward(self, x: Tensor) -> Tensor:
            return x * self.table + self.tables["twice"]

    return Stack(Table(), Table()), rows()


@kind
def recurrent() -> Made:
    """An LSTM keeps a list of its weights beside them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(32, 8)
            self.lstm = nn.LSTM(8, 8, num_layers=2, batch_first=True)
            self.head = nn.Linear(8, 8)

        def forward(self, tokens: Tensor) -> Tensor:
            return self.head(self.lstm(self.embedding(tokens))[0])

    return Model(), {"tokens": ids(32, 6)}


@kind
def channels_last() -> Made:
    """Convolutions whose weights do not lie in memory in the order of their dimensions."""
    layers = [nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.ReLU()) for c in (3, 8, 8)]
    model: Any = nn.Sequential(nn.Sequential(*layers), nn.Flatten(), nn.Linear(8 * 36, 4))
    return model.to(memory_format=torch.channels_last), {"input": torch.randn(ROWS, 3, 6, 6)}


@kind
def attention_and_weight_norm() -> Made:
    """nn.MultiheadAttention uses weights of a module that it never calls; a parametrized weight is computed."""

    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.out = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

        def forward(self, x: Tensor) -> Tensor:
            y = x.unsqueeze(1).expand(-1, 3, -1) * torch.linspace(0.5, 1, 3).view(1, 3, 1)
            return self.out(self.attention(y, y, y)[0].mean(1))

    return Stack(Attend(), Attend()), rows()


@kind
def frozen_and_trained() -> Made:
    """A frozen trunk in bfloat16 with trained parts in float32 beside it, as adapters have it."""

    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.Linear(8, 8, dtype=torch.bfloat16).requires_grad_(False)
            self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.base(x.bfloat16()).float() + self.up(self.down(x))

    return Stack(Adapter(), Adapter()), rows()


@kind
def unet() -> Made:
    """Levels of different widths, and what a level on the way down hands to its level on the way up."""

    class Level(nn.Module):
        def __init__(self, given: int, made: int) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(2, given)
            self.conv = nn.Conv2d(given, made, 3, padding=1)
            self.time = nn.Linear(8, made)

        def forward(self, x: Tensor, time: Tensor) -> Tensor:
            return self.conv(F.silu(self.norm(x))) + self.time(time)[..., None, None]

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time = nn.Sequential(nn.Linear(1, 8), nn.SiLU(), nn.Linear(8, 8))
            self.first = nn.Conv2d(3, 4, 3, padding=1)
            self.down = nn.ModuleList([Level(4, 8), Level(8, 16)])
            self.middle = Level(16, 16)
            self.up = nn.ModuleList([Level(32, 8), Level(16, 4)])
            self.last = nn.Conv2d(4, 3, 3, padding=1)

        def forward(self, image: Tensor, step: Tensor) -> Tensor:
            time, x, seen = self.time(step), self.first(image), []
            for level in self.down:
                x = F.avg_pool2d(level(x, time), 2)
                seen.append(x)
            x = self.middle(x, time)
            for level in self.up:
                x = F.interpolate(level(torch.cat([x, seen.pop()], 1), time), scale_factor=2.0)
            return self.last(x)

    return UNet(), {"image": torch.randn(ROWS, 3, 8, 8), "step": torch.rand(ROWS, 1)}


@kind
def dit() -> Made:
    """Blocks whose norms are scaled and shifted by what a class and a time are embedded to."""

    class DiTBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(16, elementwise_affine=False)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
            self.modulation = nn.Linear(16, 6 * 16)

        def forward(self, x: Tensor, given: Tensor) -> Tensor:
            shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(F.silu(given))[:, None].chunk(6, -1)
            y = self.norm(x) * (1 + scale) + shift
            x = x + gate * self.attention(y, y, y, need_weights=False)[0]
            return x + gate_mlp * self.mlp(self.norm(x) * (1 + scale_mlp) + shift_mlp)

    class DiT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches = nn.Conv2d(3, 16, 4, stride=4)
            self.places = nn.Parameter(torch.randn(1, 4, 16))
            self.time, self.label = nn.Linear(1, 16), nn.Embedding(5, 16)
            self.blocks = nn.ModuleList(DiTBlock() for _ in range(2))
            self.out = nn.Linear(16, 3 * 4 * 4)

        def forward(self, image: Tensor, step: Tensor, label: Tensor) -> Tensor:
            x = self.patches(image).flatten(2).mT + self.places
            given = self.time(step) + self.label(label)
            for block in self.blocks:
                x = block(x, given)
            return self.out(x)

    batch = {"image": torch.randn(ROWS, 3, 8, 8), "step": torch.rand(ROWS, 1), "label": torch.randint(5, (ROWS,))}
    return DiT(), batch


@of_towers(frozen="encoder")
def several_lists() -> Made:
    """Two lists of blocks of two classes, of which each makes units."""

    class Mix(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.gate = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.out(x) * self.gate(x).sigmoid()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.ModuleList(Block() for _ in range(2))
            self.decoder = nn.ModuleList(Mix() for _ in range(3))
            self.head = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            for block in (*self.encoder, *self.decoder):
                x = block(x)
            return self.head(x)

    return Model(), rows()
