"""Constructors that give values in every way there is."""

from __future__ import annotations

import copy
import functools
import math
import random
import types
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Callable, Iterable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.dist.layouts import VOCABULARY, Net, plain_model

__all__ = ["CONSTRUCTORS", "Attributes", "SlopedNet", "Two", "holder", "table_of"]

CONSTRUCTORS: dict[str, Callable[[], nn.Module]] = {}
_TABLE = torch.arange(48.0).view(6, 8)


def _case(factory: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    CONSTRUCTORS[factory.__name__] = factory
    return factory


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 8, bias=False)


class Stack(nn.Sequential):
    """Layers by number; FSDP takes no ModuleList as root."""

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        super().__init__(*layers)


def holder(**tensors: Tensor) -> nn.Module:
    """A module with these parameters; whole numbers are buffers, because FSDP of torch 2.11 takes none."""
    model = nn.Module()
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            model.register_parameter(name, nn.Parameter(tensor))
        else:
            model.register_buffer(name, tensor)
    return model


@_case
def assigned() -> nn.Module:
    model = Two()
    model.a.weight = nn.Parameter(torch.empty(6, 8).normal_(0, 0.02))
    model.b.weight = nn.Parameter(nn.init.zeros_(torch.empty(8, 6)))
    return model


@_case
def written_in_place() -> nn.Module:
    model = Two()
    with torch.no_grad():
        model.a.weight.mul_(0.1).add_(1)
        model.b.weight[0] = 0
        model.b.weight[:, 1:3] *= 2
        model.b.weight[torch.tensor([2, 4])] = 5.0
        model.b.weight[[1, 3]] = torch.ones(6)
        model.b.weight[5, [0, 2]] = model.b.weight[np.array([6, 7]), 1]
        model.b.weight[7, 3:] = model.b.weight.new_tensor([1.0, 2.0, 3.0])
        model.a.bias.copy_(torch.arange(6.0))
    return model


@_case
def through_data() -> nn.Module:
    model = Two()
    model.a.weight.data.normal_()
    model.a.weight.data = model.a.weight.data / 3
    model.a.bias.data[2] = 7
    model.b.weight.data = torch.ones(8, 6)
    return model


@_case
def initialised() -> nn.Module:
    """Each function of torch.nn.init."""
    options = {"normal_": (0, 2), "trunc_normal_": (0, 0.1, -0.2, 0.2), "constant_": (3.0,), "sparse_": (0.3,)}
    names = ("uniform_", "ones_", "zeros_", "eye_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_")
    model = nn.Module()
    for name in (*names, "kaiming_normal_", "orthogonal_", *options):
        parameter = nn.Parameter(torch.empty(12, 9))
        getattr(nn.init, name)(parameter, *options.get(name, ()))
        model.register_parameter(name, parameter)
    model.narrow = nn.Parameter(nn.init.trunc_normal_(torch.empty(30, 30), 0.0, 1.0, 0.5, 0.6))
    model.dirac = nn.Parameter(nn.init.dirac_(torch.empty(4, 4, 3)))
    return model


@_case
def replaced_modules() -> nn.Module:
    model = Two()
    model.a = nn.Linear(8, 6)
    model.b = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 2))  # type: ignore[assignment]
    return model


@_case
def by_functions_called_afterwards() -> nn.Module:
    def start(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    model = Two().apply(start)
    for name, parameter in model.named_parameters():
        if name == "b.weight":
            nn.init.normal_(parameter, std=0.02 / math.sqrt(4))
    return model


@_case
def parametrized() -> nn.Module:
    model = Stack(nn.Linear(5, 4) for _ in range(3))
    parametrizations.spectral_norm(model[0])
    parametrizations.weight_norm(model[1])
    parametrizations.orthogonal(model[2])
    return model


@_case
def weight_norm_of_old() -> nn.Module:
    """The weight itself is an attribute, computed from parameters with their gradients."""
    model = Two()
    nn.utils.weight_norm(model.a)
    return model


@_case
def with_buffers() -> nn.Module:
    model = Two()
    model.register_buffer("mask", torch.tril(torch.ones(5, 5)).bool())
    model.register_buffer("drawn", torch.randn(3, 4), persistent=False)
    model.register_buffer("clone", model.a.weight.detach().clone())
    model.register_buffer("norm", model.a.weight.detach().norm(dim=1))
    model.register_buffer("count", torch.tensor(3))
    model.register_buffer("none", None)
    rows, columns = torch.triu_indices(4, 4, 1)
    model.register_buffer("rows", rows, persistent=False)
    model.register_buffer("columns", columns, persistent=False)
    return model


@_case
def teacher() -> nn.Module:
    model = nn.Module()
    model.online = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.teacher = copy.deepcopy(model.online).requires_grad_(False)
    model.loaded = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    model.loaded.load_state_dict(model.online.state_dict())
    return model


@_case
def tied() -> nn.Module:
    model = nn.Module()
    model.embed, model.head = nn.Embedding(7, 4, padding_idx=0), nn.Linear(4, 7, bias=False)
    model.head.weight = model.embed.weight
    return model


@_case
def one_draw_in_parts() -> nn.Module:
    q, k, v = torch.randn(12, 4).chunk(3)
    flat = torch.empty(20).normal_()
    return holder(q=q.contiguous(), k=k.clone(), v=v, up=flat[:12].view(3, 4), down=flat[12:].view(2, 4))


@_case
def in_low_precision() -> nn.Module:
    model = Two().half()
    model.b.to(torch.bfloat16)
    return model


@_case
def with_another_default_dtype() -> nn.Module:
    torch.set_default_dtype(torch.float64)
    try:
        return Two()
    finally:
        torch.set_default_dtype(torch.float32)


@_case
def from_numpy_and_random() -> nn.Module:
    model = holder(
        a=torch.from_numpy(np.random.randn(3, 4).astype("float32")),
        b=torch.tensor(np.eye(3)),
        c=torch.as_tensor(np.arange(4.0)),
        d=torch.tensor([random.random() for _ in range(3)]),
    )
    model.fc = nn.Linear(3, 3)
    zeros = torch.zeros(3)
    zeros.numpy()[:] = 5
    model.e = nn.Parameter(zeros)
    table, large = np.ones((3,), "float32"), np.ones((300, 80), "float32")
    model.f, model.g = nn.Parameter(torch.from_numpy(table)), nn.Parameter(torch.randn(300, 80))
    with torch.no_grad():
        model.fc.weight.copy_(torch.from_numpy(np.linalg.qr(np.random.randn(3, 3))[0]))
        model.g.copy_(torch.from_numpy(large))
    table[:], large[:] = 2, 3  # the first is a parameter's memory, the second was read before
    return model


@_case
def looks_at_values() -> nn.Module:
    model: Any = nn.Module()
    model.a = nn.Linear(int(torch.tensor([2, 3]).sum()), 3)
    model.rates = [rate.item() for rate in torch.linspace(0, 1, 3)]
    if torch.ones(2).sum() > 1:
        model.b = nn.Linear(2, 2)
    assert torch.arange(3).tolist() == [0, 1, 2] and torch.equal(torch.ones(2), torch.ones(2))
    assert str(torch.arange(2)) == "tensor([0, 1])" and f"{torch.tensor(1.5):.2f}" == "1.50"
    model.c = nn.Parameter(torch.ones(2).cpu() * int(torch.arange(3).numpy().sum()))
    model.register_buffer("places", torch.nonzero(torch.tensor([0, 1, 1])).flatten())
    assert model.a.weight.device.type == "cpu" and not model.a.weight.is_meta
    assert model.a.weight.to("cpu") is model.a.weight and model.a.bias.cpu() is model.a.bias
    assert model.to("cpu", torch.float32).a.weight.to(model.c) is model.a.weight
    model.d = nn.Parameter(_TABLE.to(model.a.weight.device).to(model.a.weight.half()).to(torch.float32, copy=True))
    assert model.a.weight.type() == "torch.FloatTensor"
    return model


@_case
def with_its_own_generator() -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    model = Two()
    nn.init.normal_(model.a.weight, generator=generator)
    model.big = nn.Parameter(torch.randn(300, 300, generator=generator))
    model.order = nn.Parameter(torch.randperm(5, generator=generator).float())
    model.coins = nn.Parameter(torch.bernoulli(torch.full((9,), 0.5), generator=generator))
    model.rare = nn.Parameter(torch.poisson(torch.full((4,), 3.0), generator=generator))
    model.some = nn.Parameter(torch.binomial(torch.full((4,), 9.0), torch.full((4,), 0.5), generator=generator))
    model.last = nn.Linear(2, 2)
    return model


@_case
def with_a_seed_of_its_own() -> nn.Module:
    model = Two()
    torch.manual_seed(11)
    model.c, model.d = nn.Linear(4, 4), nn.Parameter(torch.randn(4))
    return model


@_case
def with_the_generator_put_back() -> nn.Module:
    """So that two layers draw the same numbers."""
    model = nn.Module()
    state = torch.get_rng_state()
    model.a = nn.Linear(30, 30)
    torch.set_rng_state(state)
    model.b = nn.Linear(30, 30)
    with torch.random.fork_rng():
        model.c, model.d = nn.Linear(4, 4), nn.Linear(4, 4)
    model.e, model.f, model.g = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 4)
    return model


@_case
def after_a_first_run() -> nn.Module:
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.BatchNorm1d(4))
    model(torch.randn(8, 3))
    return model


@_case
def after_a_first_step() -> nn.Module:
    model = Two()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    (model.b(model.a(torch.ones(2, 8))) ** 2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model


@_case
def drawn_otherwise() -> nn.Module:
    return holder(
        a=torch.distributions.Normal(0.0, 1.0).sample((3, 3)),
        b=torch.distributions.Beta(2.0, 3.0).sample((4,)).clone(),
        c=torch.distributions.Uniform(torch.zeros(2), torch.ones(2)).sample(),
        d=torch.randint(0, 9, (4,)).float(),
        e=torch.bernoulli(torch.full((5,), 0.5)),
        f=F.dropout(torch.ones(40), 0.5),
        g=torch.multinomial(torch.ones(5), 3),
        h=torch.empty(9).exponential_(2.0),
        i=torch.view_as_real(torch.randn(3, dtype=torch.complex64)),
        j=torch.randperm(6),
        l=torch.poisson(torch.full((9,), 3.0)),
        m=torch.binomial(torch.full((9,), 9.0), torch.full((9,), 0.5)),
        k=torch.randn_like(torch.empty(3, dtype=torch.float64)),
    )


@_case
def with_complex_numbers() -> nn.Module:
    frequencies = 1 / 10000 ** (torch.arange(0, 8, 2).float() / 8)
    model = holder(scale=torch.ones(2))
    model.register_buffer("turns", torch.polar(torch.ones(6, 4), torch.outer(torch.arange(6).float(), frequencies)))
    return model


@_case
def layers_of_torch() -> nn.Module:
    kinds = [nn.LSTM(4, 4, 2), nn.MultiheadAttention(4, 2), nn.Transformer(8, 2, 1, 1, 16), nn.Conv2d(3, 4, 3)]
    more = [nn.ConvTranspose1d(2, 3, 3), nn.Bilinear(2, 3, 4), nn.GRUCell(3, 4), nn.EmbeddingBag(5, 3), nn.PReLU()]
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    last = [nn.BatchNorm2d(3), nn.InstanceNorm1d(3, affine=True, track_running_stats=True)]
    deep = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return Stack([*kinds, *more, *last, deep, nn.AdaptiveLogSoftmaxWithLoss(16, 20, [5, 10], 2.0)])


@_case
def state_space() -> nn.Module:
    """As S4 and Mamba start: loops over a matrix, time steps drawn and turned round."""
    size = 8
    steps = torch.exp(torch.rand(16) * (math.log(0.1) - math.log(0.001)) + math.log(0.001)).clamp(min=1e-4)
    matrix = torch.zeros(size, size)
    for row in range(size):
        for column in range(row):
            matrix[row, column] = math.sqrt((2 * row + 1) * (2 * column + 1))
        matrix[row, row] = row + 1
    logs = torch.log(torch.arange(1, size + 1, dtype=torch.float32).repeat(4, 1))
    return holder(steps=steps + torch.log(-torch.expm1(-steps)), matrix=-matrix, logs=logs)


@_case
def large_constants() -> nn.Module:
    """Too large to be computed while they are recorded."""
    positions, scale = torch.arange(600)[:, None], torch.exp(torch.arange(0, 64, 2) * (-math.log(1e4) / 64))
    table = torch.zeros(600, 64)
    table[:, 0::2], table[:, 1::2] = torch.sin(positions * scale), torch.cos(positions * scale)
    model = holder(zeros=torch.zeros(400, 400), eye=torch.eye(400), steps=torch.arange(40000.0))
    model.register_buffer("table", table)
    model.register_buffer("mask", torch.triu(torch.full((300, 300), float("-inf")), diagonal=1))
    return model


@_case
def each_from_the_last() -> nn.Module:
    weight, kept = torch.randn(4, 4), []
    for _ in range(3):
        weight = weight + torch.randn_like(weight) * 0.1
        kept.append(nn.Parameter(weight.clone()))
    return nn.ParameterList(kept)


@_case
def two_parameters_in_one_memory() -> nn.Module:
    model = Stack([nn.Linear(3, 3), nn.Linear(3, 3)])
    model[1].weight = nn.Parameter(model.get_parameter("0.weight").data)
    return model


@_case
def decomposed() -> nn.Module:
    model = Two()
    u, s, v = torch.linalg.svd(model.a.weight.detach(), full_matrices=False)
    model.u, model.s, model.v = (nn.Parameter(part.contiguous()) for part in (u, s, v.mT))
    return model


@_case
def into_given_memory() -> nn.Module:
    a, b, c = torch.empty(4), torch.empty(3), torch.empty(4)
    torch.randn(4, out=a)
    torch.arange(3, out=b)
    torch.mul(a, 2, out=c)
    grown = torch.zeros(3).resize_(5).fill_(2)
    seen = torch.empty(0).set_(a)  # type: ignore[call-overload]
    model: Any = holder(a=a, b=b, c=c, grown=grown, seen=seen.clone())
    for make in (torch.zeros, torch.ones, torch.rand):
        model.register_buffer(f"{make.__name__}_", make(3, out=torch.full((3,), 9.0)))
    model.register_buffer("full_", torch.full((3,), 2.0, out=torch.rand(3)))
    with torch.no_grad():
        torch._foreach_mul_([model.a, model.c], 0.5)
    return model


@_case
def from_tensors_of_others() -> nn.Module:
    """Constants of a module, and a tensor that another thread made."""
    model = Two()
    with torch.no_grad():
        model.a.weight.copy_(_TABLE)
        model.b.weight.add_(_TABLE.t())
    with ThreadPoolExecutor(1) as pool:
        model.other = nn.Parameter(pool.submit(torch.arange, 3.0).result())
    return model


def _adapted(**options: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(plain_model("llama"), LoraConfig(r=4, target_modules=["q_proj"], **options))


@_case
def with_an_adapter() -> nn.Module:
    return _adapted(modules_to_save=["lm_head"])


@_case
def with_an_adapter_derived_from_the_weights() -> nn.Module:
    return _adapted(use_dora=True)


class SlopedHead(nn.Module):
    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.slopes = [torch.linspace(0.1, 1.0, width)]
        self.out = nn.Linear(width, vocabulary)
        with torch.no_grad():
            self.out.weight.mul_(0.5)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.out(self.slopes[0] * x_BSH)


class SlopedNet(Net):
    """Starts otherwise than its layers do, and keeps a tensor in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.embed.weight = nn.Parameter(torch.empty(VOCABULARY, 32).normal_(0, 0.02))
        self.head = SlopedHead(32, VOCABULARY)  # type: ignore[assignment]
        nn.init.orthogonal_(self.get_parameter("blocks.0.up.weight"))
        self.blocks[1].load_state_dict(self.blocks[0].state_dict())
        with torch.no_grad():
            self.get_parameter("blocks.2.down.weight").zero_()


class Attributes(nn.Module):
    """Keeps tensors that are neither parameters nor buffers."""

    half: Any  # not the method of this name

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.slopes = torch.linspace(0, 1, 5)
        self.half = self.slopes[:2]
        self.several: list[Any] = [torch.arange(3), (torch.ones(2),)]
        self.named = {"eye": torch.eye(2)}
        self.helper = types.SimpleNamespace(table=torch.arange(4.0))
        self.drawn = torch.randn(64)
        self.cached = table_of(7)
        shift = torch.full((2,), 3.0)
        self.shifted = lambda x: x + shift
        self.partial = functools.partial(torch.add, torch.ones(1), 1)

    def forward(self, x: Tensor) -> Tensor:
        shifted = self.shifted(x[:, :2]).sum() + self.partial() + self.named["eye"].sum() + self.several[0].sum()
        return self.fc(x * self.slopes[2:]) + self.half.sum() + self.helper.table.sum() + shifted + self.cached.sum()


@functools.lru_cache(maxsize=None)
def table_of(size: int) -> Tensor:
    return torch.arange(float(size)) ** 2


CONSTRUCTORS["Attributes"] = Attributes
