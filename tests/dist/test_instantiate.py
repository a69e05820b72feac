"""The hook on real ranks: what it takes for a model and an optimizer, what it refuses, what it leaves behind."""

from __future__ import annotations

import logging
import pickle
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.runtime.model.build import build_model
from tests.dist.layouts import ADAMW, LLAMA, MODELS, Net, batch, composed, full_state, loss_sum
from tests.dist.pool import run_ranks
from tests.live import Live

pytestmark = pytest.mark.dist

FP32 = "strategy.mp_policy=null"
BOTH = pytest.mark.parametrize("words", [("strategy=ddp",), (FP32,)], ids=["ddp", "fsdp2"])


# -------------------------------------------------------------------------------------- what it takes


def seeded_net(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net()


def from_instance(*words: str) -> tuple[dict[str, Tensor], bool]:
    """Each rank gives a model with weights and buffers of its own."""
    mine = seeded_net(dist.get_rank() + 1)
    mine.register_buffer("mean", torch.full((2,), dist.get_rank() + 1.0))
    mine.register_buffer("mask", torch.tensor([dist.get_rank() == 0, True]))
    mine.register_buffer("turned", (torch.arange(4).view(2, 2) + dist.get_rank()).t())  # not contiguous
    wrapped = instantiate(composed(*words), mine)[1]
    return full_state(wrapped), getattr(wrapped, "module", wrapped) is mine


@BOTH
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_given_module_is_wrapped_itself_with_rank_0s_values(words: tuple[str, ...], ranks: int) -> None:
    """Shards of two different models would be a third one."""
    expected = seeded_net(1).state_dict()
    for state, same in run_ranks(ranks, from_instance, *words):
        assert same
        assert state.pop("mean").tolist() == [1.0, 1.0] and state.pop("mask").tolist() == [True, True]
        assert state.pop("turned").tolist() == [[0, 2], [1, 3]]
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in expected)


def from_meta_instance(*words: str) -> tuple[bool, float] | str:
    with torch.device("meta"):
        model = Net()
    try:
        wrapped = instantiate(composed(*words), model)[1]
    except ConfigError as error:
        return str(error)
    loss = loss_sum(wrapped, *batch())
    return any(p.is_meta for p in wrapped.parameters()), float(loss.detach())


def from_factory(*words: str, seed: int = 0) -> dict[str, Tensor]:
    return full_state(instantiate(composed(*words, seed=seed), Net)[1])


@BOTH
def test_a_given_module_on_meta_is_filled_or_refused(words: tuple[str, ...]) -> None:
    """Left on meta it would fail only in training, or return losses without a value."""
    found = run_ranks(1, from_meta_instance, *words)[0]
    if isinstance(found, str):
        assert "meta" in found
    else:
        assert found[0] is False and found[1] > 0


def from_config(model: Any, *words: str, seed: int = 0) -> dict[str, Tensor]:
    return full_state(instantiate(composed(*words, model=model, seed=seed))[1])


@BOTH
def test_a_factory_and_a_target_are_built_from_the_seed(words: tuple[str, ...]) -> None:
    factory = run_ranks(2, from_factory, *words)[0]
    target = run_ranks(2, from_config, MODELS["module"], *words)[0]
    other = run_ranks(2, from_factory, *words, seed=1)[0]
    assert factory.keys() == target.keys() == Net().state_dict().keys()
    assert all(torch.equal(factory[name], target[name]) for name in factory)
    # Norms start at ones and zeros whatever the seed is.
    drawn = [name for name in factory if "norm" not in name]
    assert not any(torch.equal(factory[name], other[name]) for name in drawn)


def stepped(made: tuple[Any, Any, Any]) -> tuple[str, float, dict[str, Tensor]]:
    """The strategy, the loss and the weights after a step."""
    setup, model, optimizer = made
    loss = loss_sum(model, *batch()) / 100
    loss.backward()
    optimizer.step()
    return type(setup.strategy_config).__name__, float(loss.detach()), full_state(model)


def as_a_node(node: dict[str, Any], mode: str, *words: str) -> list[tuple[str, float, dict[str, Tensor]]]:
    """A node ``_target_: nemo_dist_conf.instantiate``, instantiated by Hydra, and the same by a call of the hook."""
    from hydra.utils import instantiate as hydra_instantiate

    model: dict[str, Any] = {"_target_": "tests.dist.layouts.Net", "_partial_": True}
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.1, "_partial_": True}
    cfg = composed(*words, model=model, optimizer=sgd)
    app = OmegaConf.create({"dist": cfg, "run": {"_target_": "nemo_dist_conf.instantiate", "cfg": "${dist}", **node}})
    found = [stepped(hydra_instantiate(app.run, _convert_=mode)), stepped(instantiate(hydra_instantiate(cfg)))]
    plain = composed(*words, model={"_target_": "tests.dist.layouts.Net"}, optimizer=sgd)
    return [*found, stepped(instantiate(plain))]


@BOTH
@pytest.mark.parametrize("node", [{}, {"_recursive_": False}], ids=["default", "not recursive"])
@pytest.mark.parametrize("mode", ["none", "all"])
def test_the_hook_is_a_node_too(words: tuple[str, ...], node: dict[str, Any], mode: str) -> None:
    """Hydra makes typed configs, a factory and a partial optimizer of what is inside before it calls the hook."""
    for found in run_ranks(2, as_a_node, node, mode, *words):
        (kind, loss, state), *others = found
        for other_kind, other_loss, other in others:
            assert (kind, loss) == (other_kind, other_loss)
            assert all(torch.equal(state[name], other[name]) for name in state)


def test_a_targets_arguments_are_the_users() -> None:
    state = run_ranks(1, from_config, {**MODELS["module"], "width": 16, "depth": 2}, FP32)[0]
    assert state["embed.weight"].shape == (97, 16)
    assert "blocks.1.up.weight" in state and "blocks.2.up.weight" not in state


def class_of(model: Any, *words: str) -> list[str]:
    wrapped = instantiate(composed(*words, model=model))[1]
    units = [name for name, module in wrapped.named_modules() if isinstance(module, FSDPModule)]
    return [type(getattr(wrapped, "module", wrapped)).__name__, *units]


def test_a_transformers_config_is_built_and_its_layers_are_the_blocks() -> None:
    layers = [f"model.layers.{index}" for index in range(3)]
    assert run_ranks(1, class_of, {"config": LLAMA}) == [["FSDPLlamaForCausalLM", "", *layers]]
    assert run_ranks(1, class_of, {"config": LLAMA}, "strategy=ddp") == [["LlamaForCausalLM"]]


class HeadFromZero(Net):
    """Says in its constructor where training starts, as many models do."""

    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.embed.weight, 0.5)


def head_and_embedding(*words: str) -> tuple[float, float]:
    state = full_state(instantiate(composed(*words), HeadFromZero)[1])
    return float(state["head.weight"].abs().max()), float(state["embed.weight"].mean())


@BOTH
def test_what_a_constructor_sets_is_what_training_starts_from(words: tuple[str, ...]) -> None:
    """reset_parameters of its layers alone would start somewhere else, without a word."""
    assert run_ranks(1, head_and_embedding, *words) == [(0.0, 0.5)]


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__()
        self.embed.requires_grad_(False)


def frozen_after_a_step(*words: str) -> tuple[list[str], bool, bool]:
    _, model, optimizer = instantiate(composed(*words, optimizer=ADAMW), Frozen)
    before = full_state(model)
    loss_sum(model, *batch()).backward()
    optimizer.step()
    after = full_state(model)
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    names = [name.removeprefix("module.") for name, p in model.named_parameters() if id(p) not in held]
    unmoved = torch.equal(before["embed.weight"], after["embed.weight"])
    return names, unmoved, torch.equal(before["head.weight"], after["head.weight"])


@BOTH
def test_frozen_parameters_stay_frozen(words: tuple[str, ...]) -> None:
    assert run_ranks(2, frozen_after_a_step, *words) == [(["embed.weight"], True, False)] * 2


def declared_blocks(node: Any, blocks: Any) -> list[str] | str:
    try:
        wrapped = instantiate(composed(FP32, model=node), blocks=blocks)[1]
    except ConfigError as error:
        return error.what
    return [name for name, module in wrapped.named_modules() if isinstance(module, FSDPModule)]


def test_blocks_are_where_the_caller_says() -> None:
    assert run_ranks(1, declared_blocks, MODELS["module"], None) == [["", "blocks.0", "blocks.1", "blocks.2"]]
    assert run_ranks(1, declared_blocks, MODELS["module"], "blocks.1") == [["", "blocks.1"]]
    assert run_ranks(1, declared_blocks, {"config": LLAMA, "blocks": "model.layers.*.mlp"}, None) == [
        ["", *(f"model.layers.{index}.mlp" for index in range(3))]
    ]
    assert run_ranks(1, declared_blocks, MODELS["module"], "layers") == ["blocks: no module of Net is named layers"]


class Computes(Net):
    """Its constructor needs values, which there are none of on meta: the usual list of drop rates, or numpy."""

    def __init__(self, how: str = "tolist") -> None:
        super().__init__()
        values = torch.linspace(0.0, 1.0, 3)
        self.rates = getattr(values[1] if how == "item" else values, how)()


def weights_of_computing(how: str, as_target: bool) -> dict[str, Tensor]:
    node = {"_target_": "tests.dist.test_instantiate.Computes", "how": how}
    nodes = {"model": node} if as_target else {}
    return full_state(instantiate(composed(FP32, **nodes), None if as_target else lambda: Computes(how))[1])


@pytest.mark.parametrize("as_target", [False, True], ids=["factory", "target"])
@pytest.mark.parametrize("how", ["tolist", "item", "numpy"])
def test_a_constructor_that_needs_values_runs_on_the_cpu_the_same_on_every_rank(how: str, as_target: bool) -> None:
    first, second = run_ranks(2, weights_of_computing, how, as_target)
    assert first.keys() == Net().state_dict().keys()
    assert all(torch.equal(first[name], second[name]) and not first[name].isnan().any() for name in first)


# ------------------------------------------------------------------------------------------ optimizers


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5, momentum=0.25)


def optimizer_of(node: Any, factory: Callable[..., Any] | None) -> Any:
    """(class, lr, whether it holds exactly the wrapped parameters, whether a step moves them)"""
    nodes = {"optimizer": node} if node is not None else {}
    _, model, optimizer = instantiate(composed(FP32, model=MODELS["module"], **nodes), None, factory)
    if optimizer is None:
        return None
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    before = full_state(model)
    loss_sum(model, *batch()).backward()
    optimizer.step()
    moved = not torch.equal(before["head.weight"], full_state(model)["head.weight"])
    wrapped = {id(parameter) for parameter in model.parameters()}
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return type(optimizer).__name__, optimizer.param_groups[0]["lr"], held == wrapped, moved


@pytest.mark.parametrize(
    "node, factory, expected",
    [
        (ADAMW, None, ("AdamW", 0.01, True, True)),
        ({"_target_": "torch.optim.SGD", "lr": 0.2}, None, ("SGD", 0.2, True, True)),
        ({"_target_": "torch.optim.SGD", "_partial_": True, "lr": 0.3}, None, ("SGD", 0.3, True, True)),
        (None, momentum, ("SGD", 0.5, True, True)),
        (ADAMW, momentum, ("SGD", 0.5, True, True)),
        (None, None, None),
    ],
    ids=["node", "target", "partial target", "factory", "factory before node", "none"],
)
def test_the_optimizer_holds_the_wrapped_parameters(node: Any, factory: Any, expected: Any) -> None:
    assert run_ranks(2, optimizer_of, node, factory) == [expected] * 2


def without_model() -> tuple[str, Any, Any]:
    setup, model, optimizer = instantiate(composed(optimizer=ADAMW))
    return setup.mesh_context.layout(), model, optimizer


def test_without_a_model_there_is_a_setup_alone() -> None:
    assert run_ranks(2, without_model) == [("dp_shard 2", None, None)] * 2


# ---------------------------------------------------------------------------------- no rank holds it all


DEEP = {"width": 64, "depth": 16}


def peak_of_build(given: bool, *words: str, **nodes: Any) -> tuple[float, float]:
    """Highest and last memory of the build on this rank, as fractions of the whole model's."""
    with Live() as live:
        wrapped = instantiate(composed(FP32, *words, **nodes), (lambda: Net(**DEEP)) if not given else Net(**DEEP))[1]
    whole = sum(parameter.numel() * parameter.element_size() for parameter in wrapped.parameters())
    kept = sum(p.to_local().untyped_storage().nbytes() for p in wrapped.parameters())
    return live.peak / whole, kept / whole


@pytest.mark.parametrize(
    "ranks, words, share",
    [
        (2, (), 1 / 2),
        (4, (), 1 / 4),
        (2, ("parallelism.tp_size=2", "strategy.tp_plan={blocks.*.up:colwise,blocks.*.down:rowwise}"), 0.55),
    ],
    ids=["fsdp2 2", "fsdp2 4", "tp 2"],
)
def test_no_rank_ever_holds_more_than_its_share_and_one_layer(ranks: int, words: tuple[str, ...], share: float) -> None:
    """Built on meta, sharded there, and filled layer by layer (1/32 of this model); a plan is tried on few blocks."""
    for peak, kept in run_ranks(ranks, peak_of_build, False, *words):
        assert kept == pytest.approx(share, abs=0.05)
        assert kept <= peak < share + 0.2


def test_the_measure_sees_a_model_that_was_built_whole() -> None:
    for peak, kept in run_ranks(2, peak_of_build, True):
        assert peak >= 1 and kept == pytest.approx(1 / 2, abs=0.02)


# ------------------------------------------------------------------------------------- what it refuses


def refusal(trees: list[dict[str, Any]]) -> tuple[str, str, str] | str:
    """What the hook says on this rank to its own config."""
    try:
        setup = instantiate(OmegaConf.create(trees[dist.get_rank() % len(trees)]))[0]
    except ConfigError as error:
        return error.what, error.asked, error.type
    return setup.mesh_context.layout()


def tree(*words: str, **nodes: Any) -> dict[str, Any]:
    found = OmegaConf.to_container(composed(*words, **nodes))
    assert isinstance(found, dict)
    return found  # type: ignore[return-value]


def test_equal_configs_are_no_reason_to_refuse() -> None:
    assert run_ranks(2, refusal, [tree(model=MODELS["module"])]) == ["dp_shard 2"] * 2
    # A value that is a rank's own is written alike on all ranks.
    assert run_ranks(2, refusal, [tree(note="${oc.env:RANK}")]) == ["dp_shard 2"] * 2


@pytest.mark.parametrize(
    "first, second, keys",
    [
        (("strategy.reshard_after_forward=true",), (), ["strategy.reshard_after_forward"]),
        ((), ("activation_checkpointing=true",), ["activation_checkpointing"]),
        (("parallelism.tp_size=2",), (), ["parallelism.tp_size"]),
        (("strategy=ddp",), (), ["strategy"]),
    ],
    ids=["option", "mode", "sizes", "strategy"],
)
def test_ranks_with_different_configs_are_all_told_the_keys(first: Any, second: Any, keys: list[str]) -> None:
    found = run_ranks(2, refusal, [tree(*first), tree(*second)], timeout_s=20)
    for rank, (what, asked, instead) in enumerate(found):
        assert what.startswith("ranks were started with different configs")
        assert "rank 0: " in what and "rank 1: " in what
        assert all(key in what and key in asked and key in instead for key in keys)
    assert found[0][1] == found[0][2] != found[1][1]  # every rank is told to do as rank 0 does


def test_a_difference_in_the_users_own_keys_counts_too() -> None:
    trees = [tree(seed=1, data={"path": "a"}), tree(seed=2, data={"path": "b"})]
    what, asked, instead = run_ranks(2, refusal, trees)[1]
    assert "data.path (rank 0: a, rank 1: b)" in what and "seed (rank 0: 1, rank 1: 2)" in what
    assert (asked, instead) == ("data.path=b seed=2", "data.path=a seed=1")


def test_meshes_are_not_built_before_the_ranks_agree() -> None:
    """Different meshes mean different process groups, made in different order: a hang instead of an answer."""
    trees = [tree("parallelism.dp_replicate_size=2"), tree(), tree("parallelism.dp_replicate_size=2"), tree()]
    for what, _, _ in run_ranks(4, refusal, trees, timeout_s=20):
        assert "parallelism.dp_replicate_size (rank 0: 2, rank 1: " in what


def as_words(words: str) -> bool:
    """Whether Hydra composes these words to what rank 0 had."""
    with initialize(version_base=None, config_path=None):
        found = OmegaConf.to_container(compose("nemo_dist_conf", overrides=words.split()), enum_to_str=True)
    return found == OmegaConf.to_container(composed("strategy.mp_policy.param_dtype=float16"), enum_to_str=True)


def test_the_way_out_of_a_difference_can_be_typed() -> None:
    found = run_ranks(2, refusal, [tree("strategy.mp_policy.param_dtype=float16"), tree()])[1]
    assert found[2] == "strategy.mp_policy.param_dtype=float16"
    assert as_words(found[2])
    found = run_ranks(2, refusal, [tree(), tree("strategy.reshard_after_forward=false")])[1]
    assert found[1:] == ("strategy.reshard_after_forward=false", "strategy.reshard_after_forward=null")


@pytest.mark.parametrize(
    "strategy, words",
    [
        ("ddp", ("strategy is the word 'ddp'", "pip install nemo_dist_conf")),
        ("fsdp2", ("strategy is the word 'fsdp2'", "no + before strategy=")),
        ("dpp", ("there is no strategy 'dpp'", "ddp")),
        (None, ("holds no strategy of nemo_dist_conf", "strategy=null")),
        ({"_target_": "lightning.fabric.strategies.DDPStrategy"}, ("holds no strategy of nemo_dist_conf",)),
        ({"broadcast_buffers": True}, ("holds no strategy of nemo_dist_conf",)),
    ],
    ids=["word", "another word", "unknown word", "null", "another's target", "no target"],
)
def test_a_strategy_that_is_not_ours_is_refused(strategy: Any, words: tuple[str, ...]) -> None:
    """As where the plugin is not installed and ``+strategy=ddp`` is a string."""
    with pytest.raises(ConfigError) as error:
        instantiate(OmegaConf.create({"strategy": strategy, "model": MODELS["module"]}))
    assert all(word in str(error.value) for word in words)
    assert not dist.is_initialized()


@pytest.mark.parametrize("cfg", [{}, None, 3, "ddp", [1]], ids=str)
def test_a_config_that_is_no_tree_of_ours_is_refused(cfg: Any) -> None:
    with pytest.raises(ConfigError):
        instantiate(cfg)
    assert not dist.is_initialized()


@pytest.mark.parametrize("field, is_read", [("rope_colour", False), ("attention_bias", True), ("rope_theta", True)])
def test_a_field_that_no_model_reads_is_told(field: str, is_read: bool, caplog: pytest.LogCaptureFixture) -> None:
    """transformers itself takes it without a word."""
    config: dict[str, Any] = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 8}
    config[field] = {"attention_bias": True, "rope_theta": 5000.0}.get(field, "red")
    with caplog.at_level(logging.WARNING):
        build_model({"config": config}, None, 0, torch.device("cpu"))
    assert (f"model.config.{field}: no field of LlamaConfig" in caplog.text) is not is_read


def test_a_field_that_only_a_constructor_sets_is_known(caplog: pytest.LogCaptureFixture) -> None:
    """The class has no attribute of that name."""
    config: dict[str, Any] = {"model_type": "qwen3_moe", "hidden_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "moe_intermediate_size": 8, "vocab_size": 8}
    config |= {"num_experts_per_tok": 1, "num_local_experts": 4, "head_dim": 8}  # head_dim: the model asks for it
    with caplog.at_level(logging.WARNING):
        build_model({"config": config}, None, 0, torch.device("cpu"))
    assert "no field of" not in caplog.text


def returns_no_module() -> Any:
    return {"weight": torch.ones(2)}


@pytest.mark.parametrize(
    "model, words",
    [
        ({"_target_": "tests.dist.test_instantiate.returns_no_module"}, "returned dict, not a torch.nn.Module"),
        ({"width": 3}, "does not say which model to build"),
        ({"config": {"hidden_size": 8}}, "no model_type"),
        ({"config": {"model_type": "lama"}}, "transformers has no model family"),
        ("llama", "does not say which model to build"),
    ],
    ids=["no module", "no key of ours", "no model_type", "unknown model_type", "word"],
)
def test_a_model_that_cannot_be_built_is_refused(model: Any, words: str) -> None:
    for what, _, _ in run_ranks(2, refusal, [tree(model=model)]):
        assert words in what


# -------------------------------------------------------------------------------- composed, relocated


def relocated(folder: str, *words: str) -> tuple[str, str, float]:
    with initialize_config_dir(folder, version_base=None):
        cfg = compose("config", overrides=list(words))
    setup, model, optimizer = instantiate(cfg)
    loss = loss_sum(model, *batch())
    loss.backward()
    optimizer.step()
    return type(model).__name__, setup.mesh_context.layout(), float(loss.detach())


def test_groups_below_a_package_work_as_at_the_root(tmp_path: Path) -> None:
    """Composed on the rank, in an app that keeps its own model and optimizer at the root."""
    (tmp_path / "config.yaml").write_text(
        textwrap.dedent(
            """
            defaults: [nemo_dist_conf@dist, _self_]
            seed: 0
            model: {_target_: tests.dist.layouts.Net}
            optimizer: {name: sgd, lr: 0.1}
            dist: {strategy: {mp_policy: null}}
            """
        )
    )
    sharded = run_ranks(2, relocated, str(tmp_path))
    assert [found[:2] for found in sharded] == [("FSDPNet", "dp_shard 2")] * 2
    (tmp_path / "config.yaml").write_text((tmp_path / "config.yaml").read_text().replace("mp_policy: null", ""))
    words = ("strategy@dist.strategy=ddp", "dist.strategy.bucket_cap_mb=1.0")
    replicated = run_ranks(2, relocated, str(tmp_path), *words)
    assert [found[:2] for found in replicated] == [("SeveralRanksDDP", "dp 2")] * 2
    assert sharded[0][2] == pytest.approx(replicated[0][2], rel=1e-6)
    with pytest.raises(ConfigError) as error:
        run_ranks(2, relocated, str(tmp_path), "strategy@dist.strategy=ddp", "dist.parallelism.tp_size=2")
    assert error.value.asked == "strategy@dist.strategy=ddp dist.parallelism.tp_size=2"


def layout_of(cfg: DictConfig) -> str:
    return instantiate(cfg)[0].mesh_context.layout()


def test_a_composed_config_can_be_sent_to_another_process() -> None:
    """mp.spawn, submitit and Hydra's own callback that saves a job's config pickle it."""
    with initialize(version_base=None, config_path=None):
        cfg = compose("nemo_dist_conf", overrides=["strategy.autocast_dtype=bfloat16"])
    again = pickle.loads(pickle.dumps(cfg))
    assert again == cfg and OmegaConf.get_type(again.strategy) is OmegaConf.get_type(cfg.strategy)
    assert run_ranks(2, layout_of, cfg) == ["dp_shard 2"] * 2


# ------------------------------------------------------------------------------- what it leaves behind


def script(text: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", textwrap.dedent(text)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_hook_is_a_function_however_it_was_imported() -> None:
    """Python puts a submodule into its package under its own name, where the function of that name should be."""
    done = script(
        """
        import nemo_dist_conf.instantiate
        from nemo_dist_conf import instantiate
        assert callable(instantiate), instantiate
        """
    )
    assert done.returncode == 0, done.stderr


def test_after_shutdown_nothing_is_left_and_one_can_start_anew() -> None:
    done = script(
        """
        import os, threading, torch.distributed as dist
        from hydra import compose, initialize
        import nemo_dist_conf
        from torch.distributed.distributed_c10d import _world
        with initialize(version_base=None, config_path=None):
            words = ["strategy.mp_policy=null", "+model._target_=tests.dist.layouts.Net"]
            cfgs = [compose("nemo_dist_conf", overrides=[*words, *more]) for more in ([], ["parallelism.dp_size=1"])]
        for cfg in cfgs:
            setup, model, _ = nemo_dist_conf.instantiate(cfg)
            assert dist.is_initialized() and dist.get_world_size() == 1
            nemo_dist_conf.shutdown_distributed()
            assert not dist.is_initialized() and not _world.pg_map
            nemo_dist_conf.shutdown_distributed()
        nemo_dist_conf.instantiate(cfgs[0])  # left to the end of the program
        assert threading.active_count() == 1
        """
    )
    assert done.returncode == 0, done.stderr
    assert "destroy_process_group" not in done.stderr and "Error" not in done.stderr, done.stderr


def joined() -> tuple[bool, int]:
    before = dist.group.WORLD
    instantiate(composed(model=MODELS["module"]))
    return dist.group.WORLD is before, dist.get_world_size()


def test_a_group_that_exists_is_joined() -> None:
    assert run_ranks(2, joined) == [(True, 2)] * 2


def is_ddp() -> bool:
    return isinstance(instantiate(composed("strategy=ddp", model=MODELS["module"]))[1], DistributedDataParallel)


def test_one_rank_is_wrapped_like_many() -> None:
    assert run_ranks(1, is_ddp) == [True]
    assert run_ranks(1, class_of, MODELS["module"]) == [["FSDPNet", "", "blocks.0", "blocks.1", "blocks.2"]]
