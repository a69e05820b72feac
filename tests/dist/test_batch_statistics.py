"""Batch statistics: over all data ranks where asked to, said by name where not, equal on all once they are saved."""

from __future__ import annotations

import copy
import functools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_dist_conf.checkpoint import Checkpoints, buffers
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.instantiate import instantiate
from tests.dist.layouts import composed, full_state
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist

FP32, DDP, GLOBAL = "strategy.mp_policy=null", "strategy=ddp", "batch_statistics=global"
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "one rank": (1, (DDP,)),
    "ddp": (2, (DDP,)),
    "fsdp2": (2, (FP32,)),
    "fsdp2, checkpointed": (2, (FP32, "activation_checkpointing=true")),
    "hsdp": (4, (FP32, "parallelism.dp_replicate_size=2")),
}


class OwnNorm(nn.BatchNorm2d):
    """As libraries derive one: a forward of its own, with something after it."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).relu()


class BareNorm(nn.Module):
    """Calls the function itself, without running statistics."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True) if self.training else x


def normalised(x: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, training=True)


class RoundAboutNorm(nn.Module):
    """Normalises in every way that its forward does not name."""

    mean: Tensor
    var: Tensor

    def __init__(self) -> None:
        super().__init__()
        inner = nn.BatchNorm2d(8)
        self.inner, self.of_inner = inner, inner.forward
        self.bare = functools.partial(F.batch_norm, running_mean=None, running_var=None, training=True)
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.of_inner(x)
        return self._kept(normalised(x.tanh()) + x if self.training else x)

    def _kept(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + 0.5 * self.bare(x.tanh())
        return torch.batch_norm(x, self.scale, None, self.mean, self.var, self.training, 0.1, 1e-5, False)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        instances = nn.InstanceNorm2d(8, track_running_stats=True)
        norms = (nn.BatchNorm2d(8), OwnNorm(8, momentum=None), BareNorm(), instances)
        widths = (3, 8, 8, 8)
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), n) for c, n in zip(widths, norms))
        self.flat = nn.BatchNorm1d(8, affine=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x).tanh()
        return self.head(self.flat(x.mean((2, 3)) * 3))


class Every(Net):
    """With all ways of normalising."""

    def __init__(self) -> None:
        super().__init__()
        self.layers.append(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), RoundAboutNorm()))


def images() -> tuple[Tensor, Tensor]:
    """Rows that differ, so that statistics of some are not those of all; the first rank gets more of them."""
    generator = torch.Generator().manual_seed(0)
    row = torch.arange(12).view(-1, 1, 1, 1)
    x = torch.randn(12, 3, 6, 6, generator=generator) * (row + 1) + row
    return x, torch.randint(0, 4, (12,), generator=generator)


#: Rows of each rank, by how many there are.
SHARES = {1: [12], 2: [7, 5], 4: [4, 2, 3, 3]}


def apart(words: tuple[str, ...]) -> float:
    """How far losses, weights and running statistics are from one process after three steps; unequal rows a rank."""
    torch.manual_seed(0)
    plain = Every()
    given = copy.deepcopy(plain)
    optimizer = lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9)  # noqa: E731
    setup, model, update = instantiate(composed(GLOBAL, *words), given, optimizer)
    context, reference = setup.mesh_context, optimizer(plain.parameters())
    x, labels = images()
    shares = SHARES[context.data_size]
    begin = sum(shares[: context.data_rank])
    rows = slice(begin, begin + shares[context.data_rank])
    worst = 0.0
    for _ in range(3):
        expected = F.cross_entropy(plain(x), labels)
        expected.backward()
        loss = F.cross_entropy(model(x[rows]), labels[rows], reduction="sum") / 12
        (loss * context.data_size).backward()
        found = context.sum_over_data(loss.detach())
        worst = max(worst, abs(float(found - expected)) / float(expected))
        for each in (update, reference):
            each.step()
            each.zero_grad()
    for name, value in full_state(model).items():
        theirs = plain.state_dict()[name]
        worst = max(worst, float((value - theirs).abs().max()) / max(1e-3, float(theirs.abs().max())))
    model.eval()
    return max(worst, float((model(x[rows]) - plain.eval()(x)[rows]).abs().max()))


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "hsdp" not in name])  # conformance has all
def test_global_statistics_are_those_of_one_process(layout: str) -> None:
    ranks, words = LAYOUTS[layout]
    assert max(run_ranks(ranks, apart, words)) < 1e-5


def in_bfloat16(statistics: str) -> tuple[float, torch.dtype, torch.dtype]:
    """(loss, dtype of a norm's weight in forward, of its running mean) under fsdp2's own policy."""
    torch.manual_seed(0)
    setup, model, _ = instantiate(composed(f"batch_statistics={statistics}"), Net(), lambda p: torch.optim.SGD(p, 0.1))
    seen: list[torch.dtype] = []
    model.layers[0][1].register_forward_pre_hook(lambda module, args: seen.append(module.weight.dtype))
    rows = slice(6 * setup.mesh_context.data_rank, 6 * setup.mesh_context.data_rank + 6)
    x, labels = images()
    loss = F.cross_entropy(model(x[rows]).float(), labels[rows])
    loss.backward()
    assert model.layers[0][1].weight.grad is not None
    mean = float(setup.mesh_context.sum_over_data(loss.detach())) / 2
    return mean, seen[0], model.layers[0][1].running_mean.dtype


def test_norms_stay_in_float32_where_the_rest_computes_in_bfloat16() -> None:
    """torch's own takes no bfloat16 weights beside float32 statistics."""
    torch.manual_seed(0)
    x, labels = images()
    expected = float(F.cross_entropy(Net()(x), labels))
    for loss, weight, running in run_ranks(2, in_bfloat16, "global"):
        assert loss == pytest.approx(expected, rel=2e-2)
        assert weight == running == torch.float32
    assert {found[1] for found in run_ranks(2, in_bfloat16, "local")} == {torch.float32}


class Contrasts(Net):
    """As transformers' contrastive models are asked for their loss."""

    def forward(self, x: Tensor, return_loss: bool | None = None) -> Tensor:
        features = super().forward(x)
        return F.cross_entropy(features @ features.T, torch.arange(len(x))) if return_loss else features


def said(words: tuple[str, ...], model: nn.Module | None = None, *forwards: Any) -> list[str]:
    """What is warned of at the start, and when the model is run with each of these second arguments."""
    told: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.append(record.getMessage())

    handler = Handler(logging.WARNING)
    logging.getLogger("nemo_dist_conf").addHandler(handler)
    try:
        wrapped = instantiate(composed(*words), Net() if model is None else model)[1]
        for second in forwards:
            wrapped(images()[0], second)
    finally:
        logging.getLogger("nemo_dist_conf").removeHandler(handler)
    return told


@pytest.mark.parametrize("words", [(DDP,), (FP32,)], ids=["ddp", "fsdp2"])
def test_statistics_of_a_rank_are_said_by_name_with_the_option(words: tuple[str, ...]) -> None:
    first, second = run_ranks(2, said, words)
    (text,) = first
    assert text.startswith("layers.0.1, layers.1.1, layers.2.1 and 2 more (BatchNorm2d, OwnNorm, BareNorm, ")
    assert "batch_statistics=global" in text and second == []
    assert run_ranks(2, said, (*words, GLOBAL)) == [[], []] and run_ranks(1, said, words) == [[]]


@pytest.mark.parametrize("words", [(DDP, GLOBAL), (FP32, GLOBAL)], ids=["ddp", "fsdp2"])
def test_a_loss_that_compares_the_rows_of_a_rank_is_said_once(words: tuple[str, ...]) -> None:
    first, second = run_ranks(2, said, words, Contrasts(), None, True, True)
    (text,) = first
    assert text.startswith("Contrasts: return_loss compares a rank's own rows, so the losses of 2 ranks") and not second
    assert run_ranks(2, said, words, Contrasts(), None, False) == [[], []]
    assert run_ranks(1, said, words, Contrasts(), True) == [[]]


def test_a_word_that_means_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="batch_statistics=all is not one of its values"):
        run_ranks(1, said, (DDP, "batch_statistics=all"))


class Drifting(nn.Module):
    """A buffer of the user's own that each rank moves by what it sees."""

    code: Tensor
    passing: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()
        self.register_buffer("code", torch.zeros(3))
        self.register_buffer("passing", torch.zeros(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.code += x.mean((0, 2, 3))
        self.passing += x.mean()
        return self.net(x)


def saved(folder: str, words: tuple[str, ...]) -> tuple[dict[str, Tensor], Tensor, Tensor, list[str]]:
    """(buffers once they were saved, outputs in evaluation before and after a restore, what was said)."""
    torch.manual_seed(0)
    told: list[str] = []
    buffers._say.cache_clear()

    def keep(entry: logging.LogRecord) -> bool:
        told.append(entry.getMessage())
        return True

    record = logging.getLogger("nemo_dist_conf.checkpoint.buffers")
    record.addFilter(keep)
    setup, model, optimizer = instantiate(composed(*words), Drifting(), lambda p: torch.optim.SGD(p, 0.1))
    x, _ = images()
    rank = setup.mesh_context.data_rank
    for _ in range(2):
        model(x[rank::2]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    with Checkpoints(folder) as checkpoints:
        checkpoints.save(2, model, optimizer)
        checkpoints.save(3, model, optimizer)
    found = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.eval()
    with torch.no_grad():
        before = model(x)
        model.train()(x * (rank + 1))  # moves them again
        with Checkpoints(folder) as checkpoints:
            checkpoints.restore(model, optimizer)
        after = model.eval()(x)
    record.filters.clear()
    return found, before, after, told


@pytest.mark.parametrize("words", [(DDP,), (FP32,)], ids=["ddp", "fsdp2"])
def test_buffers_of_ranks_are_made_equal_when_they_are_saved(words: tuple[str, ...], tmp_path: Path) -> None:
    (one, before, after, told), (other, *outputs, _) = run_ranks(2, saved, str(tmp_path), words)
    for name, buffer in one.items():
        assert torch.equal(buffer, other[name]) or name.endswith("passing"), name
    assert torch.equal(before, outputs[0]) and torch.equal(after, outputs[1])
    torch.testing.assert_close(before, after)
    assert any("net.layers.0.1.running_mean" in text and "averaged" in text for text in told)
    assert [text for text in told if "rank 0's" in text and "code" in text]
    assert len(told) == 2  # once, however often it is saved


def means(words: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """(running mean of the first norm after two steps without updates, made equal; that of one process)."""
    torch.manual_seed(0)
    plain: Any = Net()
    setup, model, _ = instantiate(composed(*words), copy.deepcopy(plain))
    x, _ = images()
    for _ in range(2):
        plain(x)
        model(x[setup.mesh_context.data_rank :: setup.mesh_context.data_size])
    buffers.make_buffers_equal(model)
    find: Any = dict(model.named_buffers())
    name = next(name for name in find if name.endswith("layers.0.1.running_mean"))
    return find[name], plain.layers[0][1].running_mean


def test_the_mean_of_running_means_is_that_of_all_rows() -> None:
    for words in ((DDP,), (FP32,)):
        for found, expected in run_ranks(2, means, words):
            torch.testing.assert_close(found, expected)


def test_a_norm_that_a_forward_does_not_name_is_said_too() -> None:
    (text,) = run_ranks(2, said, (DDP,), RoundAboutNorm())[0]
    assert text.startswith("the model, inner (RoundAboutNorm, BatchNorm2d): statistics of a rank's own rows")


@pytest.mark.parametrize("words", [(DDP,), (FP32,)], ids=["ddp", "fsdp2"])
def test_norms_that_only_gpus_have_are_refused_before_a_step(words: tuple[str, ...]) -> None:
    model = nn.SyncBatchNorm.convert_sync_batchnorm(Net())
    with pytest.raises(ConfigError, match=r"SyncBatchNorm \(layers\.0\.1 and 2 more\) runs on GPUs only") as refused:
        run_ranks(2, said, words, model)
    assert refused.value.type.startswith("batch_statistics=global, and torch.nn.BatchNorm1d")
