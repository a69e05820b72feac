"""How attention sees the tokens of other cp ranks: keys and values gathered, or tokens exchanged for heads."""

from __future__ import annotations

import functools
from typing import Any, Callable

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nemo_dist_conf.errors import ConfigError
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
from nemo_dist_conf.runtime.techniques.context.trial import try_context_parallel
from nemo_dist_conf.runtime.techniques.context.whole_attention import Scores
from nemo_dist_conf.runtime.torch_inside import name_attention, names_attention
from tests.conformance.of_context import DELTA, EXPERTS, built, compared, documents, on_megatron
from tests.dist.pool import run_ranks
from tests.dist.test_context_parallel import FP32, ULYSSES, own_model
from tests.runtime.techniques.test_whole_attention import plainly
from tests.zoo.axes import compiled_without_cpp

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


def _dropped(method: str) -> tuple[float, float]:
    """The mean of what is kept of values of 1, and how much of it is not 1."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    exchange = Exchange(mesh, method, lengths={256})
    torch.manual_seed(mesh.get_local_rank())
    query, key, value = torch.randn(2, 4, 256, 8), torch.randn(2, 2, 256, 8), torch.ones(2, 2, 256, 1)
    found, _ = exchanged_attention(exchange, nn.Module(), query, key, value, Everything(), dropout=0.5)
    kept, _ = exchanged_attention(exchange, nn.Module().eval(), query, key, value, Everything(), dropout=0.5)
    assert kept.eq(kept.flatten()[0]).all() or float((kept - 1).abs().max()) < 1e-5
    return float(found.mean()), float((found - 1).abs().max())


@pytest.mark.parametrize("method", ["gather", "ulysses"])
def test_weights_are_dropped_in_training_alone_and_the_mean_stays(method: str) -> None:
    for mean, most in run_ranks(2, _dropped, method):
        assert mean == pytest.approx(1, abs=0.02) and most > 0.05


OWN = ("registry", "both ways", "bias of keys", "window")


def test_models_of_ones_own_equal_one_process() -> None:
    """Whatever they hand to the attention that they ask for: no mask, a bias, a mask of theirs."""
    for mixer in OWN:
        assert max(run_ranks(2, compared, functools.partial(own_model, mixer), (FP32, ULYSSES))) < 1e-5


def test_packed_documents_and_other_strategies_equal_one_process() -> None:
    make, rows = functools.partial(built, "gemma2", {"sliding_window": 5}), documents((11, 21), (32,))
    assert max(run_ranks(2, compared, make, (FP32, ULYSSES), rows)) < 1e-5
    assert max(run_ranks(2, on_megatron, make, ULYSSES)) < 1e-5


def _compiled(make: Callable[[], nn.Module]) -> float:
    with compiled_without_cpp():
        return compared(make, (FP32, ULYSSES, "strategy.enable_compile=true"))


def test_compiled_blocks_equal_one_process() -> None:
    assert max(run_ranks(2, _compiled, functools.partial(built, "llama", {}))) < 1e-5


def _flash(make: Callable[[], nn.Module]) -> nn.Module:
    """As on a machine that has flash attention."""
    model: Any = make()
    for module in model.modules():
        if names_attention(getattr(module, "config", None)):
            name_attention([(module.config, "flash_attention_2")])
    return model


def _tried(make: Callable[[], nn.Module], method: str, tp: int) -> str:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    try:
        try_context_parallel(make(), mesh, method=method, tp=tp)
    except ConfigError as refusal:
        return f"{refusal.what} | {refusal.type}"
    return "tried"


GPTJ = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "rotary_dim": 4}
REFUSED: dict[str, tuple[Callable[[], nn.Module], str, int, str]] = {
    "heads of a family": (
        functools.partial(built, "llama", {"num_key_value_heads": 4}),
        "ulysses",
        4,
        "LlamaForCausalLM has 1 head on a rank, which cp_size=2 does not divide | context.method=gather",
    ),
    "heads of an own model": (
        functools.partial(own_model, "registry"),
        "ulysses",
        4,
        "OwnAttention has 1 head on a rank, which cp_size=2 does not divide | context.method=gather",
    ),
    "nothing attends": (
        functools.partial(own_model, "pooled"),
        "ulysses",
        1,
        "nothing of Own asks the attention registry of transformers | context.method=gather",
    ),
    "a kernel without masks": (
        functools.partial(_flash, functools.partial(built, "gptj", GPTJ)),
        "auto",
        1,
        "(GPTJAttention) is run on whole rows, with a mask that flash_attention_2 does not take | "
        "parallelism.cp_size=1",
    ),
    "recurrent layers that are given no mask, beside one": (
        functools.partial(_flash, functools.partial(built, "qwen3_next", {**EXPERTS, **DELTA})),
        "auto",
        1,
        "tried",
    ),
    "heads that auto gathers": (functools.partial(own_model, "registry"), "auto", 4, "tried"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_model_cannot_have_is_refused_before_it_is_wrapped(name: str) -> None:
    make, method, tp, text = REFUSED[name]
    for found in run_ranks(2, _tried, make, method, tp):
        assert found.endswith(text)
