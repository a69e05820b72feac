"""Kinds of models that need something of their own, beyond the table of tests/conformance/of_kinds.py."""

from __future__ import annotations

import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.instantiate import instantiate
from tests.dist.kinds import KINDS, Block, Scale, Stack
from tests.dist.layouts import composed
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist

FP32 = "strategy.mp_policy=null"


def held(kind: str) -> tuple[list[str], list[str]]:
    """(names of FSDP's units, names of parameters that stay whole)."""
    model = instantiate(composed(FP32), KINDS[kind]()[0])[1]
    units = [name for name, module in model.named_modules() if isinstance(module, FSDPModule) and name]
    return units, [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]


def test_what_cannot_be_in_a_unit_stands_elsewhere() -> None:
    """And nothing else does: what is left out costs memory."""
    assert run_ranks(2, held, "shared_layer")[0] == (["blocks.1"], [])
    assert run_ranks(2, held, "bert_decoder")[0] == (["bert.encoder.layer.0", "bert.encoder.layer.1"], [])
    blocks = ["blocks.0", "blocks.1", "blocks.2"]
    scalars = ["temperature", *(f"{name}.inner.factor" for name in blocks)]
    assert run_ranks(2, held, "scalars")[0] == (blocks, scalars)
    norms = [name for block in blocks for name in (block, f"{block}.norm")]
    assert run_ranks(2, held, "two_dtypes")[0] == (norms, [])
    assert run_ranks(2, held, "dtypes_in_one_module")[0] == (blocks[:2], ["blocks.0.inner.bias", "blocks.1.inner.bias"])


def given(kind: str, *words: str) -> None:
    instantiate(composed(*words), KINDS[kind]()[0])


def test_several_dtypes_in_a_module_cannot_be_cast() -> None:
    with pytest.raises(ConfigError, match="strategy.mp_policy=null"):
        run_ranks(2, given, "dtypes_in_one_module")


class Filtered(Stack):
    """Complex numbers, which a cast would leave the half of."""

    def __init__(self) -> None:
        super().__init__(Filter(), Filter())


class Filter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.weight).real


class Positioned(Stack):
    """A buffer in float32 between blocks and head."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(0, 1, 8))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) + self.table
        return self.head(x)


def computed(kind: type[Stack], *words: str) -> None:
    instantiate(composed(*words), kind())[1](torch.ones(2, 8))


@pytest.mark.parametrize(("kind", "said"), [(Filtered, "Filter has complex"), (Positioned, "same dtype")])
def test_what_cannot_be_computed_in_bfloat16_is_refused(kind: type[Stack], said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}.*type     strategy.mp_policy=null"):
        run_ranks(2, computed, kind)
    run_ranks(2, computed, kind, FP32)


def hooked() -> Stack:
    model = Stack()
    model.head.weight.register_hook(lambda gradient: gradient * 2)
    return model


def stepped() -> Stack:
    model = Stack()
    model.head.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    return model


def scripted() -> Stack:
    model = Stack()
    model.head = torch.jit.script(nn.Linear(8, 8))  # type: ignore[assignment]
    return model


class Looked(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(8, 8, max_norm=1.0)


#: (model, strategies that cannot have it, what is said)
NOT_EVERYWHERE: list[tuple[Any, set[str], str]] = [
    (hooked, {"fsdp2"}, "head.weight has a hook"),
    (stepped, {"fsdp2"}, "head.weight has a hook"),
    (scripted, {"fsdp2"}, "head is a module of TorchScript"),
    (Looked, {"ddp", "fsdp2"}, "table is an embedding with max_norm"),
]


def listed() -> nn.ModuleDict:
    return nn.ModuleDict({"left": Stack(), "right": Stack()})


def contained(strategy: str) -> None:
    model = instantiate(composed(f"strategy={strategy}"), listed())[1]
    model.module["left"](torch.ones(2, 8)).sum().backward()


def test_a_dictionary_of_modules_has_no_forward_to_gather_around() -> None:
    with pytest.raises(ConfigError, match="(?s)the model is a ModuleDict.*type     strategy=ddp"):
        run_ranks(2, contained, "fsdp2")
    run_ranks(2, contained, "ddp")


def pickled() -> None:
    pickle.dumps(instantiate(composed(FP32), Stack())[1])


def test_a_sharded_model_in_a_pickle_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"type     nemo_dist_conf\.checkpoint\.save\(folder, model\)"):
        run_ranks(2, pickled)


def made(strategy: str, factory: Any) -> None:
    model = instantiate(composed(f"strategy={strategy}"), factory())[1]
    model(torch.ones(2, 8)).sum().backward()


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
@pytest.mark.parametrize(("factory", "refused", "said"), NOT_EVERYWHERE)
def test_what_would_be_another_model_is_refused(factory: Any, refused: set[str], said: str, strategy: str) -> None:
    if strategy not in refused:
        run_ranks(2, made, strategy, factory)
        return
    with pytest.raises(ConfigError, match=said):
        run_ranks(2, made, strategy, factory)


class Decaying(Stack):
    """Gives its loss, with a sum over all weights in it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().mean() + sum(p.square().sum() for p in self.parameters())


class Reaching(Stack):
    """Adds something of a block's weights to what it returns."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.get_parameter("blocks.0.up.weight")


class _Again(torch.autograd.Function):
    """Computes a block once more in backward, as reversible networks do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: nn.Module) -> Tensor:
        ctx.block = block
        ctx.save_for_backward(x)
        return block(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.block.backward_of(*ctx.saved_tensors, gradient), None


class ReversibleBlock(Block):
    def backward_of(self, x: Tensor, gradient: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            found = x + self.up(self.norm(x)).tanh()
        found.backward(gradient)
        assert x.grad is not None
        return x.grad


class Reversible(Stack):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(ReversibleBlock() for _ in self.blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = _Again.apply(x, block)
        return x


def reached(kind: type[Stack]) -> None:
    instantiate(composed(FP32), kind())[1](torch.ones(2, 8, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("kind", [Reaching, Decaying, Reversible])
def test_a_block_whose_weights_are_used_elsewhere_is_refused(kind: type[Stack]) -> None:
    said = f"{kind.__name__} uses a parameter of a block outside of the block's forward"
    with pytest.raises(ConfigError, match=said):
        run_ranks(2, reached, kind)


def optimized() -> set[tuple[bool, bool]]:
    """(whether it is fused, whether its parameters are sharded), of the optimizer's groups."""
    optimizer: Any = {"name": "adamw", "lr": 0.1, "weight_decay": 0.0}
    cfg = composed(FP32, optimizer=optimizer)
    _, model, made = instantiate(cfg, Stack(Scale(), None))
    model(torch.ones(2, 8)).sum().backward()
    made.step()
    return {(group["fused"], isinstance(p, DTensor)) for group in made.param_groups for p in group["params"]}


def test_the_optimizer_stays_fused_beside_parameters_that_are_whole() -> None:
    assert run_ranks(2, optimized) == [{(True, True), (True, False)}] * 2


class Dtypes(Block):
    """Notes in what it is given its input, each time that it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor, *, scale: Tensor) -> Tensor:  # type: ignore[override]
        self.seen += [x.dtype, scale.dtype]
        return super().forward(x) * scale


class Casting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Dtypes() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x.float(), scale=torch.ones(8))
        return x


def cast(mode: str) -> list[list[torch.dtype]]:
    model = instantiate(composed(f"activation_checkpointing={mode}"), Casting())[1]
    model(torch.ones(2, 8)).sum().backward()
    return [block.seen for block in model.blocks]


@pytest.mark.parametrize("mode", ["true", "selective"])
def test_a_block_that_runs_again_is_given_what_fsdp_cast(mode: str) -> None:
    assert run_ranks(2, cast, mode) == [[[torch.bfloat16] * 4] * 2] * 2


def told(*words: str) -> list[str]:
    lines: list[str] = []
    logger = logging.getLogger("nemo_dist_conf.runtime.techniques.precision")
    logger.setLevel(logging.INFO)

    def keep(record: logging.LogRecord) -> bool:
        lines.append(record.getMessage())
        return False

    logger.addFilter(keep)
    try:
        instantiate(composed(*words), Stack())
    finally:
        logger.filters.clear()
    return lines


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            (),
            "fsdp2: computes in bfloat16, reduces gradients in float32, keeps parameters in float32 "
            "(strategy.mp_policy)",
        ),
        ((FP32,), "fsdp2: computes in float32, reduces gradients in float32, keeps parameters in float32"),
        (
            ("strategy=ddp", "strategy.autocast_dtype=bfloat16"),
            "ddp: computes in bfloat16, reduces gradients in float32, keeps parameters in float32 "
            "(strategy.autocast_dtype)",
        ),
    ],
    ids=["fsdp2", "fsdp2 in float32", "ddp"],
)
def test_a_start_says_what_is_computed_in_which_dtype(words: tuple[str, ...], line: str) -> None:
    assert run_ranks(1, told, *words) == [[line]]
