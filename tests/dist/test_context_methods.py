"""How attention sees the tokens of other cp ranks: keys and values gathered, or tokens exchanged for heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nemo_dist_conf.runtime.techniques.context.exchange import Exchange, exchanged_attention
from nemo_dist_conf.runtime.techniques.context.mask_rules import (
    Behind,
    Both,
    Causal,
    Documents,
    Everything,
    Packed,
    Unpadded,
)
from nemo_dist_conf.runtime.techniques.context.parallel import split_sequence
from nemo_dist_conf.runtime.techniques.context.whole_attention import Scores
from tests.dist.pool import run_ranks
from tests.runtime.techniques.test_whole_attention import plainly

pytestmark = pytest.mark.dist

ROWS, TOKENS, WIDTH = 2, 24, 6
DOCUMENTS = Documents.of(torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ([5, 9, 10], [24])]))
assert DOCUMENTS is not None
RULES: dict[str, Any] = {
    "causal": Causal(),
    "everything": Everything(),
    "window": Both((Behind(5), Causal())),
    "documents": Packed(Causal(), DOCUMENTS),
    "padded": Both((Causal(), Unpadded(torch.arange(TOKENS).expand(ROWS, -1) % 7 != 3))),
}
#: (heads of queries, of keys); with 2 and 4 ranks the keys are divided, sent once to each rank, or in copies.
HEADS = ((4, 4), (8, 2), (12, 3), (4, 1))


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def _own(tensor: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    return split_sequence(tensor, mesh, dim)


def _variants(heads: int) -> list[dict[str, Any]]:
    return [
        {},
        {"scale": 0.7, "cap": 1.5, "sinks": _drawn(heads)},
        {"bias": _drawn(1, heads, TOKENS, TOKENS)},
        {"bias": _drawn(1, 1, TOKENS, TOKENS)},
        {"bias": _drawn(ROWS, heads, 1, TOKENS)},
        {"bias": _drawn(ROWS, 1, 1, TOKENS)},
    ]


def _apart(method: str, kv_value_width: int = 5) -> float:
    """The worst difference of an output or a gradient from plain attention over whole rows."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    exchange = Exchange(mesh, method, lengths={TOKENS // mesh.size()})
    torch.manual_seed(0)
    worst = 0.0
    for heads, kv_heads in HEADS:
        for number, options in enumerate(_variants(heads)):
            for rule in RULES.values() if number < 2 else [RULES["causal"]]:
                query, key = _drawn(ROWS, heads, TOKENS, WIDTH), _drawn(ROWS, kv_heads, TOKENS, WIDTH)
                value = _drawn(ROWS, kv_heads, TOKENS, kv_value_width)
                given = [query, key, value, *(options[name] for name in ("bias", "sinks") if name in options)]
                weights = torch.randn(ROWS, heads, TOKENS, kv_value_width, dtype=torch.float64)
                wanted = plainly(query, key, value, 0, rule, Scores(**options))
                expected = torch.autograd.grad((wanted * weights).sum(), given)
                bias = options.get("bias")
                if bias is not None and bias.size(2) > 1:
                    bias = _own(bias, mesh, 2)
                q, k, v = (_own(part, mesh, 2) for part in (query, key, value))
                found, _ = exchanged_attention(
                    exchange,
                    nn.Module(),
                    q,
                    k,
                    v,
                    rule,
                    scaling=options.get("scale"),
                    softcap=options.get("cap"),
                    s_aux=options.get("sinks"),
                    position_bias=bias,
                )
                gradients = torch.autograd.grad((found * _own(weights, mesh, 2).transpose(1, 2)).sum(), given)
                for gradient in gradients:
                    torch.distributed.all_reduce(gradient)
                pairs = [(found.transpose(1, 2), _own(wanted, mesh, 2)), *zip(gradients, expected, strict=True)]
                worst = max(worst, *(float((one - other).abs().max()) for one, other in pairs))
    return worst


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("method", ["gather", "ulysses"])
def test_output_and_gradients_are_those_of_whole_rows(method: str, ranks: int) -> None:
    """Whatever the heads, the mask, sinks, soft caps and biases."""
    assert max(run_ranks(ranks, _apart, method)) < 1e-10
