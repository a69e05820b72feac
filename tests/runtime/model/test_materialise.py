"""Initial weights: a function of the seed and the parameter's name, the same for any layout, complete or refused."""

from __future__ import annotations

import logging
import math
from typing import Any, Callable

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.runtime.engines import fsdp2
from nemo_dist_conf.runtime.model.build import build_model
from nemo_dist_conf.runtime.model.materialise import materialise, tied_names
from nemo_dist_conf.runtime.model.shard_boxes import local_values
from tests.dist.layouts import LLAMA, MODELS, ROWS, SGD, Net, composed, full_state, plain_model, train
from tests.dist.pool import run_ranks
from tests.live import Live
from tests.runtime.model.constructors import CONSTRUCTORS, Attributes, table_of
from tests.runtime.model.replay import CPU, NoInitialiser, filled, on_meta, recorded, tensors


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.body = nn.Linear(4, 4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight


# ------------------------------------------------------------------------- a function of seed and name


def test_equal_seeds_give_equal_weights_and_others_do_not() -> None:
    one, same, other = (tensors(filled(Net, seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not any(torch.equal(one[name], other[name]) for name in one if "norm" not in name)


def test_a_weight_depends_on_its_name_and_on_nothing_around_it() -> None:
    shallow, deep = tensors(filled(Net, depth=2)), tensors(filled(Net, depth=4))
    assert all(torch.equal(shallow[name], deep[name]) for name in shallow)
    # Not one pattern repeated: each layer has its own.
    assert not torch.equal(deep["blocks.0.up.weight"], deep["blocks.1.up.weight"])


def test_the_global_random_state_is_neither_read_nor_moved() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one = tensors(filled(Net))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    assert all(torch.equal(value, one[name]) for name, value in tensors(filled(Net)).items())


@pytest.mark.parametrize("kind", ["module", "llama", "tied"])
def test_weights_are_distributed_as_the_model_itself_draws_them(kind: str) -> None:
    torch.manual_seed(0)
    expected, found = tensors(plain_model(kind)), tensors(filled(plain_model, kind))
    assert found.keys() == expected.keys()
    for name, value in found.items():
        want = expected[name]
        assert value.dtype == want.dtype and value.shape == want.shape
        if float(want.float().std()) == 0 or "inv_freq" in name or "original" in name:
            assert torch.equal(value, want), name  # ones, zeros, frequencies
        else:
            assert float(value.std()) == pytest.approx(float(want.std()), rel=0.25), name
            assert abs(float(value.mean())) < 5 * float(want.std()) / want.numel() ** 0.5, name
            assert not torch.equal(value, want)


def test_running_statistics_start_as_they_do_in_torch() -> None:
    found = tensors(filled(nn.BatchNorm1d, 3))
    expected = tensors(nn.BatchNorm1d(3))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


# --------------------------------------------------------------------------------- whatever the layout

_FP32 = "strategy.mp_policy=null"
NET_PLAN = "strategy.tp_plan={blocks.*.up:colwise,blocks.*.down:rowwise}"
LAYOUTS = [
    (1, ("strategy=ddp",)),
    (1, ()),
    (2, ("strategy=ddp",)),
    (2, ()),
    (2, ("strategy.offload_policy.enabled=true",)),
    (2, ("parallelism.tp_size=2",)),
    (4, ()),
    (4, ("parallelism.dp_replicate_size=2",)),
    (4, ("parallelism.tp_size=2", "strategy.sequence_parallel=true")),
]


def weights(words: tuple[str, ...], kind: str, seed: int) -> dict[str, Tensor]:
    return full_state(instantiate(composed(*words, model=NODES[kind], seed=seed))[1])


@pytest.mark.dist
@pytest.mark.parametrize("ranks, words", LAYOUTS, ids=[f"{ranks} {' '.join(words)}" for ranks, words in LAYOUTS])
@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_every_layout_starts_from_the_same_weights(ranks: int, words: tuple[str, ...], kind: str) -> None:
    """Bit by bit those that a single process materialises, on every rank."""
    expected = filled(plain_model, kind, seed=3).state_dict()
    for found in run_ranks(ranks, weights, words, kind, 3):
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


@pytest.mark.dist
@pytest.mark.parametrize(
    "words",
    [("strategy=ddp",), (), ("parallelism.tp_size=2", NET_PLAN), ("parallelism.pp_size=2", "pipeline.pp_batch_size=8")],
    ids=["ddp", "fsdp2", "tp", "pp"],
)
def test_a_start_of_ones_own_is_the_same_on_every_layout(words: tuple[str, ...]) -> None:
    """Assigned, orthogonal, loaded from another layer, scaled, zero."""
    expected = filled(plain_model, NODES["sloped"], seed=3).state_dict()
    assert torch.equal(expected["blocks.0.up.weight"], expected["blocks.1.up.weight"])
    for found in run_ranks(2, weights, words, "sloped", 3):
        assert found.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


_MIXTRAL = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
NODES: dict[str, dict[str, Any]] = {
    **MODELS,
    "experts": {"config": {**LLAMA, **_MIXTRAL}},
    "sloped": {"_target_": "tests.runtime.model.constructors.SlopedNet"},
}


def small_weights(words: tuple[str, ...], kind: str) -> tuple[dict[str, Tensor], bool, float]:
    """As for a model that is small enough to have its values before it is parallelised (the ranks of the tests build
    all of theirs as if they were large); whether it had them, and what it keeps of them, in shares of its own part.
    """
    had: list[bool] = []
    shard_blocks = fsdp2.shard_blocks

    def watched(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        had.append(not any(parameter.is_meta for parameter in model.parameters()))
        shard_blocks(model, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp2, "_SMALL_ELEMENTS", 10**6)
        patch.setattr(fsdp2, "shard_blocks", watched)
        model = instantiate(composed(*words, model=NODES[kind], seed=3))[1]
    parts = [local_values(parameter) for parameter in model.parameters()]
    held, own = sum(part.untyped_storage().nbytes() for part in parts), sum(part.nbytes for part in parts)
    return full_state(model), all(had), held / own


SMALL = [(kind, ranks, words) for kind in ("llama", "tied") for ranks, words in LAYOUTS[3:]]
SMALL += [
    ("module", 2, ()),
    ("module", 4, ("parallelism.tp_size=2", NET_PLAN)),
    ("llama", 2, ("parallelism.pp_size=2", "pipeline.pp_batch_size=8")),
    ("llama", 2, ("parallelism.cp_size=2",)),
    ("experts", 2, ("parallelism.ep_size=2",)),
]


@pytest.mark.dist
@pytest.mark.parametrize("kind, ranks, words", SMALL, ids=[f"{k} {r} {' '.join(words)}" for k, r, words in SMALL])
def test_a_small_model_has_its_values_before_it_is_parallelised(kind: str, ranks: int, words: tuple[str, ...]) -> None:
    """The same ones, and what is left of the whole model is this rank's part of it."""
    expected = filled(Net, seed=3) if kind == "module" else filled(plain_model, NODES[kind]["config"], seed=3)
    for found, had, held in run_ranks(ranks, small_weights, words, kind):
        assert had is not any("offload" in word for word in words)
        assert 1 <= held < 1.2  # the rest is padding
        values = expected.state_dict()
        assert found.keys() == values.keys()
        assert [name for name in values if not torch.equal(found[name], values[name])] == []


def test_one_element_more_and_it_has_them_after() -> None:
    node = {"config": MODELS["llama"]["config"]}
    count = sum(parameter.numel() for parameter in plain_model("llama").parameters())
    assert build_model(node, None, 0, CPU, count).record is None
    assert build_model(node, None, 0, CPU, count - 1).record is not None


class Unrecordable:
    """Makes Llama reach for a tensor's memory while it is built."""

    def __enter__(self) -> None:
        self._plain = LlamaForCausalLM.__init__
        plain = self._plain

        def init(model: Any, config: Any) -> None:
            plain(model, config)
            model.lm_head.weight.untyped_storage()

        LlamaForCausalLM.__init__ = init

    def __exit__(self, *_: Any) -> None:
        LlamaForCausalLM.__init__ = self._plain


def test_where_a_model_gets_its_values_does_not_decide_them(caplog: pytest.LogCaptureFixture) -> None:
    """ddp gives them before it is wrapped, fsdp2 to what is sharded; nor does it where they cannot be recorded."""
    node = {"config": MODELS["llama"]["config"]}

    def build(whole: float) -> dict[str, Tensor]:
        built = build_model(node, None, 3, CPU, whole)
        if built.record is not None:
            assert not whole and all(parameter.is_meta for parameter in built.model.parameters())
            materialise(built.model, built.record)
        return tensors(built.model)

    def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
        return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())

    expected = tensors(filled(plain_model, "llama", seed=3))
    assert equal(build(math.inf), expected) and equal(build(0), expected)
    assert "built with its values" not in caplog.text
    torch.manual_seed(3)
    expected = tensors(plain_model("llama"))
    with Unrecordable():
        assert equal(build(math.inf), expected) and "built with its values" not in caplog.text
        assert equal(build(0), expected)
    assert "LlamaForCausalLM was built with its values, 0 MiB on every rank before it is wrapped: it rea" in caplog.text


def test_building_draws_no_random_numbers() -> None:
    state = torch.get_rng_state()
    for whole in (math.inf, 0):
        build_model({"config": MODELS["llama"]["config"]}, None, 3, CPU, whole)
    assert torch.equal(torch.get_rng_state(), state)


def of_constructors(words: tuple[str, ...], small: bool) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """What every constructor starts from, and why those that cannot be sharded cannot."""
    found: dict[str, dict[str, Tensor]] = {}
    refused: dict[str, str] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp2, "_SMALL_ELEMENTS", 10**6 if small else 0)
        for name, factory in CONSTRUCTORS.items():
            try:
                model = instantiate(composed(*words, seed=3), factory)[1]
            except Exception as error:
                refused[name] = str(error)
                continue
            buffers = {key.removeprefix("module."): value.clone() for key, value in model.named_buffers()}
            found[name] = buffers | full_state(model)
    return found, refused


@pytest.mark.dist
@pytest.mark.parametrize(
    "words, small", [(("strategy=ddp",), False), ((_FP32,), False), ((_FP32,), True)], ids=["ddp", "fsdp2", "small"]
)
def test_every_constructor_gives_every_layout_the_same(words: tuple[str, ...], small: bool) -> None:
    """What one process has, bit by bit, whichever way the constructor has of writing it."""
    cannot = {"two_parameters_in_one_memory": "two parameters in the same memory"}
    for found, refused in run_ranks(2, of_constructors, words, small):
        assert refused.keys() == (cannot.keys() if words == (_FP32,) else set()), refused
        assert all(cannot[name] in reason for name, reason in refused.items()), refused
        assert len(found) + len(refused) == len(CONSTRUCTORS)
        for name, values in found.items():
            expected = tensors(filled(CONSTRUCTORS[name], seed=3))
            assert values.keys() == expected.keys(), name
            assert [key for key in expected if not torch.equal(values[key], expected[key])] == [], name


def outputs_with_attributes(words: tuple[str, ...]) -> Tensor:
    table_of.cache_clear()
    model = instantiate(composed(*words, seed=3), Attributes)[1]
    return model(torch.arange(6.0).view(2, 3)).detach()


@pytest.mark.dist
@pytest.mark.parametrize("words", [("strategy=ddp",), ("strategy.mp_policy=null",)], ids=["ddp", "fsdp2"])
def test_tensors_that_are_kept_elsewhere_have_their_values(words: tuple[str, ...]) -> None:
    table_of.cache_clear()
    model = filled(Attributes, seed=3)
    expected = model(torch.arange(6.0).view(2, 3)).detach()
    for found in run_ranks(2, outputs_with_attributes, words):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.dist
def test_layers_take_what_was_computed_with_them_under_a_policy() -> None:
    """The page's policy computes in bfloat16; a table of slopes stays in float32."""
    table_of.cache_clear()
    expected = filled(Attributes, seed=3)(torch.arange(6.0).view(2, 3)).detach()
    for found in run_ranks(2, outputs_with_attributes, ()):
        torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=0)


@pytest.mark.dist
def test_a_stage_has_what_its_modules_keep() -> None:
    """Also in the trial that looks for the stages, which runs on meta."""
    node = {"_target_": "tests.runtime.model.constructors.SlopedNet"}
    words = ("strategy.mp_policy=null", "parallelism.pp_size=2", f"pipeline.pp_batch_size={ROWS}")
    expected = run_ranks(1, train, composed("strategy=ddp", model=node, optimizer=SGD, seed=3))[0]
    for found in run_ranks(2, train, composed(*words, model=node, optimizer=SGD, seed=3)):
        assert found.losses == pytest.approx(expected.losses, rel=1e-5)
        assert found.norms == pytest.approx(expected.norms, rel=1e-5)


def refused(factory: Callable[[], nn.Module], *words: str) -> str:
    with pytest.raises(ConfigError) as error:
        instantiate(composed(*words), factory)
    return str(error.value)


def knows_its_rank() -> nn.Module:
    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.mul_(1 + dist.get_rank())
    return model


def draws_without_a_seed() -> nn.Module:
    model = nn.Linear(3, 3)
    model.bias = nn.Parameter(torch.from_numpy(np.random.default_rng().standard_normal(3)))
    return model


@pytest.mark.dist
@pytest.mark.parametrize("factory", [knows_its_rank, draws_without_a_seed])
def test_ranks_that_would_start_from_different_values_are_refused(factory: Callable[[], nn.Module]) -> None:
    """Each would give its own part of its own model."""
    for message in run_ranks(2, refused, factory):
        assert "ranks built different models" in message


def keeps_its_weight() -> nn.Module:
    model: Any = NoInitialiser()
    model.known = [model.fc.weight]
    return model


def keeps_a_part() -> nn.Module:
    model = NoInitialiser()
    model.register_buffer("part", model.fc.weight.detach()[1:])
    return model


def keeps_copies_and_columns() -> nn.Module:
    """Nothing of it is in the memory of a parameter that it does not follow."""
    model: Any = NoInitialiser()
    drawn = torch.randn(4, 6)
    model.left, model.right = nn.Parameter(drawn[:, :3]), nn.Parameter(drawn[:, 3:])
    model.anchor = model.fc.weight.detach().clone()
    model.lstm = nn.LSTM(4, 4)
    nn.utils.spectral_norm(model.fc)
    return model


def names_of(factory: Callable[[], nn.Module], *words: str) -> set[str]:
    return set(full_state(instantiate(composed(*words), factory)[1]))


@pytest.mark.dist
def test_what_would_not_follow_a_sharded_parameter_is_refused() -> None:
    """A plain model reads the trained weight there, a sharded one that of the first step."""
    for factory, name in ((keeps_its_weight, "known/0"), (keeps_a_part, "part")):
        assert f"{name} is kept beside the parameter fc.weight" in run_ranks(1, refused, factory)[0]
        assert run_ranks(1, names_of, factory, "strategy=ddp")[0] >= {"fc.weight", "gain"}
    assert run_ranks(1, names_of, keeps_copies_and_columns)[0] >= {"left", "right", "lstm.weight_hh_l0"}


def uneven_shards() -> bool:
    """Five rows over four ranks, and a bias of one element."""
    same = True
    for width in (5, 1):
        model, record = recorded(lambda: nn.Linear(3, width))
        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        materialise(model, record)
        expected = tensors(filled(nn.Linear, 3, width))
        same &= all(torch.equal(value, expected[name]) for name, value in full_state(model).items())
    return same


@pytest.mark.dist
def test_shards_may_be_uneven_or_empty() -> None:
    assert run_ranks(4, uneven_shards) == [True] * 4


def buffers_of_ranks(*words: str) -> dict[str, Tensor]:
    model = instantiate(composed(*words, model=MODELS["llama"]))[1]
    return {name.removeprefix("module."): buffer for name, buffer in model.named_buffers()}


@pytest.mark.dist
@pytest.mark.parametrize("words", [("strategy=ddp",), (), ("parallelism.tp_size=2",)], ids=["ddp", "fsdp2", "tp"])
def test_buffers_that_are_not_saved_are_filled_too(words: tuple[str, ...]) -> None:
    """The frequencies of rotary embeddings are in no state_dict, and on meta they have no values."""
    expected = dict(plain_model("llama").named_buffers())
    assert expected
    for found in run_ranks(2, buffers_of_ranks, *words):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


# ------------------------------------------------------------------------------------------ memory


class Wide(nn.Module):
    """Eight megabytes, one of them drawn twice as large, and turned round on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 512, bias=False) for _ in range(8))
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.copy_(layer.weight.exp().sub(1).t())  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        return x


def peak_mib() -> float:
    live = Live()
    with live:
        instantiate(composed(), Wide)
    return live.peak / 2**20


@pytest.mark.dist
def test_a_rank_holds_its_shards_and_one_whole_tensor_at_a_time() -> None:
    """4 MiB of shards, and what the largest tensor is made of: two or three of its kind."""
    for found in run_ranks(2, peak_mib):
        assert 4 < found < 4 + 3.5


# --------------------------------------------------------------------------------------------- ties


def test_ties_are_found_by_name() -> None:
    assert tied_names(on_meta(Tied)) == [["embed.weight", "head.weight"]]
    assert tied_names(on_meta(Net)) == []


def test_tied_parameters_stay_one_and_have_the_first_ones_values() -> None:
    model = filled(Tied)
    assert isinstance(model, Tied) and model.head.weight is model.embed.weight
    assert len(list(model.parameters())) == 3
    # An Embedding is drawn with a standard deviation of 1, a Linear between -1/2 and 1/2 at this width.
    assert float(model.embed.weight.detach().abs().max()) > 0.5


def ties_under(words: tuple[str, ...]) -> tuple[bool, int]:
    model = instantiate(composed(*words, model=MODELS["tied"]))[1]
    inner = getattr(model, "module", model)
    return inner.lm_head.weight is inner.model.embed_tokens.weight, len(list(model.parameters()))


@pytest.mark.dist
@pytest.mark.parametrize("words", [("strategy=ddp",), (), ("parallelism.tp_size=2",)], ids=["ddp", "fsdp2", "tp"])
def test_wrapped_models_keep_their_ties(words: tuple[str, ...]) -> None:
    count = len(list(plain_model("tied").parameters()))
    assert run_ranks(2, ties_under, words) == [(True, count)] * 2


class Unfinished(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gain = nn.Linear(4, 4), nn.Parameter(torch.empty(4))


def test_what_a_constructor_never_sets_is_said_and_starts_at_0(caplog: pytest.LogCaptureFixture) -> None:
    model: Any = build_model(None, Unfinished, 0, CPU, math.inf).model
    assert "Unfinished: nothing gives gain a value, so it starts at 0" in caplog.text
    assert not model.gain.any() and model.fc.weight.all()


def constructed(*words: str) -> tuple[dict[str, Tensor], list[str]]:
    messages: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("nemo_dist_conf").addHandler(handler)
    try:
        return full_state(instantiate(composed(*words), NoInitialiser)[1]), messages
    finally:
        logging.getLogger("nemo_dist_conf").removeHandler(handler)


@pytest.mark.dist
@pytest.mark.parametrize("words", [("strategy=ddp",), ()], ids=["ddp", "fsdp2"])
def test_a_module_without_initialiser_starts_as_its_constructor_says(words: tuple[str, ...]) -> None:
    found = run_ranks(2, constructed, *words)
    first, second = (state for state, _ in found)
    assert torch.equal(first["gain"], torch.full((4,), 7.0))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert len(first["fc.weight"].unique()) == 16
    [alone] = run_ranks(1, constructed, *words)
    assert all(torch.equal(first[name], alone[0][name]) for name in first)


class Masked(nn.Module):
    """As many small language models are written: buffers from the constructor, weights from _init_weights."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.out = nn.Linear(4, 4)
        self.register_buffer("mask", torch.tril(torch.ones(4, 4)).bool(), persistent=False)
        self.register_buffer("bias", torch.tril(torch.full((4, 4), 2.0)))
        self.register_buffer("positions", torch.arange(4))
        self.apply(self._init_weights)
        nn.init.normal_(self.out.weight, std=1e-4)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5)
            nn.init.zeros_(module.bias)

    def forward(self, x_BH: Tensor) -> Tensor:
        return self.out(self.fc(x_BH)) @ self.bias


def masked(*words: str) -> dict[str, Tensor]:
    wrapped = instantiate(composed(*words), Masked)[1]
    return {name.removeprefix("module."): buffer for name, buffer in wrapped.named_buffers()} | full_state(wrapped)


@pytest.mark.dist
@pytest.mark.parametrize("words", [("strategy=ddp",), ()], ids=["ddp", "fsdp2"])
def test_buffers_of_a_constructor_keep_their_values(words: tuple[str, ...]) -> None:
    expected = Masked()
    for found in run_ranks(2, masked, *words):
        assert all(torch.equal(found[name], buffer) for name, buffer in expected.named_buffers())
        assert float(found["fc.weight"].std()) == pytest.approx(0.5, rel=0.6)
        assert float(found["out.weight"].std()) == pytest.approx(1e-4, rel=0.6)
        assert not found["fc.bias"].any()
