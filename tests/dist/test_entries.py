"""Ways into a wrapped model besides its forward: methods, and inner modules called by themselves."""

from __future__ import annotations

import copy
import random
import types
from typing import Any, Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.gradients import accumulate
from nemo_dist_conf.instantiate import instantiate
from tests.dist.kinds import Block
from tests.dist.layouts import Operators, composed, full_tensor
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist

LAYOUTS: dict[str, tuple[str, ...]] = {
    "ddp": ("strategy=ddp",),
    "ddp, gradients in buckets": ("strategy=ddp", "strategy.gradient_as_bucket_view=true"),
    "fsdp2": ("strategy.mp_policy=null",),
    "fsdp2, always freed": ("strategy.mp_policy=null", "strategy.reshard_after_forward=true"),
    "fsdp2, checkpointed": ("strategy.mp_policy=null", "activation_checkpointing=true"),
    "hsdp 2x2": ("strategy.mp_policy=null", "parallelism.dp_replicate_size=2"),
}


def logged(method: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """As decorators of people are: without functools.wraps."""
    return lambda *args: method(*args)


def mixed_by(model: Any, x: Tensor) -> Tensor:
    return x @ model.mix


class Towers(nn.Module):
    """Two encoders, as dual encoders have them, a decoder that uses an embedding's matrix, a free parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(16, 8)
        self.left = nn.ModuleList(Block() for _ in range(2))
        self.right = nn.Sequential(Block(), Block())
        self.head = nn.Linear(8, 8)
        self.mix = nn.Parameter(torch.randn(8, 8) / 3)
        self.temperature = nn.Parameter(torch.tensor(0.5))
        self.attached = types.MethodType(mixed_by, self)

    @logged
    def decorated(self, x: Tensor) -> Tensor:
        return x @ self.mix

    def helped(self, x: Tensor) -> Tensor:
        return mixed_by(self, x)

    @property
    def scaled(self) -> Tensor:
        return self.mix * 2

    @staticmethod
    def static(model: Any, x: Tensor) -> Tensor:
        return x @ model.mix

    def matrix(self) -> Tensor:
        return self.mix.t()

    def one_by_one(self, ids: Tensor) -> Iterator[Tensor]:
        yield self.encode(ids) @ self.mix

    async def later(self, ids: Tensor) -> Tensor:
        return self.encode(ids) @ self.mix

    def encode(self, ids: Tensor) -> Tensor:
        x = self.words(ids).mean(1)
        for block in self.left:
            x = block(x)
        return x

    def project(self, x: Tensor) -> Tensor:
        return self._mixed(x) * self.temperature.exp()

    def _mixed(self, x: Tensor) -> Tensor:
        return x @ self.mix

    def decode(self, x: Tensor) -> Tensor:
        return F.linear(x, self.words.weight)

    def both(self, ids: Tensor) -> Tensor:
        return self.project(self.right(self.encode(ids))) + self(ids)

    def size(self) -> int:
        return sum(1 for _ in self.parameters())

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.project(self.encode(ids)))


def features(ids: Tensor) -> Tensor:
    return F.one_hot(ids, 16).float().mean(1)[:, :8] * 4


#: What a step does with the model: its losses, each with a backward of its own.
STEPS: dict[str, Callable[[Any, Tensor], list[Tensor]]] = {
    "a method": lambda m, ids: [m.encode(ids).square().mean()],
    "methods of one loss": lambda m, ids: [(m.encode(ids) * m.project(m.right(m.encode(ids)))).mean()],
    "a parameter of the root": lambda m, ids: [m.project(features(ids)).square().mean()],
    "a module's weight alone": lambda m, ids: [m.decode(m.encode(ids)).square().mean()],
    "a method that calls forward": lambda m, ids: [m.both(ids).square().mean()],
    "an inner module": lambda m, ids: [m.right(features(ids)).square().mean()],
    "a loop of the user's own": lambda m, ids: [m.head(m.left[1](m.left[0](m.words(ids)))).square().mean()],
    "beside forward": lambda m, ids: [(m(ids) + m.right(m.encode(ids))).square().mean()],
    "forward without the call": lambda m, ids: [(m.forward(ids) + m.right(features(ids))).square().mean()],
    "the module below": lambda m, ids: [getattr(m, "module", m).encode(ids).square().mean()],
    "a decorated method": lambda m, ids: [m.decorated(features(ids)).square().mean()],
    "a method and its helper": lambda m, ids: [m.helped(features(ids)).square().mean()],
    "two backwards": lambda m, ids: [m.encode(ids).square().mean(), m.right(features(ids)).square().mean()],
}


def apart(layout: str, step: str, microbatches: int) -> float:
    """How far gradients are from those of plain torch, which runs all ranks' rows; inf where one is missing."""
    torch.manual_seed(0)
    plain = Towers()
    given = copy.deepcopy(plain)
    ids = torch.randint(16, (4, microbatches, 2, 3))  # of four ranks at most
    setup, model, _ = instantiate(composed(*LAYOUTS[layout]), given, lambda p: torch.optim.SGD(p, 0.1))
    context = setup.mesh_context
    for index in range(microbatches):
        for rank in range(context.data_size):
            for loss in {**STEPS, **WHOLE}[step](plain, ids[rank, index]):
                (loss / context.data_size).backward()
        with accumulate(model, last=index == microbatches - 1):
            for loss in {**STEPS, **WHOLE}[step](model, ids[context.data_rank, index]):
                loss.backward()
    worst = 0.0
    for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        if (mine.grad is None) != (theirs.grad is None):
            return float("inf")
        if theirs.grad is not None:
            worst = max(worst, float((full_tensor(mine.grad) - theirs.grad).norm() / theirs.grad.norm()))
    return worst


#: What uses parameters without a call that could gather them, and needs none where every rank has the whole model.
WHOLE: dict[str, Callable[[Any, Tensor], list[Tensor]]] = {
    "a parameter": lambda m, ids: [(features(ids) @ m.mix).square().mean()],
    "a property": lambda m, ids: [(features(ids) @ m.scaled).square().mean()],
    "a static method": lambda m, ids: [m.static(m, features(ids)).square().mean()],
    "the module below, called": lambda m, ids: [getattr(m, "module", m)(ids).square().mean()],
}

#: All of them are rows of tests/conformance/of_kinds.py.
CHOSEN = [
    *(("ddp", step) for step in {**STEPS, **WHOLE}),
    *(("fsdp2", step) for step in STEPS),
    ("ddp, gradients in buckets", "beside forward"),
    ("ddp, gradients in buckets", "two backwards"),
    ("fsdp2, always freed", "a method that calls forward"),
    ("fsdp2, always freed", "methods of one loss"),
    ("fsdp2, checkpointed", "beside forward"),
]


@pytest.mark.parametrize(("layout", "step"), CHOSEN)
def test_gradients_are_those_of_plain_torch(layout: str, step: str) -> None:
    assert max(run_ranks(2, apart, layout, step, 2)) < 1e-5


def test_on_one_rank_too() -> None:
    for layout in ("ddp", "fsdp2"):
        assert run_ranks(1, apart, layout, "methods of one loss", 2)[0] < 1e-5


def attached_under(layout: str) -> Tensor:
    torch.manual_seed(0)
    model = instantiate(composed(*LAYOUTS[layout]), Towers)[1]
    return model.attached(torch.ones(2, 8)).detach()


def test_a_method_that_is_bound_to_the_model_alone() -> None:
    (expected, _), (found, _) = (run_ranks(2, attached_under, layout) for layout in ("ddp", "fsdp2"))
    assert torch.allclose(found, expected, atol=1e-6)


def with_gradients_of_gradients(model: Any, ids: Tensor) -> None:
    x = features(ids).requires_grad_()
    (slope,) = torch.autograd.grad(model.right(x).sum(), x, create_graph=True)
    slope.square().sum().backward()


def with_others_parameters(model: Any, ids: Tensor) -> None:
    torch.func.functional_call(model, {name: p * 2 for name, p in model.named_parameters()}, (ids,))


def changed_between(model: Any, ids: Tensor) -> None:
    model(ids)
    with torch.no_grad():
        model.mix.mul_(0.5)  # gathered: torch keeps the root's parameters for backward
    model(ids)


#: What torch does wrong without a word, or ends with a crash at: (what, what is said).
NOT_SHARDED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "gradients of gradients": (with_gradients_of_gradients, "create_graph=True"),
    "parameters of somebody else's": (with_others_parameters, "functional_call"),
    "a change in place": (changed_between, "mix of Towers was changed in place"),
    "a parameter given out": (lambda m, ids: m.matrix(), "matrix returns a parameter"),
    "a generator": (lambda m, ids: m.one_by_one(ids), "one_by_one is a generator"),
    "a coroutine": (lambda m, ids: m.later(ids), "later is a generator or a coroutine"),
}


def set_to_itself() -> None:
    """As parametrizations that are made for one forward do it."""
    model = instantiate(composed(*LAYOUTS["fsdp2"]), Towers())[1]
    ids = torch.ones(2, 3, dtype=torch.long)
    for _ in range(2):
        model(ids)
        with torch.no_grad():
            model.mix.set_(model.mix)


def test_a_parameter_that_is_set_to_itself_is_not_changed() -> None:
    run_ranks(2, set_to_itself)


def not_sharded(what: str) -> None:
    freed = what == "a parameter given out"
    torch.manual_seed(0)
    model = instantiate(composed(*LAYOUTS["fsdp2, always freed" if freed else "fsdp2"]), Towers())[1]
    NOT_SHARDED[what][0](model, torch.ones(2, 3, dtype=torch.long))


@pytest.mark.parametrize("what", NOT_SHARDED)
def test_what_cannot_be_under_fsdp2_is_refused(what: str) -> None:
    with pytest.raises(ConfigError, match=NOT_SHARDED[what][1]):
        run_ranks(2, not_sharded, what)


def plain_calls(strategy: str) -> tuple[int, int, Any]:
    """What needs no parameters is no collective; plain attributes of the model are there."""
    model = instantiate(composed(f"strategy={strategy}"), Towers())[1]
    with Operators() as operators:
        found = model.size()
    return found, operators.count("c10d", "all_gather", "allreduce"), model.temperature.shape


def test_what_uses_no_parameters_runs_on_one_rank_alone() -> None:
    count = sum(1 for _ in Towers().parameters())
    for strategy in ("ddp", "fsdp2"):
        assert run_ranks(2, plain_calls, strategy) == [(count, 0, torch.Size(()))] * 2


def computed_in(layout: str, autocast: bool) -> tuple[torch.dtype, torch.dtype]:
    policy = ("strategy.mp_policy=null",) if autocast else ()
    words: tuple[str, ...] = {"ddp": ("strategy=ddp",), "fsdp2": policy}[layout]
    words += ("strategy.autocast_dtype=bfloat16",) if autocast else ()
    model = instantiate(composed(*words), Towers())[1]
    return model.project(torch.ones(2, 8)).dtype, model.right(torch.ones(2, 8)).dtype


def test_methods_compute_in_what_forward_computes_in() -> None:
    assert run_ranks(2, computed_in, "fsdp2", False) == [(torch.bfloat16, torch.bfloat16)] * 2
    for layout in ("ddp", "fsdp2"):
        assert [found[0] for found in run_ranks(2, computed_in, layout, True)] == [torch.bfloat16] * 2


def after_an_error(layout: str) -> bool:
    """A method that failed has not left the model entered."""
    torch.manual_seed(0)
    model = instantiate(composed(*LAYOUTS[layout]), Towers())[1]
    with pytest.raises(RuntimeError):
        model.encode(torch.ones(2, 3))
    model.encode(torch.ones(2, 3, dtype=torch.long)).sum().backward()
    return model.words.weight.grad is not None


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_an_error_inside_a_method_is_the_users_own(layout: str) -> None:
    assert run_ranks(2, after_an_error, layout) == [True, True]


def copied(strategy: str, how: str) -> None:
    model = instantiate(composed(f"strategy={strategy}"), Towers())[1]
    ways: dict[str, Callable[[Any], Any]] = {"deepcopy": copy.deepcopy, "average": AveragedModel}
    ways["part"] = lambda model: copy.deepcopy(model.left)
    ways[how](model)


@pytest.mark.parametrize("how", ["deepcopy", "average", "part"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_copy_is_refused_with_what_there_is_instead(strategy: str, how: str) -> None:
    if strategy == "ddp" and how == "part":
        run_ranks(2, copied, strategy, how)  # a plain module
        return
    with pytest.raises(ConfigError, match=r"nemo_dist_conf\.EMA\(model\)"):
        run_ranks(2, copied, strategy, how)


def copy_of_the_inner() -> bool:
    """Of an autocast model: it runs its own weights."""
    random.seed(0)
    model = instantiate(composed("strategy=ddp", "strategy.autocast_dtype=bfloat16"), Towers())[1]
    other = copy.deepcopy(model.module)
    ids = torch.ones(2, 3, dtype=torch.long)
    before = other(ids), other.encode(ids)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return all(torch.equal(a, b) for a, b in zip(before, (other(ids), other.encode(ids))))


def test_a_copy_of_the_model_inside_ddp_runs_its_own_weights() -> None:
    assert run_ranks(2, copy_of_the_inner) == [True, True]
