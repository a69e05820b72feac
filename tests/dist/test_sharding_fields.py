"""Fields of FSDP2Config about what is gathered, reduced and offloaded, and when."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from nemo_dist_conf.config import FSDP2Config
from nemo_dist_conf.gradients import accumulate
from nemo_dist_conf.runtime.engines.fsdp2_units import shard_blocks
from nemo_dist_conf.runtime.model.blocks import find_blocks
from tests.dist.fields import FP32, net, shows
from tests.dist.layouts import Net, Operators, batch, loss_sum
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist


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
    model: Any = Net()
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
    units: list[Any] = [
        module._get_fsdp_state()._fsdp_param_group for module in model.modules() if isinstance(module, FSDPModule)
    ]
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
