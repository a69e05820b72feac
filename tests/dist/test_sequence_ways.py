"""Sequence parallelism that is derived from a plan without it, against one process: a family for each mechanism."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.runtime.techniques.tensor.parallel import apply_tensor_parallel
from tests.conformance.of_context import enlarge
from tests.dist.pool import run_ranks
from tests.dist.test_tensor_parallel import OWN_PLAN, TIED, Case, Own, compare, use_every_input
from tests.tiny_configs import tiny_config

pytestmark = pytest.mark.dist


@dataclass
class Tiny(Case):
    """A family whose config is made small field by field."""

    steps: int = 2

    def model(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        torch.manual_seed(7)
        model: nn.Module = AutoModelForCausalLM.from_config(tiny_config(self.family), dtype=torch.float32)
        enlarge(model)
        return model


CASES = {
    "sandwich norms, scaled embedding, caps; an odd length": (
        2,
        Case("gemma2", {"head_dim": 8, **TIED, "query_pre_attn_scalar": 8}, steps=2, seq_len=7),
    ),
    "parallel block, scaled logits; x dp, recomputed": (
        4,
        Case("cohere", {"pad_token_id": 0, **TIED, "logit_scale": 0.5}, dp=2, checkpoint=True, steps=2, seq_len=7),
    ),
    "scaled residual": (
        2,
        Case("granite", {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0}, steps=2),
    ),
    "shorter than the ranks, norms of whole heads": (
        4,
        Case("olmo2", {"pad_token_id": 0, "num_key_value_heads": 4}, steps=2, seq_len=3),
    ),
    "experts": (2, Tiny("mixtral", seq_len=7)),
    "embeddings for each layer": (2, Tiny("gemma4_text", seq_len=7)),
    "a mixer that is not split": (2, Tiny("olmo_hybrid")),
    "parameters of a block": (2, Tiny("doge", seq_len=7)),
    "several rows a token": (2, Tiny("hy_v4")),
    "own": (2, Case("own", plan=OWN_PLAN, steps=2, seq_len=7)),
}


@pytest.mark.parametrize("world_size, case", CASES.values(), ids=CASES.keys())
def test_training_equals_one_process(world_size: int, case: Case) -> None:
    case.sequence_parallel = True
    for report in run_ranks(world_size, compare, case):
        assert report["loss"] < 1e-6
        assert report["logits"] < 1e-4
        assert max(report["gradient"].values()) < 1e-4, report["gradient"]
        assert report["type"] is torch.Tensor and report["same"]


def test_all_that_forward_takes_and_gives() -> None:
    for far in run_ranks(2, use_every_input, "gemma2", True):
        assert max(far.values()) < 1e-5, far


class Position(Own):
    """Adds something to the stream between its blocks that no module gives."""

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x) + torch.arange(x.size(1))[:, None]
        return self.head(self.norm(x))


def refused(make: Any) -> tuple[ConfigError, bool]:
    model = make()
    before = [id(parameter) for parameter in model.parameters()]
    try:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        apply_tensor_parallel(model, mesh, plan=OWN_PLAN, sequence_parallel=True)
    except ConfigError as error:
        return error, before == [id(parameter) for parameter in model.parameters()]
    raise AssertionError("nothing is wrong")


def test_a_stream_that_cannot_be_followed_is_refused_with_the_place() -> None:
    for error, is_untouched in run_ranks(2, refused, Position):
        assert is_untouched and error.type == "strategy.sequence_parallel=false"
        assert (
            "the residual stream of Position cannot be followed: it ends in an error in the model (Position)"
            in error.what
        )


class Tied(Own):
    """Two blocks have one parameter."""

    def __init__(self) -> None:
        super().__init__()
        first, second = list(self.layers)[:2]
        path, _, key = next(name for name, _ in first.named_parameters() if "norm" in name).rpartition(".")
        setattr(second.get_submodule(path), key, getattr(first.get_submodule(path), key))


class OneModule(Own):
    """Two blocks have one module."""

    def __init__(self) -> None:
        super().__init__()
        first, second = list(self.layers)[:2]
        key = next(name for name, _ in first.named_children() if "norm" not in name)
        setattr(second, key, getattr(first, key))


@pytest.mark.parametrize(("kind", "said"), [(Tied, "are one parameter, of several blocks"), (OneModule, "are one ")])
def test_what_several_blocks_share_is_not_followed(kind: type[Own], said: str) -> None:
    for error, is_untouched in run_ranks(2, refused, kind):
        assert is_untouched and said in error.what, error
