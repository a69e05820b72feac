"""One training step on a real (small) model: the loss, its scale, and when nothing may be updated."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.runtime.device_meshes import MeshContext
from nemo_dist_conf.runtime.techniques.loss import token_loss_sum
from nemo_dist_conf.train.loop import _settings
from nemo_dist_conf.train.step import train_step

CONTEXT = MeshContext()  # no meshes: one rank
IDS = torch.arange(64).view(8, 8) % 11
LABELS = (IDS + 1) % 11


class Tiny(nn.Module):
    """Takes ids by position and returns plain scores, as a user's module may."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 16, dtype=dtype)
        self.head = nn.Linear(16, 11, dtype=dtype)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens))


def step(
    model: nn.Module, rows: int = 8, labels: torch.Tensor = LABELS, lr: float = 1.0, norm: float | None = None
) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    microbatches = list(zip(IDS.split(rows), labels.split(rows)))
    tokens = int((labels != -100).sum())
    return train_step(model, optimizer, microbatches, CONTEXT, global_tokens=tokens, max_grad_norm=norm)


def test_the_loss_is_the_mean_over_tokens_and_the_update_its_gradient() -> None:
    ours, theirs = Tiny(), Tiny()
    result = step(ours)
    loss = F.cross_entropy(theirs(IDS).flatten(0, 1), LABELS.flatten())
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), math.inf)
    torch.optim.SGD(theirs.parameters(), lr=1.0).step()
    assert result.updated
    assert result.loss == pytest.approx(loss.item(), rel=1e-6)
    assert result.grad_norm == pytest.approx(norm.item(), rel=1e-6)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b)
        assert a.grad is None


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_microbatches_change_nothing(rows: int) -> None:
    whole, pieces = Tiny(), Tiny()
    a, b = step(whole), step(pieces, rows)
    assert (a.loss, a.grad_norm) == pytest.approx((b.loss, b.grad_norm), rel=1e-6)
    for x, y in zip(whole.parameters(), pieces.parameters()):
        torch.testing.assert_close(x, y)


def test_labels_that_do_not_count_are_left_out_evenly_over_microbatches() -> None:
    """The mean is over counted tokens of the whole batch, not a mean of the microbatches' means."""
    labels = LABELS.clone()
    labels[:3] = -100
    labels[5, 2:] = -100
    result = step(Tiny(), rows=2, labels=labels)
    want = F.cross_entropy(Tiny()(IDS).flatten(0, 1), labels.flatten())
    assert result.loss == pytest.approx(want.item(), rel=1e-6)


def test_the_gradient_is_clipped_and_its_norm_told_before() -> None:
    free, clipped = Tiny(), Tiny()
    before = copy.deepcopy(clipped)
    a, b = step(free), step(clipped, norm=0.01)
    assert a.grad_norm == b.grad_norm > 0.01
    moved = torch.cat([(x - y).flatten() for x, y in zip(before.parameters(), clipped.parameters())])
    assert moved.norm().item() == pytest.approx(0.01, rel=1e-3)


def test_the_loss_is_computed_in_float32_for_a_model_in_bfloat16() -> None:
    assert token_loss_sum(Tiny(torch.bfloat16)(IDS), LABELS).dtype == torch.float32


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_nothing_is_updated_where_a_number_is_not_finite(where: str) -> None:
    model = Tiny()
    if where == "loss":
        with torch.no_grad():
            model.head.weight[0, 0] = math.nan
    else:
        model.head.weight.register_hook(lambda gradient: gradient * math.inf)
    before = copy.deepcopy(model)
    result = step(model, norm=1.0)
    assert not result.updated
    assert math.isfinite(result.loss) == (where == "gradient")
    for a, b in zip(model.parameters(), before.parameters()):
        torch.testing.assert_close(a, b, equal_nan=True, rtol=0, atol=0)
        assert a.grad is None


class Wrong(Tiny):
    def forward(self, tokens: torch.Tensor) -> Any:
        scores = super().forward(tokens)
        return {"flat": scores.flatten(0, 1), "short": scores[:, 1:], "word": "scores"}[self.kind]

    kind = "flat"


@pytest.mark.parametrize("kind, got", [("flat", "(64, 11)"), ("short", "(8, 7, 11)"), ("word", "str")])
def test_a_model_that_gives_no_scores_is_refused(kind: str, got: str) -> None:
    model = Wrong()
    model.kind = kind
    with pytest.raises(ConfigError) as error:
        step(model)
    assert got in error.value.what and "[8, 8, vocabulary]" in error.value.allowed


def test_a_transformers_model_is_called_without_a_cache() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(
        "llama", vocab_size=11, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    seen: dict[str, Any] = {}
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True)
    assert step(model, rows=4).updated
    assert seen["use_cache"] is False and seen["input_ids"].shape == (4, 8)


# ---------------------------------------------------------------------------------------------- settings

NODE = {
    "steps": 5,
    "global_batch_size": 4,
    "micro_batch_size": None,
    "max_grad_norm": 1.0,
    "dtype": "float32",
    "log_every": 1,
    "tensorboard": False,
    "warmup_steps": 0,
    "schedule": "constant",
}


def test_good_settings_are_taken_as_they_are() -> None:
    settings = _settings(NODE)
    assert {key: getattr(settings, key) for key in NODE if key != "dtype"} == {
        k: v for k, v in NODE.items() if k != "dtype"
    }


@pytest.mark.parametrize(
    "changes, asked, type_",
    [
        ({"steps": 0}, "train.steps=0", "train.steps=200"),
        ({"steps": None}, "train.steps=null", "train.steps=200"),
        ({"steps": 1.5}, "train.steps=1.5", "train.steps=200"),
        ({"max_grad_norm": -1}, "train.max_grad_norm=-1", "train.max_grad_norm=1.0"),
        ({"max_grad_norm": math.nan}, "train.max_grad_norm=nan", "train.max_grad_norm=1.0"),
        ({"max_grad_norm": True}, "train.max_grad_norm=true", "train.max_grad_norm=1.0"),
        ({"log_every": 0}, "train.log_every=0", "train.log_every=1"),
        ({"log_every": None}, "train.log_every=null", "train.log_every=1"),
        ({"tensorboard": "yes"}, "train.tensorboard=yes", "train.tensorboard=false"),
        ({"global_batch_size": 0}, "train.global_batch_size=0", "train.global_batch_size=1"),
    ],
)
def test_a_wrong_setting_is_refused(changes: dict[str, Any], asked: str, type_: str) -> None:
    with pytest.raises(ConfigError) as error:
        _settings({**NODE, **changes})
    assert (error.value.asked, error.value.type) == (asked, type_)


def test_all_wrong_settings_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        _settings({**NODE, "steps": 0, "log_every": 0, "max_grad_norm": -1})
    assert len(error.value.problems) == 3
