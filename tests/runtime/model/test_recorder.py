"""What a constructor does is recorded without values, and played back it is what the constructor gives."""

from __future__ import annotations

import io
import random
from typing import Any, Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nemo_dist_conf.runtime.model.construct import construct, named_tensors, record
from nemo_dist_conf.runtime.model.materialise import materialise
from nemo_dist_conf.runtime.model.recording.recorder import NotRecorded
from nemo_dist_conf.runtime.rank_agreement import are_near
from tests.runtime.model.constructors import CONSTRUCTORS, Attributes, Two, holder, table_of
from tests.runtime.model.replay import CPU, differences, misfits, recorded


def filled(factory: Callable[[], Any], seed: int = 0) -> Any:
    model, made = recorded(factory, seed)
    materialise(model, made)
    return model


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_the_tape_is_what_the_constructor_did(name: str) -> None:
    """Bit for bit, where the numbers are drawn in the constructor's order from one generator."""
    assert differences(CONSTRUCTORS[name]) == [] and misfits(CONSTRUCTORS[name]) == []


# ------------------------------------------------------------------------------------- what is drawn


def test_what_is_derived_is_derived_from_what_is_there() -> None:
    """Each is played back by itself, and sees the same numbers."""
    model = filled(CONSTRUCTORS["with_buffers"])
    assert torch.equal(model.clone, model.a.weight) and torch.equal(model.norm, model.a.weight.norm(dim=1))
    model = filled(CONSTRUCTORS["teacher"])
    assert torch.equal(model.teacher[0].weight, model.online[0].weight)
    assert torch.equal(model.loaded[0].weight, model.online[0].weight)
    assert not model.teacher[0].weight.requires_grad and model.online[0].weight.requires_grad
    model = filled(CONSTRUCTORS["parametrized"])
    assert torch.linalg.matrix_norm(model[0].weight, 2).item() == pytest.approx(1, abs=0.2)
    assert torch.allclose(model[2].weight @ model[2].weight.T, torch.eye(4), atol=1e-5)


def test_a_generator_that_is_put_back_draws_the_same_again() -> None:
    model = filled(CONSTRUCTORS["with_the_generator_put_back"])
    assert torch.equal(model.a.weight, model.b.weight) and torch.equal(model.a.bias, model.b.bias)
    assert torch.equal(model.c.weight, model.e.weight)
    # From where the numbers of d and f began, it is the same stream; behind them it is not.
    assert torch.equal(model.d.weight[:3], model.f.weight) and not torch.equal(model.g.weight, model.d.weight)


def test_parts_of_one_draw_are_different_parts() -> None:
    _, made = recorded(CONSTRUCTORS["one_draw_in_parts"])
    assert made.groups == [["q", "k", "v"], ["up", "down"]]  # drawn once
    model = filled(CONSTRUCTORS["one_draw_in_parts"])
    assert len(torch.cat([model.q, model.k, model.v]).unique()) == 48
    assert len(torch.cat([model.up, model.down]).unique()) == 20


class Layers(nn.Module):
    def __init__(self, count: int, first: int = 0) -> None:
        super().__init__()
        self.extra = nn.ParameterList(nn.Parameter(torch.randn(3)) for _ in range(first))
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(count))
        for layer in self.layers:
            nn.init.trunc_normal_(layer.get_parameter("weight"))
            nn.init.normal_(layer.get_parameter("bias"))


def test_a_tensor_depends_on_its_name_and_on_nothing_around_it() -> None:
    few, many = named_tensors(filled(lambda: Layers(1))), named_tensors(filled(lambda: Layers(3, first=2)))
    assert all(torch.equal(few[name], many[name]) for name in few)
    assert not torch.equal(many["layers.0.weight"], many["layers.1.weight"])


def test_equal_seeds_give_equal_values_and_others_do_not() -> None:
    one, same, other = (named_tensors(filled(lambda: Layers(1), seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) and not torch.equal(one[name], other[name]) for name in one)


def test_a_constructor_that_seeds_itself_gives_what_it_always_gives() -> None:
    for name in ("with_its_own_generator", "with_a_seed_of_its_own"):
        plain, model = named_tensors(CONSTRUCTORS[name]()), named_tensors(filled(CONSTRUCTORS[name], seed=9))
        own = {"c.weight", "c.bias", "d"} if "seed" in name else {"a.weight", "big", "order", "coins", "rare", "some"}
        assert {key for key in plain if torch.equal(plain[key], model[key])} == own


def test_values_that_are_looked_at_are_those_that_are_given() -> None:
    def scaled() -> nn.Module:
        weight = torch.randn(40, 40)
        deviation = weight.std().item()
        positive = int((weight > 0).sum())
        return holder(weight=weight / deviation, positive=weight[weight > 0], count=torch.ones(positive))

    model = filled(scaled)
    assert model.weight.std().item() == pytest.approx(1, rel=1e-5)
    assert len(model.positive) == len(model.count) == int((model.weight > 0).sum())


# --------------------------------------------------------------------- what is kept beside parameters


def test_tensors_are_where_the_constructor_keeps_them() -> None:
    table_of.cache_clear()
    plain, model = Attributes(), filled(Attributes)
    table_of.cache_clear()
    model = filled(Attributes)
    assert torch.equal(table_of(7), torch.arange(7.0) ** 2)  # also in the cache of a function
    assert torch.equal(model.half, plain.half) and torch.equal(model.slopes, plain.slopes)
    model.half[0] = 9
    assert model.slopes[0] == 9  # still a part of it
    assert 0.5 < model.drawn.std() < 1.5
    model.load_state_dict(plain.state_dict())
    model.half[0] = 0
    x = torch.randn(2, 3)
    assert torch.equal(model(x), plain(x))


def test_a_parameter_stays_the_object_that_it_is() -> None:
    """With its hooks and attributes, for whatever else refers to it."""
    calls: list[Any] = []

    def hooked() -> nn.Module:
        model: Any = Two()
        model.known = [model.a.weight]
        model.a.weight.register_hook(lambda gradient: gradient * 10)
        model.a.weight.register_post_accumulate_grad_hook(calls.append)
        model.a.weight.kind = "first"
        return model

    model = filled(hooked)
    assert model.known[0] is model.a.weight and model.a.weight.kind == "first"
    model.a.weight.sum().backward()
    assert torch.equal(model.a.weight.grad, torch.full((6, 8), 10.0)) and calls[0] is model.a.weight


def test_parameters_in_one_memory_stay_there() -> None:
    model = filled(CONSTRUCTORS["two_parameters_in_one_memory"])
    with torch.no_grad():
        model[0].weight.fill_(3)
    assert model[1].weight.eq(3).all() and model[0].weight is not model[1].weight


# ------------------------------------------------------------------------------- what it leaves behind


def _numpy_state() -> list[int]:
    state: Any = np.random.get_state()
    return state[1].tolist()


def test_generators_are_as_before() -> None:
    states: Any = torch.get_rng_state(), random.getstate(), _numpy_state()
    filled(CONSTRUCTORS["from_numpy_and_random"])
    filled(CONSTRUCTORS["with_a_seed_of_its_own"])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1] and _numpy_state() == states[2]


def test_what_ranks_compare_allows_for_other_cpus() -> None:
    """Constants may differ in their last bits; anything else is another model."""

    def turned(times: float, bias: float = 0.0) -> nn.Module:
        return holder(a=torch.linspace(-1, 1, 64).mul(3).sin() * times, b=torch.randn(3) + bias)

    def marks(*factories: Callable[[], nn.Module]) -> list[Any]:
        return [made.sums(made.refs) for made in (recorded(factory)[1] for factory in factories)]

    assert are_near(*marks(lambda: turned(1.0), lambda: turned(1 + 1e-7)))
    for other in (lambda: turned(1.01), lambda: turned(-1.0), lambda: turned(1.0, 0.1)):
        assert not are_near(*marks(lambda: turned(1.0), other))


def test_torch_is_as_before() -> None:
    trunc_normal = nn.init._no_grad_trunc_normal_
    with pytest.raises(ZeroDivisionError):
        record(lambda: 1 / 0, 0, CPU)
    assert nn.init._no_grad_trunc_normal_ is trunc_normal
    assert torch.empty(1).device == CPU and nn.Linear(1, 1).weight.device == CPU


def test_views_and_aliases() -> None:
    """Storages on meta are told apart, although none of them has an address."""
    model, made = recorded(CONSTRUCTORS["two_parameters_in_one_memory"])
    one, other = made.refs["0.weight"], made.refs["1.weight"]
    assert one.stored is other.stored and one.stored is not made.refs["0.bias"].stored


# ------------------------------------------------------------------------------ what cannot be recorded


def on_meta_itself() -> nn.Module:
    with torch.device("meta"):
        return Two()


def moved_to_meta() -> nn.Module:
    return Two().to("meta")


def reaches_for_memory() -> nn.Module:
    model = Two()
    model.a.weight.untyped_storage()
    return model


def asks_for_an_address() -> nn.Module:
    model = Two()
    model.a.weight.data_ptr()
    return model


def computes_in_python() -> nn.Module:
    model = Two()
    model.a.weight.data.apply_(lambda _: 3.0)
    return model


def reads_a_file() -> nn.Module:
    file = io.BytesIO()
    torch.save(_BUILT.state_dict(), file)
    file.seek(0)
    model = Two()
    model.load_state_dict(torch.load(file))
    return model


def writes_an_array_and_its_tensor() -> nn.Module:
    tensor = torch.zeros(3)
    array = tensor.numpy()
    tensor.normal_()
    array[:] = 6
    return holder(a=tensor)


def hides_it() -> nn.Module:
    try:
        return reaches_for_memory()
    except Exception:
        return Two()


def keeps_a_part_of_a_parameter() -> nn.Module:
    model: Any = Two()
    model.part = model.a.weight.detach()[0]
    return model


def sparse() -> nn.Module:
    return holder(a=torch.eye(3).to_sparse().to_dense())


_BUILT, _GIVEN = Two(), torch.ones(3)


def built_before() -> nn.Module:
    return _BUILT


def never_ran() -> nn.Module:
    return nn.LazyLinear(3)


class Odd(Tensor):
    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*args, **(kwargs or {}))


def of_another_class() -> nn.Module:
    return holder(a=torch.Tensor._make_subclass(Odd, torch.ones(2)) + 1)


@pytest.mark.parametrize(
    "factory, why",
    [
        (on_meta_itself, "uses the meta device itself"),
        (moved_to_meta, "uses the meta device itself"),
        (reaches_for_memory, "reaches for the memory"),
        (asks_for_an_address, "reaches for the memory"),
        (computes_in_python, "reaches for the memory"),
        (reads_a_file, "takes memory that was filled elsewhere"),
        (writes_an_array_and_its_tensor, "an array of numpy"),
        (hides_it, "reaches for the memory"),
        (keeps_a_part_of_a_parameter, "shares memory with a parameter"),
        (sparse, "special kind"),
        (of_another_class, "special kind"),
        (never_ran, "has no shape yet"),
        (built_before, "has its values already"),
    ],
)
def test_what_cannot_be_recorded(factory: Callable[[], nn.Module], why: str) -> None:
    with pytest.raises(NotRecorded, match=why):
        record(factory, 0, CPU)


def test_what_cannot_be_recorded_leaves_nothing_without_values() -> None:
    """Tables in a cache, and modules and tables of others, are taken again when it runs with values."""
    others = Two()

    def factory() -> nn.Module:
        model: Any = Two()
        model.table, model.others = table_of(9), others
        model.register_buffer("given", _GIVEN)
        model.part = model.a.weight.detach()[0]
        return model

    table_of.cache_clear()
    with pytest.raises(NotRecorded, match="shares memory"):
        record(factory, 0, CPU)
    model: Any = construct(factory, 0)
    assert torch.equal(model.table, torch.arange(9.0) ** 2) and torch.equal(_GIVEN, torch.ones(3))
    assert not any(tensor.is_meta for tensor in named_tensors(model).values())


def test_a_table_of_others_stays_theirs() -> None:
    def factory() -> nn.Module:
        model = Two()
        model.register_buffer("given", _GIVEN)
        model.c = _BUILT.a
        return model

    weight, values = _BUILT.a.weight, _BUILT.a.weight.detach().clone()
    model: Any
    model, made = recorded(factory)
    assert not _GIVEN.is_meta
    materialise(model, made)
    assert model.given is not _GIVEN and torch.equal(model.given, _GIVEN)
    assert model.c.weight is weight and torch.equal(weight, values)


def test_what_is_written_into_an_array_is_not_lost() -> None:
    def through_numpy() -> nn.Module:
        model = Two()
        model.a.weight.detach().numpy()[:] = 5
        return model

    with pytest.raises(ValueError):
        record(through_numpy, 0, CPU)
