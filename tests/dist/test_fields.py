"""Each field of FSDP2Config and DDPConfig does to a wrapped model what its help text says."""

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import Any, Callable, TypeVar

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.nn.parallel import DistributedDataParallel

from nemo_dist_conf.config import DDPConfig, FSDP2Config
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.gradients import accumulate
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.runtime import compile as block_compile
from nemo_dist_conf.runtime.activation_checkpointing import apply_activation_checkpointing
from nemo_dist_conf.runtime.blocks import find_blocks
from nemo_dist_conf.runtime.fsdp_units import shard_blocks
from nemo_dist_conf.strategies.fsdp2 import FSDP2Manager
from tests.dist.layouts import MODELS, Net, Operators, batch, composed, full_gradients, loss_sum
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist

FP32 = "strategy.mp_policy=null"
TP = "parallelism.tp_size=2"
#: How a field of both strategies is tried: the words that choose each, in float32.
BOTH = pytest.mark.parametrize("words", [("strategy=ddp",), (FP32,)], ids=["ddp", "fsdp2"])

Test = TypeVar("Test", bound=Callable[..., None])
SHOWN: dict[type, set[str]] = {FSDP2Config: set(), DDPConfig: set()}


def shows(field: str, *configs: type) -> Callable[[Test], Test]:
    """Marks a test of a field's effect, for one or both configs."""

    def mark(test: Test) -> Test:
        for config in configs:
            SHOWN[config].add(field)
        return test

    return mark


def net(*words: str, model: str = "module") -> Any:
    """The wrapped model of a rank."""
    return instantiate(composed(*words, model=MODELS[model]))[1]


def inner(model: Any) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else model


def words_of(error: pytest.ExceptionInfo[ConfigError]) -> tuple[str, str]:
    return error.value.what, error.value.type


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
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.blocks[0].down.weight.zero_()
    assert not torch.equal(other(batch()[0]), model(batch()[0]))


# ------------------------------------------------------------------------ what is gathered, and when


def gathered_after_forward(*words: str) -> list[bool]:
    """Whether the parameters of each block, and the root's own, are whole after forward; all are sharded again
    after backward."""
    model = net(FP32, *words)
    loss = loss_sum(model, *batch())
    whole = [not isinstance(m.weight, DTensor) for m in (*(block.up for block in model.blocks), model.embed)]
    loss.backward()
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return whole


@shows("reshard_after_forward", FSDP2Config)
@pytest.mark.parametrize(
    "value, expected",
    [
        ("true", [False, False, False, False]),
        ("false", [True, True, True, True]),
        ("null", [False, False, True, True]),
    ],
)
def test_resharding_frees_gathered_parameters_after_forward(value: str, expected: list[bool]) -> None:
    """null: all but the last block's, which backward needs first; torch keeps the root's for the same reason."""
    for whole in run_ranks(2, gathered_after_forward, f"strategy.reshard_after_forward={value}"):
        assert whole == expected


def gathered_in_pipeline(value: bool | None) -> list[bool]:
    model = Net()
    config = FSDP2Config(reshard_after_forward=value, mp_policy=None)
    shard_blocks(model, find_blocks(model), init_device_mesh("cpu", (2,)), config, in_pipeline=True)
    loss_sum(model, *batch())
    return [not isinstance(block.up.weight, DTensor) for block in model.blocks]


@shows("reshard_after_forward", FSDP2Config)
def test_in_a_pipeline_null_keeps_every_block_for_the_next_microbatch() -> None:
    assert run_ranks(2, gathered_in_pipeline, None) == [[True, True, True]] * 2
    assert run_ranks(2, gathered_in_pipeline, True) == [[False, False, False]] * 2


def prefetch_lists(*words: str) -> dict[str, tuple[list[str], list[str]]]:
    """For each unit, the units that it gathers ahead in forward and in backward."""
    model = net(FP32, *words)
    names = {id(m._get_fsdp_state()): name for name, m in model.named_modules() if isinstance(m, FSDPModule)}
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule):
            state = module._get_fsdp_state()
            ahead = [names[id(other)] for other in state._states_to_forward_prefetch]
            before = [names[id(other)] for other in state._states_to_backward_prefetch if other is not state]
            found[name] = (ahead, before)
    return found


def order(*words: str) -> tuple[str, str]:
    """Gathers (g) and the work of block 0 to 2 in order, in forward and in backward."""
    model = net(FP32, "strategy.reshard_after_forward=true", *words)
    with Operators() as operators:
        calls = operators.calls
        for index, block in enumerate(model.blocks):

            def work(_: nn.Module, args: tuple[Tensor], index: int = index) -> None:
                calls.append((f"work {index}", None))
                args[0].register_hook(lambda _: calls.append((f"work {index}", None)))

            block.down.register_forward_pre_hook(work)
        loss = loss_sum(model, *batch())
        calls.append(("backward", None))
        loss.backward()
    letters = [
        "g" if "allgather" in name else name[-1] if name.startswith("work") else "|" if name == "backward" else ""
        for name, _ in calls
    ]
    forward, backward = "".join(letters).split("|")
    return forward, backward


ON = "strategy.enable_fsdp2_prefetch=true"
FORWARD, BACKWARD = "strategy.fsdp2_forward_prefetch_depth", "strategy.fsdp2_backward_prefetch_depth"


@shows("enable_fsdp2_prefetch", FSDP2Config)
@shows("fsdp2_forward_prefetch_depth", FSDP2Config)
@shows("fsdp2_backward_prefetch_depth", FSDP2Config)
@pytest.mark.parametrize(
    "words, ahead, before",
    [
        ((), [[], [], []], [[], [], []]),
        ((ON,), [["1"], ["2"], []], [[], ["0"], ["1", "0"]]),
        ((ON, f"{FORWARD}=2"), [["1", "2"], ["2"], []], [[], ["0"], ["1", "0"]]),
        ((ON, f"{BACKWARD}=1"), [["1"], ["2"], []], [[], ["0"], ["1"]]),
        ((ON, f"{FORWARD}=0"), [[], [], []], [[], ["0"], ["1", "0"]]),
    ],
    ids=["off", "on", "forward 2", "backward 1", "forward 0"],
)
def test_prefetch_chains_blocks_nearest_first(words: tuple[str, ...], ahead: Any, before: Any) -> None:
    found = run_ranks(2, prefetch_lists, *words)[0]
    units = [found[f"blocks.{index}"] for index in range(3)]
    assert [[name.removeprefix("blocks.") for name in unit[0]] for unit in units] == ahead
    assert [[name.removeprefix("blocks.") for name in unit[1]] for unit in units] == before
    assert found[""] == ([], [])


@shows("enable_fsdp2_prefetch", FSDP2Config)
@shows("fsdp2_forward_prefetch_depth", FSDP2Config)
@shows("fsdp2_backward_prefetch_depth", FSDP2Config)
@pytest.mark.parametrize(
    "words, forward, backward",
    [
        # The first gather of each pass is the root's. In backward torch itself gathers one ahead.
        ((), "gg0g1g2", "ggg2g10"),
        ((ON, f"{FORWARD}=1", f"{BACKWARD}=1"), "ggg0g12", "ggg2g10"),
        ((ON, f"{FORWARD}=2", f"{BACKWARD}=2"), "gggg012", "gggg210"),
        ((ON, f"{FORWARD}=0", f"{BACKWARD}=0"), "gg0g1g2", "gg2g1g0"),
    ],
    ids=["off", "1", "2", "0"],
)
def test_prefetch_gathers_that_many_blocks_ahead(words: tuple[str, ...], forward: str, backward: str) -> None:
    assert run_ranks(2, order, *words) == [(forward, backward)] * 2


# -------------------------------------------------------------------------------- gradient reduction


def reductions(*words: str) -> list[tuple[int, set[bool]]]:
    """For each of three microbatches: reductions, and whether gradients are sharded tensors afterwards."""
    model = net(FP32, *words)
    found = []
    for last in (False, False, True):
        with Operators() as operators, accumulate(model, last=last):
            loss_sum(model, *batch()).backward()
        gradients = [p.grad for p in model.parameters()]
        found.append((operators.count("reduce_scatter"), {isinstance(gradient, DTensor) for gradient in gradients}))
    return found


@shows("defer_fsdp_grad_sync", FSDP2Config)
def test_deferring_reduces_in_the_last_microbatch_only() -> None:
    """Not deferred: gradients are reduced and sharded after each, which takes less memory."""
    units = 4
    assert run_ranks(2, reductions) == [[(0, {False}), (0, {False}), (units, {True})]] * 2
    assert run_ranks(2, reductions, "strategy.defer_fsdp_grad_sync=false") == [[(units, {True})] * 3] * 2


# ------------------------------------------------------------------------------------------ offload


def offloaded(*words: str) -> tuple[set[bool], set[bool], set[str], list[str]]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("nemo_dist_conf")
    logger.addHandler(handler)
    try:
        model = net(FP32, *words)
    finally:
        logger.removeHandler(handler)
    loss_sum(model, *batch()).backward()
    units = [module._get_fsdp_state()._fsdp_param_group for module in model.modules() if isinstance(module, FSDPModule)]
    parameters = [parameter for unit in units for parameter in unit.fsdp_params]
    devices = {tensor.device.type for p in model.parameters() for tensor in (p, p.grad)}
    return {p.offload_to_cpu for p in parameters}, {p.pin_memory for p in parameters}, devices, messages


@shows("offload_policy", FSDP2Config)
def test_offload_reaches_every_unit_and_pins_no_memory_without_a_gpu() -> None:
    """What it means for a GPU's memory is shown in tests/gpu; there is one kind of memory here."""
    for value in ("strategy.offload_policy.enabled=false", "strategy.offload_policy=null"):
        assert run_ranks(1, offloaded, value)[0] == ({False}, {False}, {"cpu"}, [])
    offload, pinned, devices, messages = run_ranks(1, offloaded, "strategy.offload_policy.enabled=true")[0]
    assert (offload, pinned, devices) == ({True}, {False}, {"cpu"})
    assert [message for message in messages if "pin_memory" in message and "it is not pinned" in message]
    on, unpinned = "strategy.offload_policy.enabled=true", "strategy.offload_policy.pin_memory=false"
    assert run_ranks(1, offloaded, on, unpinned)[0] == ({True}, {False}, {"cpu"}, [])


def warnings_of_offload() -> int:
    return len(offloaded("strategy.offload_policy.enabled=true")[3])


def test_only_the_main_rank_warns() -> None:
    assert run_ranks(2, warnings_of_offload) == [1, 0]


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


# ---------------------------------------------------------------------------------------------- DDP


class Counting(nn.Module):
    """Has a buffer that each rank sets on its own, and says what it held in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("mine", torch.full((), float(dist.get_rank() + 1)))

    def forward(self, x_BH: Tensor) -> tuple[Tensor, Tensor]:
        return self.fc(x_BH), self.mine.clone()


def buffer_in_forward(*words: str) -> tuple[float, float]:
    model = instantiate(composed("strategy=ddp", *words), Counting())[1]
    first = float(model(torch.ones(2, 4))[1])
    model.module.mine.fill_(10.0 * (dist.get_rank() + 1))
    return first, float(model(torch.ones(2, 4))[1])


@shows("broadcast_buffers", DDPConfig)
def test_broadcasting_gives_every_forward_rank_0s_buffers() -> None:
    """Without it, wrapping makes them equal once and each rank keeps its own afterwards."""
    assert run_ranks(2, buffer_in_forward) == [(1.0, 10.0), (1.0, 20.0)]
    assert run_ranks(2, buffer_in_forward, "strategy.broadcast_buffers=true") == [(1.0, 10.0), (1.0, 10.0)]


class Branching(nn.Module):
    """Uses one of its branches, by number, so that the other gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x_BH: Tensor, branch: int) -> Tensor:
        return self.branches[branch](x_BH)


def branch_steps(branches: tuple[int, ...], *words: str) -> list[list[bool]] | str:
    """For each step, which branches have a gradient after it; what torch says where a step fails."""
    model = instantiate(composed("strategy=ddp", *words), Branching)[1]
    found = []
    try:
        for branch in branches:
            model.zero_grad()
            model(torch.ones(2, 4), branch).sum().backward()
            weights = [layer.weight.grad for layer in model.module.branches]
            found.append([gradient is not None and bool(gradient.any()) for gradient in weights])
    except RuntimeError as error:
        return str(error)
    return found


@shows("find_unused_parameters", DDPConfig)
def test_a_model_with_unused_parameters_trains_only_where_they_are_looked_for() -> None:
    found = run_ranks(2, branch_steps, (0, 1, 0), "strategy.find_unused_parameters=true")
    assert found == [[[True, False], [False, True], [True, False]]] * 2
    for text in run_ranks(2, branch_steps, (0, 1, 0)):
        assert isinstance(text, str) and "find_unused_parameters=True" in text


@shows("static_graph", DDPConfig)
def test_a_static_graph_learns_in_the_first_step_which_parameters_are_used() -> None:
    """Without the promise the same unused parameters stop the second step."""
    found = run_ranks(2, branch_steps, (0, 0, 0), "strategy.static_graph=true")
    assert found == [[[True, False]] * 3] * 2
    assert all(isinstance(text, str) for text in run_ranks(2, branch_steps, (0, 0, 0)))


def buckets(*words: str) -> tuple[int, set[bool]]:
    """(reductions in the second step, whether gradients share the buckets' memory)."""
    model = net("strategy=ddp", *words)
    for _ in range(2):  # torch rebuilds its buckets after the first backward
        model.zero_grad()
        with Operators() as operators:
            loss_sum(model, *batch()).backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    memory = [gradient.untyped_storage().data_ptr() for gradient in gradients]
    return operators.count("allreduce"), {memory.count(pointer) > 1 for pointer in memory}


@shows("bucket_cap_mb", DDPConfig)
def test_the_size_of_buckets_sets_how_many_reductions_there_are() -> None:
    """Net has 74 KiB of gradients."""
    one, several = run_ranks(2, buckets), run_ranks(2, buckets, "strategy.bucket_cap_mb=0.01")
    assert [count for count, _ in one] == [1, 1]
    assert all(5 <= count <= 12 for count, _ in several)


@shows("gradient_as_bucket_view", DDPConfig)
def test_gradients_live_in_the_buckets_if_asked_to() -> None:
    assert run_ranks(2, buckets) == [(1, {False})] * 2
    assert run_ranks(2, buckets, "strategy.gradient_as_bucket_view=true") == [(1, {True})] * 2


# ------------------------------------------------------------------------------------- completeness


@pytest.mark.parametrize("config", SHOWN, ids=lambda config: config.__name__)
def test_every_field_has_a_test(config: type) -> None:
    assert SHOWN[config] == {field.name for field in dataclasses.fields(config)}
