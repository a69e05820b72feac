"""Modules that come on the meta device: as they reset themselves, or refused where a tensor would have no value."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.runtime.model.build import build_model
from nemo_dist_conf.runtime.model.construct import record_resets
from nemo_dist_conf.runtime.model.materialise import materialise
from nemo_dist_conf.runtime.model.recording.recorder import NotRecorded
from tests.dist.layouts import Net, plain_model
from tests.runtime.model.replay import CPU, NoInitialiser, filled, on_meta, tensors


class Forgetful(nn.Module):
    """Its initialiser leaves one of its own tensors alone."""

    def __init__(self, forgets: str) -> None:
        super().__init__()
        self.forgets = forgets
        self.weight = nn.Parameter(torch.empty(3, 3))
        self.bias = nn.Parameter(torch.empty(3))
        self.register_buffer("scale", torch.empty(3))
        self.register_buffer("steps", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for name in ("weight", "bias", "scale", "steps", "mask"):
            if name != self.forgets:
                nn.init.ones_(getattr(self, name))


def test_a_module_on_meta_starts_as_its_modules_reset_themselves() -> None:
    """The same numbers as those of its class, which does nothing else."""
    expected = tensors(filled(Net, seed=3))
    model = on_meta(Net)
    materialise(model, record_resets(model, 3, CPU))
    assert all(torch.equal(value, expected[name]) for name, value in tensors(model).items())
    record_resets(on_meta(nn.MultiheadAttention, 4, 2), 0, CPU)  # spelt _reset_parameters
    record_resets(nn.Identity(), 0, CPU)


def test_a_transformers_model_on_meta_starts_as_it_initialises_itself() -> None:
    expected = tensors(filled(plain_model, "llama", seed=3))
    model = on_meta(plain_model, "llama")
    materialise(model, record_resets(model, 3, CPU))
    assert all(torch.equal(value, expected[name]) for name, value in tensors(model).items())


@pytest.mark.parametrize("forgets", ["weight", "bias", "scale", "steps", "mask"])
def test_a_tensor_that_nothing_sets_is_found(forgets: str) -> None:
    """Left alone it would hold whatever the memory held; among whole numbers and masks there is no NaN to tell."""
    with pytest.raises(NotRecorded, match=f"nothing sets {forgets}"):
        record_resets(on_meta(Forgetful, forgets), 0, CPU)
    record_resets(on_meta(Forgetful, "nothing"), 0, CPU)


def test_a_module_that_cannot_reset_itself_is_refused() -> None:
    with pytest.raises(ConfigError, match="NoInitialiser has no reset_parameters"):
        build_model(None, on_meta(NoInitialiser), 0, CPU)
    partly = on_meta(Net)
    partly.head = nn.Linear(32, 97)
    with pytest.raises(ConfigError, match="other tensors of it have values"):
        build_model(None, partly, 0, CPU)


class Tabled(nn.Linear):
    """Computes a table whenever it is reset; or never."""

    def __init__(self, resets: bool) -> None:
        super().__init__(3, 3)
        self.resets, self.table = resets, [torch.arange(3.0)]
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if getattr(self, "resets", False):
            self.table = [torch.arange(3.0)]


def test_tables_of_a_module_on_meta() -> None:
    model: Any = build_model(None, on_meta(Tabled, True), 0, CPU, math.inf).model
    assert torch.equal(model.table[0], torch.arange(3.0)) and not model.weight.is_meta
    with pytest.raises(ConfigError, match="nothing sets table/0"):
        build_model(None, on_meta(Tabled, False), 0, CPU)


def test_a_layer_that_never_ran_is_refused() -> None:
    with pytest.raises(ConfigError, match="weight of LazyLinear has no shape yet"):
        build_model(None, lambda: nn.LazyLinear(3), 0, CPU)
    with pytest.raises(ConfigError, match="running_mean of LazyBatchNorm1d has no shape yet"):
        build_model(None, lambda: nn.LazyBatchNorm1d(affine=False), 0, CPU)
