"""Blocks that run again in backward: the same gradients, and nothing that a second run leaves behind."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.profiler import profile, record_function

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.runtime.model.blocks import find_blocks
from nemo_dist_conf.runtime.techniques.activation_checkpointing import apply_activation_checkpointing


class Restless(nn.Module):
    """Counts its calls, moves a buffer, has a plain tensor and throws coins of Python and numpy."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.register_buffer("seen", torch.zeros(()))
        self.table = torch.ones(8)
        self.calls = 0
        self.named: list[bool] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.seen += 1
        self.table *= 0.9
        if random.random() < 0.5:
            x = x.sin()
        x = x * numpy.random.uniform(0.5, 1)
        with record_function("inside"):
            return self.norm(self.linear(x).sigmoid() * (self.calls + self.seen.item()) * self.table)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Restless() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def trained(model: Any) -> tuple[list[Tensor], dict[str, Tensor], list[Any]]:
    """(gradients of three steps added up, buffers, the rest of what blocks hold)."""
    random.seed(1)
    numpy.random.seed(1)
    torch.manual_seed(1)
    for _ in range(3):
        model(torch.randn(4, 8)).square().sum().backward()
    held = [(block.calls, block.table) for block in model.blocks] + [random.random(), numpy.random.rand()]
    return [p.grad for p in model.parameters() if p.grad is not None], dict(model.named_buffers()), held


@pytest.mark.parametrize("profiled", [False, True])
@pytest.mark.parametrize("mode", [True, "selective"])
def test_what_forward_changes_is_changed_once(mode: bool | str, profiled: bool) -> None:
    """profiled: with the profiler's operators among those of a block."""
    plain = Model()
    model = copy.deepcopy(plain)
    apply_activation_checkpointing(model, find_blocks(model), mode)
    expected = trained(plain)
    if profiled:
        with profile():
            found = trained(model)
    else:
        found = trained(model)
    for mine, theirs in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(mine, theirs)
    for name, buffer in expected[1].items():
        torch.testing.assert_close(found[1][name], buffer, msg=name)
    assert str(found[2]) == str(expected[2])


def test_gradients_of_inputs_and_of_weights_may_be_computed_apart() -> None:
    """As zero-bubble schedules do; blocks then run a third time."""
    plain = Model()
    model = copy.deepcopy(plain)
    apply_activation_checkpointing(model, find_blocks(model), True)
    found = []
    for each in (plain, model):
        random.seed(1)
        numpy.random.seed(1)
        x = torch.linspace(0, 1, 32).view(4, 8).requires_grad_()
        for _ in range(2):
            loss = each(x).square().sum()
            of_x = torch.autograd.grad(loss, x, retain_graph=True)
            loss.backward()
        found.append([*of_x, *(p.grad for p in each.parameters()), *each.buffers(), *(b.table for b in each.blocks)])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_blocks_that_change_nothing_are_not_watched() -> None:
    model: Any = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(2)))
    apply_activation_checkpointing(model, find_blocks(model), True)
    model(torch.randn(2, 4)).sum().backward()
    assert [block.forward.state.changing for block in model] == [[], []]


class Writing(nn.Module):
    """Adds to what a product gave, in place: to itself, or to a view of it that matmul handed on."""

    def __init__(self, view: bool) -> None:
        super().__init__()
        self.weight, self.view = nn.Parameter(torch.randn(8, 8) / 3), view

    def forward(self, x: Tensor) -> Tensor:
        y = torch.matmul(x.view(2, 2, 2, 8), self.weight.expand(2, 2, 8, 8)) if self.view else torch.mm(x, self.weight)
        half = y * 0.5
        y += x.view_as(y)
        return (half * y.tanh()).view_as(x)


@pytest.mark.parametrize("view", [False, True])
def test_a_kept_result_that_forward_writes_into_is_kept_as_it_was(view: bool) -> None:
    torch.manual_seed(0)
    plain: Any = nn.Sequential(Writing(view), Writing(view))
    model = copy.deepcopy(plain)
    apply_activation_checkpointing(model, {name: block for name, block in model.named_children()}, "selective")
    x = torch.randn(8, 8)
    for each in (plain, model):
        each(x).square().sum().backward()
    for mine, theirs in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=0, atol=0)


def gemma3(**options: Any) -> tuple[nn.Module, Tensor]:
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextModel

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8, "vocab_size": 32, "pad_token_id": 0}
    model = Gemma3TextModel(Gemma3TextConfig(**sizes, **more))
    apply_activation_checkpointing(model, find_blocks(model), True)
    return model, torch.randint(1, 32, (2, 12))


def test_a_call_that_asks_for_a_cache_trains() -> None:
    """Both runs of a block would add to it."""
    model, ids_BS = gemma3()
    model(ids_BS, use_cache=True).last_hidden_state.sum().backward()
    asked = [p.grad for p in model.parameters()]
    model.zero_grad()
    model(ids_BS, use_cache=False).last_hidden_state.sum().backward()
    for one, parameter in zip(asked, model.parameters()):
        torch.testing.assert_close(one, parameter.grad)


def test_a_cache_that_holds_something_is_refused_in_training_and_used_without() -> None:
    model, ids_BS = gemma3()
    with torch.no_grad():
        held = model(ids_BS, use_cache=True).past_key_values
        assert held.get_seq_length() == 12
        model(ids_BS[:, :1], past_key_values=held)
    with pytest.raises(ConfigError, match="activation_checkpointing=false"):
        model(ids_BS, past_key_values=held)
