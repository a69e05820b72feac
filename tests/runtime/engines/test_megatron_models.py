"""megatron_fsdp trains a model as one process does, or refuses it, whatever it returns, however often it names a
parameter, and in whatever order it holds its modules."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.instantiate import instantiate
from tests.dist.layouts import SGD, Net, batch, composed, loss_sum
from tests.dist.test_megatron_fsdp import MEGATRON, run_shimmed, whole_weights

pytestmark = pytest.mark.dist


class Returns(Net):
    """The head runs last and is registered first."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        blocks, embed = self.blocks, self.embed
        del self.blocks, self.embed
        self.blocks, self.embed, self.kind = blocks, embed, kind

    def forward(self, ids_BS: Tensor) -> Any:
        logits_BSV = super().forward(ids_BS)
        if self.kind == "dict":
            return {"nothing": None, "logits": logits_BSV}
        if self.kind == "nested":
            return ("name", [(logits_BSV,)])
        return SimpleNamespace(logits=logits_BSV)


class Experts(nn.Module):
    """Stands where the library looks for experts: by their name."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(2))
        self.router = nn.Linear(32, 2)

    def forward(self, x_BSH: Tensor) -> Tensor:
        weights_BSE = self.router(x_BSH).softmax(-1)
        return x_BSH + sum(w[..., None] * e(x_BSH) for w, e in zip(weights_BSE.unbind(-1), self.experts))


class Mixture(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Experts() for _ in range(2))


class ThreeNames(Net):
    """One matrix under three names, as the embeddings and the head of an encoder-decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.second = nn.Embedding(*self.embed.weight.shape)
        self.second.weight = self.head.weight = self.embed.weight

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSH = self.embed(ids_BS) + self.second(ids_BS.flip(1))
        for block in self.blocks:
            x_BSH = block(x_BSH)
        return self.head(x_BSH)


def logits_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output["logits"] if isinstance(output, dict) else output[1][0][0]


class Logits(nn.Module):
    """The logits of what another module returns."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids_BS: Tensor) -> Tensor:
        return logits_of(self.model(ids_BS))


def _apart(model: nn.Module, *words: str) -> float:
    """The worst relative difference between what a step does to a weight here and in one process."""
    torch.manual_seed(0)
    ids, labels = batch()
    plain, before = copy.deepcopy(model), {name: value.clone() for name, value in model.named_parameters()}
    setup, wrapped, optimizer = instantiate(composed(MEGATRON, *words, optimizer=SGD), model)
    rank, ranks = setup.mesh_context.data_rank, setup.mesh_context.data_size
    loss = loss_sum(Logits(wrapped), ids.chunk(ranks)[rank], labels.chunk(ranks)[rank])
    (loss * setup.mesh_context.gradient_size / 100).backward()
    optimizer.step()
    (loss_sum(Logits(plain), ids, labels) / 100).backward()
    torch.optim.SGD(plain.parameters(), SGD["lr"]).step()
    found = whole_weights(wrapped)
    moved = {name: value.detach() - before[name] for name, value in plain.named_parameters()}
    return max(
        float((found[name] - before[name] - by).norm() / by.norm()) for name, by in moved.items() if by.norm() > 1e-6
    )


def _of(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return (
        {"experts": Mixture, "three names": ThreeNames}[kind]() if kind in ("experts", "three names") else Returns(kind)
    )


def _on_rank(kind: str, words: tuple[str, ...]) -> float:
    return _apart(_of(kind), *words)


@pytest.mark.parametrize("kind", ["dict", "nested", "experts", "three names"])
def test_a_step_is_that_of_one_process(kind: str) -> None:
    assert max(run_shimmed(2, _on_rank, kind, ())) < 1e-4


def _kind_of_output() -> type:
    _, wrapped, _ = instantiate(composed(MEGATRON, optimizer=SGD), _of("nested"))
    name, inner = wrapped(batch()[0])
    assert name == "name" and isinstance(inner, list) and isinstance(inner[0], tuple)
    return type(inner[0][0])


def test_a_model_returns_what_it_returned_before() -> None:
    assert run_shimmed(1, _kind_of_output) == [Tensor]


def test_an_output_that_hides_its_tensors_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"Returns returns types\.SimpleNamespace, in which megatron-fsdp finds no"):
        run_shimmed(2, _on_rank, "object", ())


class Uneven(nn.Module):
    """A unit in which a table of positions has longer rows than a convolution has elements."""

    _no_split_modules = ("Patches",)

    def __init__(self) -> None:
        super().__init__()
        self.patches = Patches()

    def forward(self, image: Tensor) -> Tensor:
        return self.patches(image)


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Parameter(torch.zeros(1, 17, 32))
        self.project = nn.Conv2d(3, 32, 4, stride=4)

    def forward(self, image: Tensor) -> Tensor:
        return self.project(image).flatten(2).mT + self.places[:, 1:]


def _uneven() -> None:
    instantiate(composed(MEGATRON), Uneven())


def test_a_unit_whose_parameters_the_library_cuts_within_rows_is_refused_on_all_ranks() -> None:
    with pytest.raises(ConfigError, match="within a row"):
        run_shimmed(2, _uneven)
