"""Each field of FSDP2Config and DDPConfig does to a wrapped model what its help text says.

Those about sharding and about DDP's reducer are in modules of their own, which are imported here to be counted.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

from nemo_dist_conf.config import DDPConfig, FSDP2Config
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.runtime.model.blocks import find_blocks
from nemo_dist_conf.runtime.techniques import compile as block_compile
from nemo_dist_conf.runtime.techniques.activation_checkpointing import apply_activation_checkpointing
from nemo_dist_conf.strategies.fsdp2 import FSDP2Manager
from tests.dist import test_ddp_fields, test_sharding_fields  # noqa: F401
from tests.dist.fields import BOTH, FP32, SHOWN, TP, inner, net, shows, words_of
from tests.dist.layouts import Net, Operators, batch, composed, full_gradients, loss_sum
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist


# ------------------------------------------------------------------------------------------- dtypes


class Regression(nn.Module):
    """Takes floating point inputs, and says in what dtype they arrived."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)

    def forward(self, x_BH: Tensor) -> tuple[Tensor, Tensor]:
        return x_BH, self.fc(x_BH.to(self.fc.weight.dtype))


def dtypes(*words: str) -> dict[str, set[Any]]:
    """Where which dtypes were seen in one forward and backward of Net."""
    model = net(*words)
    seen: dict[str, set[Any]] = {"inside": set(), "linear": set(), "gathered": set()}

    def look(module: nn.Linear, args: tuple[Tensor], output: Tensor) -> None:
        seen["inside"].add(args[0].dtype)
        seen["linear"].add(output.dtype)
        seen["gathered"].add(module.weight.dtype)

    for block in inner(model).blocks:
        block.down.register_forward_hook(look)
    with Operators() as operators:
        output = model(batch()[0])
        output.float().sum().backward()
    return {
        **seen,
        "output": {output.dtype},
        "stored": {parameter.dtype for parameter in model.parameters()},
        "gradients": {parameter.grad.dtype for parameter in model.parameters()},
        "sent": operators.dtypes("reduce_scatter"),
    }


#: words -> dtypes of: activations and gathered parameters of a block, the model's output, what is sent to reduce
POLICIES: dict[tuple[str, ...], tuple[torch.dtype, torch.dtype, torch.dtype]] = {
    (): (torch.bfloat16, torch.bfloat16, torch.float32),
    (FP32,): (torch.float32, torch.float32, torch.float32),
    ("strategy.mp_policy.enabled=false",): (torch.float32, torch.float32, torch.float32),
    ("strategy.mp_policy.output_dtype=float32",): (torch.bfloat16, torch.float32, torch.float32),
    ("strategy.mp_policy.output_dtype=null",): (torch.bfloat16, torch.bfloat16, torch.float32),
    ("strategy.mp_policy.reduce_dtype=bfloat16",): (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ("strategy.mp_policy.reduce_dtype=null",): (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    ("strategy.mp_policy.param_dtype=float16", "strategy.mp_policy.output_dtype=float32"): (
        torch.float16,
        torch.float32,
        torch.float32,
    ),
    ("strategy.mp_policy.param_dtype=null", "strategy.mp_policy.output_dtype=null"): (
        torch.float32,
        torch.float32,
        torch.float32,
    ),
}


@shows("mp_policy", FSDP2Config)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("words", POLICIES, ids=["-".join(w.rpartition(".")[2] for w in words) for words in POLICIES])
def test_a_policy_sets_the_dtypes_of_compute_reduction_and_output(words: tuple[str, ...], ranks: int) -> None:
    """What the optimizer holds stays float32; one rank computes as many do, only that it sends nothing."""
    compute, output, sent = POLICIES[words]
    for seen in run_ranks(ranks, dtypes, *words):
        assert seen["inside"] == seen["linear"] == seen["gathered"] == {compute}
        assert seen["output"] == {output}
        assert seen["stored"] == seen["gradients"] == {torch.float32}
        assert seen["sent"] == ({sent} if ranks > 1 else set())


def input_dtype(*words: str) -> torch.dtype:
    model = instantiate(composed(*words), Regression)[1]
    return model(torch.ones(2, 8))[0].dtype


@shows("mp_policy", FSDP2Config)
def test_inputs_are_cast_unless_the_policy_says_no() -> None:
    keep = ("strategy.mp_policy.cast_forward_inputs=false", "strategy.mp_policy.output_dtype=null")
    assert run_ranks(1, input_dtype, keep[1]) == [torch.bfloat16]
    assert run_ranks(1, input_dtype, *keep) == [torch.float32]


@shows("autocast_dtype", FSDP2Config, DDPConfig)
@BOTH
def test_autocast_computes_in_its_dtype_and_stores_in_float32(words: tuple[str, ...]) -> None:
    seen = run_ranks(1, dtypes, *words, "strategy.autocast_dtype=bfloat16")[0]
    assert seen["linear"] == seen["output"] == {torch.bfloat16}
    assert seen["gathered"] == seen["stored"] == seen["gradients"] == {torch.float32}
    assert run_ranks(1, dtypes, *words)[0]["linear"] == {torch.float32}


# ---------------------------------------------------------------------------- activation checkpointing


def recomputation(*words: str) -> tuple[int, int, int]:
    """(forwards of a block's first layer, matmuls, activation functions) in one step of Net, three blocks deep."""
    model = net(*words)
    forwards = []
    inner(model).blocks[1].norm.register_forward_hook(lambda *_: forwards.append(1))
    with Operators() as operators:
        loss_sum(model, *batch()).backward()
    return len(forwards), operators.count("aten.mm.", "aten.addmm."), operators.count("aten.silu.")


@shows("activation_checkpointing", FSDP2Config, DDPConfig)
@BOTH
def test_checkpointing_recomputes_blocks_and_selective_keeps_their_matmuls(words: tuple[str, ...]) -> None:
    kept = run_ranks(1, recomputation, *words)[0]
    assert kept[0] == 1 and kept[2] == 3
    full = run_ranks(1, recomputation, *words, "activation_checkpointing=true")[0]
    # The last matmul of a block is not needed again for anything: torch stops the recomputation before it.
    assert full == (2, kept[1] + 3, 6)
    assert run_ranks(1, recomputation, *words, "strategy.activation_checkpointing=true")[0] == full
    selective = run_ranks(1, recomputation, *words, "activation_checkpointing=selective")[0]
    assert selective == (2, kept[1], 6)


def test_a_copy_of_a_checkpointed_model_runs_its_own_blocks() -> None:
    model = Net()
    apply_activation_checkpointing(model, find_blocks(model), True)
    other: Any = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[0].down.weight.zero_()
    assert not torch.equal(other(batch()[0]), model(batch()[0]))


# ------------------------------------------------------------------------------------------ compile


def compiled(*words: str) -> tuple[list[str], dict[str, Tensor], int, int]:
    """(names of compiled modules, gradients, graphs compiled, breaks) with a compiler that needs no C++."""
    backend = block_compile.BACKEND
    block_compile.BACKEND = "aot_eager"
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    try:
        model = net(*words)
        loss_sum(model, *batch()).backward()
        counters = torch._dynamo.utils.counters
        names = [name for name, m in inner(model).named_modules() if m._compiled_call_impl is not None]
        graphs = counters["stats"]["unique_graphs"]
        return names, full_gradients(model), graphs, len(counters["graph_break"])
    finally:
        block_compile.BACKEND = backend
        torch._dynamo.reset()


@shows("enable_compile", FSDP2Config)
@pytest.mark.parametrize("words", [(), ("activation_checkpointing=true",)], ids=["alone", "checkpointing"])
def test_compile_compiles_each_block_and_changes_no_result(words: tuple[str, ...]) -> None:
    names, gradients, graphs, breaks = run_ranks(2, compiled, FP32, *words, "strategy.enable_compile=true")[0]
    assert names == ["blocks.0", "blocks.1", "blocks.2"]
    assert graphs >= 1 and breaks == 0
    nothing, expected, no_graphs, _ = run_ranks(2, compiled, FP32, *words)[0]
    assert nothing == [] and no_graphs == 0
    torch.testing.assert_close(gradients, expected)


# ------------------------------------------------------------------------- tensor and sequence parallel


def norm_inputs(*words: str) -> tuple[int, ...]:
    """Shape of what a block's norm computes on in this rank."""
    model = net(FP32, TP, *words, model="llama")
    shapes = []
    model.model.layers[1].input_layernorm.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    loss_sum(model, *batch())
    assert len(shapes) == 1
    return shapes[0]


@shows("sequence_parallel", FSDP2Config)
def test_sequence_parallelism_splits_norms_over_the_sequence() -> None:
    rows, tokens = batch()[0].shape
    assert run_ranks(2, norm_inputs) == [(rows, tokens, 64)] * 2
    assert run_ranks(2, norm_inputs, "strategy.sequence_parallel=true") == [(rows, 8, 64), (rows, tokens - 8, 64)]


def tensor_shards(*words: str) -> dict[str, tuple[int, ...]]:
    """Shape of this rank's part of each parameter of a block."""
    model = net(FP32, TP, *words)
    return {name: tuple(p.to_local().shape) for name, p in model.blocks[1].named_parameters()}


def tensor_shards_in_python() -> dict[str, tuple[int, ...]]:
    plan = {"blocks.*.up": ColwiseParallel(), "blocks.*.down": RowwiseParallel()}
    mesh = init_device_mesh("cpu", (1, 1, 1, 1, 2), mesh_dim_names=("pp", "dp_replicate", "dp_shard", "cp", "tp"))
    model = FSDP2Manager(FSDP2Config(tp_plan=plan, mp_policy=None), mesh).parallelize(Net())
    loss_sum(model, *batch()).backward()
    return {name: tuple(p.to_local().shape) for name, p in model.blocks[1].named_parameters()}


@shows("tp_plan", FSDP2Config)
def test_a_plan_splits_the_layers_it_names() -> None:
    plan = "strategy.tp_plan={blocks.*.up:colwise,blocks.*.down:rowwise}"
    split = {"up.weight": (32, 32), "up.bias": (32,), "down.weight": (32, 32), "norm.weight": (32,), "norm.bias": (32,)}
    assert run_ranks(2, tensor_shards, plan) == [split] * 2
    assert run_ranks(2, tensor_shards_in_python) == [split] * 2
    whole = run_ranks(2, tensor_shards, "strategy.tp_plan={head:colwise_gather_output}")[0]
    assert whole == split | {"up.weight": (64, 32), "up.bias": (64,), "down.weight": (32, 64)}


@shows("tp_plan", FSDP2Config)
def test_a_module_without_a_plan_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        run_ranks(2, tensor_shards)
    what, instead = words_of(error)
    assert "no tensor-parallel plan is known for Net" in what and "strategy.tp_plan={" in instead


@shows("enable_async_tensor_parallel", FSDP2Config)
def test_async_tensor_parallelism_is_refused_without_a_gpu() -> None:
    words = ("strategy.sequence_parallel=true", "strategy.enable_compile=true")
    with pytest.raises(ConfigError) as error:
        run_ranks(2, norm_inputs, *words, "strategy.enable_async_tensor_parallel=true")
    what, instead = words_of(error)
    assert "on the CPU" in what and instead == "strategy.enable_async_tensor_parallel=false"


# ------------------------------------------------------------------------------------ transformers


def packed(*words: str) -> bool:
    """What transformers answers for a batch of two packed sequences."""
    from transformers import modeling_flash_attention_utils as flash

    original = flash._is_packed_sequence
    try:
        net(*words, model="llama")
        return bool(flash._is_packed_sequence(torch.tensor([[0, 1, 2, 0, 1]]), 1))
    finally:
        flash._is_packed_sequence = original  # the rank serves other tests


PATCH = "strategy.patch_is_packed_sequence=true"


@shows("patch_is_packed_sequence", FSDP2Config)
def test_the_patch_answers_that_no_batch_is_packed() -> None:
    assert run_ranks(1, packed) == [True]
    assert run_ranks(1, packed, PATCH) == [False]


def refused(*words: str) -> str:
    with pytest.raises(ConfigError) as error:
        net(*words)
    return str(error.value)


@shows("patch_is_packed_sequence", FSDP2Config)
def test_the_patch_is_refused_for_a_model_that_it_cannot_reach() -> None:
    text = run_ranks(1, refused, PATCH)[0]
    assert "Net is not a model of transformers" in text and "type     strategy.patch_is_packed_sequence=false" in text


# ------------------------------------------------------------------------------------- completeness


@pytest.mark.parametrize("config", SHOWN, ids=lambda config: config.__name__)
def test_every_field_has_a_test(config: type) -> None:
    assert SHOWN[config] == {field.name for field in dataclasses.fields(config)}
