"""Attention over whole sequences against plain products and softmax, and how its memory grows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_dist_conf.runtime.techniques.context import whole_attention
from nemo_dist_conf.runtime.techniques.context.mask_rules import (
    Around,
    Behind,
    Both,
    Causal,
    Chunks,
    Documents,
    Either,
    Everything,
    Packed,
    Rule,
    Unpadded,
)
from nemo_dist_conf.runtime.techniques.context.whole_attention import Scores, attend

B, H, K, S, N, D = 2, 4, 2, 24, 6, 8
DOCUMENTS = Documents.of(torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ([5, 9, 10], [24])]))
assert DOCUMENTS is not None
RULES: dict[str, Rule] = {
    "everything": Everything(),
    "causal": Causal(),
    "window": Both((Behind(5), Causal())),
    "window both ways": Around(3),
    "chunks": Both((Chunks(4), Causal())),
    "documents": Packed(Both((Behind(3), Causal())), DOCUMENTS),
    "padded": Both((Causal(), Unpadded(torch.arange(S).expand(B, -1) % 7 != 3))),
    "one of two": Either((Causal(), Around(4))),
}


def plainly(query: Tensor, key: Tensor, value: Tensor, start: int, rule: Rule, scores: Scores) -> Tensor:
    rows, heads, count, width = query.shape
    length = key.size(2)
    key, value = (part.repeat_interleave(heads // key.size(1), 1) for part in (key, value))
    score = query @ key.mT * (width**-0.5 if scores.scale is None else scores.scale)
    if scores.cap is not None:
        score = scores.cap * torch.tanh(score / scores.cap)
    if scores.bias is not None:
        score = score + scores.bias
    places = torch.arange(start, start + count).view(1, 1, -1, 1)
    seen = rule.seen(torch.arange(rows).view(-1, 1, 1, 1), places, torch.arange(length).view(1, 1, 1, -1))
    score = score.masked_fill(~seen, -torch.inf)
    if scores.sinks is not None:
        score = torch.cat([score, scores.sinks.view(1, -1, 1, 1).expand(rows, -1, count, 1)], -1)
    return score.softmax(-1)[..., :length] @ value


@pytest.mark.parametrize("blocks", ["kernels", "large blocks", "small blocks"])
@pytest.mark.parametrize("name", RULES)
def test_forward_and_gradients_are_those_of_plain_attention(
    name: str, blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """kernels: with a small mask, where it is as fast."""
    if blocks != "kernels":
        monkeypatch.setattr(whole_attention, "_MASK_ELEMENTS", 0)
    if blocks == "small blocks":
        monkeypatch.setattr(whole_attention, "_BLOCK_ELEMENTS", 64)
        monkeypatch.setattr(whole_attention, "_BLOCK_QUERIES", 4)
    torch.manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, requires_grad=True)

    variants: list[dict[str, Any]] = [
        {},
        {"scale": 0.7, "cap": 1.5, "sinks": drawn(H), "bias": drawn(1, H, N, S)},
        {"bias": drawn(B, 1, 1, S)},
    ]
    for start in (0, 6, 18):
        for options in variants:
            for width in (D, 5):
                inputs = [drawn(B, H, N, D), drawn(B, K, S, D), drawn(B, K, S, width)]
                scores = Scores(**options)
                query, key, value = inputs
                wanted = plainly(query, key, value, start, RULES[name], scores)
                found = attend(query, key, value, start, RULES[name], scores)
                torch.testing.assert_close(found, wanted)
                inputs += [value for value in options.values() if isinstance(value, Tensor)]
                gradient = torch.randn_like(wanted)
                both = (torch.autograd.grad(out, inputs, gradient) for out in (found, wanted))
                for one, other in zip(*both):
                    torch.testing.assert_close(one, other)


def test_weights_that_drop_out_are_the_same_in_forward_and_backward() -> None:
    """The mean over many draws is what it is without, and the gradient is that of the function that was drawn."""
    torch.manual_seed(0)
    query, key = (torch.randn(1, 1, 8, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    value = torch.eye(8, dtype=torch.float64).view(1, 1, 8, 8).requires_grad_()
    scores, rule = Scores(dropout=0.5), Both((Behind(5), Causal()))

    def dropped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        torch.manual_seed(1)
        return whole_attention._in_blocks(query, key, value, 0, rule, scores)

    assert torch.autograd.gradcheck(dropped, (query, key, value))
    weights = dropped(query, key, value)
    assert 5 < int((weights == 0).tril().sum()) - int((attend(query, key, value, 0, rule) == 0).tril().sum()) < 30
    mean = torch.stack([whole_attention._in_blocks(query, key, value, 0, rule, scores) for _ in range(500)]).mean(0)
    torch.testing.assert_close(mean, attend(query, key, value, 0, rule), atol=0.15, rtol=0)


@pytest.mark.parametrize("name", ["causal", "window", "chunks", "soft cap", "documents"])
def test_memory_grows_with_the_sequence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of forward and backward; a mask of queries x keys makes four times as much of twice the length."""
    monkeypatch.setattr(whole_attention, "_MASK_ELEMENTS", 2**14)
    monkeypatch.setattr(whole_attention, "_BLOCK_ELEMENTS", 2**18)
    peaks = []
    for length in (2048, 4096):
        documents = Documents.of(torch.arange(length).remainder(300).unsqueeze(0))
        assert documents is not None
        rule: Rule = {
            "causal": Causal(),
            "window": Both((Behind(100), Causal())),
            "chunks": Both((Chunks(512), Causal())),
            "soft cap": Causal(),
            "documents": Packed(Causal(), documents),
        }[name]
        peaks.append(peak_bytes(length, rule, Scores(cap=2.0 if name == "soft cap" else None)))
    assert peaks[1] < 2.6 * peaks[0]


def peak_bytes(length: int, rule: Rule, scores: Scores) -> int:
    from torch.distributed._tools.mem_tracker import MemTracker

    query, key, value = (torch.randn(1, 2, n, 16, requires_grad=True) for n in (length // 2, length, length))
    with MemTracker() as tracker:
        attend(query, key, value, length // 2, rule, scores).sum().backward()
        return int(tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"])
