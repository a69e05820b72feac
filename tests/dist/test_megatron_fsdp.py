"""strategy=megatron_fsdp: the real library on CPU ranks (tests/dist/cuda_shim.py) gives the numbers of one process."""

from __future__ import annotations

import copy
import functools
import inspect
import json
from dataclasses import fields
from pathlib import Path
from typing import Any, Callable
from unittest import mock

import pytest
import torch
from torch import nn

from nemo_dist_conf.config import MegatronFSDPConfig
from nemo_dist_conf.errors import ConfigError, TrainingError
from nemo_dist_conf.gradients import accumulate
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.runtime.engines.megatron_library import ARGUMENTS
from tests.dist.cuda_shim import cuda_shim
from tests.dist.layouts import (
    ADAMW,
    LLAMA,
    MODELS,
    SGD,
    TOKENS,
    Net,
    Trajectory,
    batch,
    composed,
    full_tensor,
    loss_sum,
    plain_model,
    single_process,
    train,
)
from tests.dist.pool import run_ranks
from tests.train.test_recipe import TINY

pytestmark = pytest.mark.dist

MEGATRON = "strategy=megatron_fsdp"
CP, TP = "parallelism.cp_size=2", "parallelism.tp_size=2"
#: The library splits tensors into equal parts only.
EVEN = {**LLAMA, "vocab_size": 98}
LENGTH = 16


def zero(stage: int) -> str:
    return f"strategy.zero_dp_strategy={stage}"


def shimmed(work: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with cuda_shim():
        return work(*args, **kwargs)


def run_shimmed(ranks: int, work: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    return run_ranks(ranks, functools.partial(shimmed, work), *args, **kwargs)


def whole_weights(model: Any) -> dict[str, torch.Tensor]:
    model._replace_param_with_distributed_if_needed()
    return {name.removeprefix("module."): whole(parameter) for name, parameter in model.named_parameters()}


def whole(parameter: Any) -> torch.Tensor:
    """All of a parameter whose shards may be uneven, so that DTensor's own gather would be wrong."""
    local = parameter.to_local().flatten()
    if all(placement.is_replicate() for placement in parameter.placements):
        return local.view(parameter.shape).clone()
    parts: list[Any] = [None] * parameter.device_mesh.size()
    torch.distributed.all_gather_object(parts, local.detach().clone(), group=parameter.device_mesh.get_group(0))
    return torch.cat(parts).view(parameter.shape)


def node_of(model: str) -> dict[str, Any]:
    even = {"even": {"config": EVEN}, "even tied": {"config": {**EVEN, "tie_word_embeddings": True}}}
    return {**MODELS, **even}[model]


@functools.cache
def expected(model: str, optimizer: str, length: int) -> Trajectory:
    weights = run_ranks(1, initial_weights, model)[0]
    kind = node_of(model)["config"] if model.startswith("even") else model
    return run_ranks(1, single_process, kind, {"sgd": SGD, "adamw": ADAMW}[optimizer], weights, length)[0]


def initial_weights(model: str) -> dict[str, torch.Tensor]:
    wrapped = instantiate(composed("strategy=ddp", model=node_of(model), optimizer=SGD))[1]
    return {name.removeprefix("module."): full_tensor(value) for name, value in wrapped.state_dict().items()}


#: name -> (ranks, words, microbatches, model, optimizer, tokens)
CASES: dict[str, tuple[int, tuple[str, ...], int, str, str, int]] = {
    "zero 3": (2, (), 1, "llama", "sgd", TOKENS),
    "zero 3, adamw": (2, (), 1, "llama", "adamw", TOKENS),
    "zero 3, 4 microbatches": (2, (), 4, "llama", "sgd", TOKENS),
    "zero 3, full checkpointing": (2, ("activation_checkpointing=true",), 2, "llama", "sgd", TOKENS),
    "zero 3, 4 ranks, own model": (4, (), 2, "module", "adamw", TOKENS),
    "zero 3, 1 rank": (1, (), 2, "llama", "sgd", TOKENS),
    "zero 3, meta device": (2, ("strategy.init_fsdp_with_meta_device=true",), 1, "llama", "sgd", TOKENS),
    "zero 3, tied": (2, (), 2, "tied", "sgd", TOKENS),
    "zero 3, no buckets": (2, ("strategy.disable_bucketing=true",), 1, "llama", "sgd", TOKENS),
    "zero 3, averaged in the collective": (2, ("strategy.average_in_collective=true",), 2, "llama", "sgd", TOKENS),
    "zero 3, summed": (2, ("strategy.calculate_per_token_loss=true",), 2, "llama", "sgd", TOKENS),
    "zero 3, main weights": (2, ("strategy.preserve_fp32_weights=true",), 2, "llama", "sgd", TOKENS),
    "zero 3, main gradients": (2, ("strategy.grad_reduce_in_fp32=true",), 2, "llama", "sgd", TOKENS),
    "zero 2": (2, (zero(2),), 2, "llama", "sgd", TOKENS),
    "zero 2, not overlapped": (2, (zero(2), "strategy.overlap_param_gather=false"), 2, "llama", "sgd", TOKENS),
    "zero 1": (2, (zero(1),), 2, "llama", "adamw", TOKENS),
    "zero 1, not overlapped": (
        2,
        (zero(1), "strategy.overlap_param_gather=false", "strategy.overlap_grad_reduce=false"),
        2,
        "llama",
        "sgd",
        TOKENS,
    ),
    "zero 0": (2, (zero(0),), 2, "llama", "sgd", TOKENS),
    "zero 0, not overlapped": (2, (zero(0), "strategy.overlap_grad_reduce=false"), 2, "llama", "adamw", TOKENS),
    "cp 2": (2, (CP,), 1, "llama", "sgd", LENGTH),
    "cp 2 x dp 2": (4, (CP,), 2, "llama", "sgd", LENGTH),
    "tp 2": (2, (TP,), 2, "even", "sgd", TOKENS),
    "tp 2 x dp 2": (4, (TP,), 2, "even", "adamw", TOKENS),
    "tp 2 x dp 2, zero 1, tied": (4, (TP, zero(1)), 2, "even tied", "sgd", TOKENS),
    "tp 2 x cp 2, full checkpointing": (4, (TP, CP, "activation_checkpointing=true"), 1, "even", "sgd", LENGTH),
}


def run_case(name: str) -> Trajectory:
    _, words, microbatches, model, optimizer, length = CASES[name]
    cfg = composed(MEGATRON, *words, model=node_of(model), optimizer={"sgd": SGD, "adamw": ADAMW}[optimizer])
    return train(cfg, microbatches, length=length)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name: str) -> None:
    ranks, _, _, model, optimizer, length = CASES[name]
    want = expected(model, optimizer, length)
    for found in run_shimmed(ranks, run_case, name):
        assert found.losses == pytest.approx(want.losses, rel=1e-5)
        assert found.norms == pytest.approx(want.norms, rel=1e-5)


def several_models(count: int) -> list[Trajectory]:
    return [run_case("tp 2 x dp 2, zero 1, tied") for _ in range(count)]


def test_models_one_after_the_other_do_not_wait_for_each_other() -> None:
    """DTensor remembers the first one's mesh, which equals the second one's, and hands it to some gradients."""
    for first, *others in run_shimmed(4, several_models, 2, timeout_s=60.0):
        assert all(other == first for other in others)


def _plain_loop(stage: int, overlaps: bool) -> list[float]:
    """What a user writes who knows nothing of any of this: no accumulate, no clipping."""
    words = [f"strategy.overlap_grad_reduce={overlaps}".lower()] if stage < 2 else []
    cfg = composed(MEGATRON, zero(stage), *words, model=MODELS["llama"], optimizer=SGD)
    setup, model, optimizer = instantiate(cfg)
    context, losses = setup.mesh_context, []
    ids, labels = (part.chunk(context.data_size)[context.data_rank] for part in batch())
    tokens = int((batch()[1] != -100).sum())
    for _ in range(3):
        loss = loss_sum(model, ids, labels)
        (loss * context.gradient_size / tokens / 10).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(context.sum_over_data(loss.detach())) / tokens)
    return losses


@pytest.mark.parametrize(("stage", "overlaps"), [(3, True), (2, True), (1, True), (1, False), (0, True), (0, False)])
def test_a_plain_loop_is_right(stage: int, overlaps: bool) -> None:
    model = run_ranks(1, _plain_single)[0]
    for found in run_shimmed(2, _plain_loop, stage, overlaps):
        assert found == pytest.approx(model, rel=1e-5)


def _plain_single() -> list[float]:
    _, model, optimizer = instantiate(composed("strategy=ddp", model=MODELS["llama"], optimizer=SGD))
    ids, labels = batch()
    tokens, losses = int((labels != -100).sum()), []
    for _ in range(3):
        loss = loss_sum(model, ids, labels) / tokens
        (loss / 10).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def _first_weights(*words: str) -> dict[str, torch.Tensor]:
    return whole_weights(instantiate(composed(MEGATRON, *words, model=MODELS["llama"], optimizer=ADAMW))[1])


@pytest.mark.parametrize("words", [(), ("strategy.init_fsdp_with_meta_device=true",)], ids=["whole", "meta"])
def test_weights_are_those_of_every_other_strategy(words: tuple[str, ...]) -> None:
    """Also after the optimizer was made, which the library does by a step."""
    want = run_ranks(1, initial_weights, "llama")[0]
    for found in run_shimmed(2, _first_weights, *words):
        assert [name for name, value in want.items() if not torch.equal(found[name], value)] == []


def _memory(stage: int) -> tuple[int, int]:
    """Elements of parameters and of optimizer state on this rank."""
    _, model, optimizer = instantiate(composed(MEGATRON, zero(stage), model=MODELS["llama"], optimizer=SGD))
    held = sum(p.to_local().numel() for p in model.parameters())
    state = sum(v["momentum_buffer"].to_local().numel() for v in optimizer.state.values())
    return held, state


def test_what_each_stage_shards() -> None:
    whole_model = sum(p.numel() for p in plain_model("llama").parameters())
    for stage in (1, 2, 3):
        ranks = run_shimmed(2, _memory, stage)
        assert sum(state for _, state in ranks) == whole_model
        assert max(state for _, state in ranks) < 0.6 * whole_model
    assert [state for _, state in run_shimmed(2, _memory, 0)] == [whole_model] * 2


def _units(model: dict[str, Any], *words: str) -> list[str]:
    wrapped = instantiate(composed(MEGATRON, *words, model=model, optimizer=SGD))[1]
    return [kind.__name__ for kind in wrapped.fsdp_unit_modules]


def test_units_are_the_models_own_blocks_unless_told_otherwise() -> None:
    qwen = {"config": {**LLAMA, "model_type": "qwen3", "head_dim": 8}}
    assert run_shimmed(1, _units, MODELS["llama"])[0] == ["LlamaDecoderLayer"]
    assert run_shimmed(1, _units, qwen)[0] == ["Qwen3DecoderLayer"]
    assert run_shimmed(1, _units, MODELS["module"])[0] == ["Block"]
    word = "strategy.megatron_fsdp_unit_modules=[transformers.models.llama.modeling_llama.LlamaMLP]"
    assert run_shimmed(1, _units, MODELS["llama"], word)[0] == ["LlamaMLP"]


def _seen(word: str, look: str) -> Any:
    """What the library made of an option: an attribute of the wrapper, by its path."""
    cfg = composed(MEGATRON, *word.split(), optimizer=SGD)
    model = Net().to(torch.bfloat16) if "fp32" in word else Net()
    wrapped = instantiate(cfg, model=model)[1]
    return functools.reduce(getattr, look.split("."), wrapped)


@pytest.mark.parametrize(
    ("word", "look", "default", "changed"),
    [
        ("zero_dp_strategy=1", "data_parallel_sharding_strategy", "optim_grads_params", "optim"),
        ("grad_reduce_in_fp32=true", "mp_policy.main_grads_dtype", None, torch.float32),
        ("preserve_fp32_weights=true", "mp_policy.main_params_dtype", None, torch.float32),
        ("overlap_grad_reduce=false", "ddp_config.overlap_grad_reduce", True, False),
        ("overlap_param_gather=false", "ddp_config.overlap_param_gather", True, False),
        ("average_in_collective=true", "ddp_config.average_in_collective", False, True),
        ("calculate_per_token_loss=true", "calculate_per_token_loss", False, True),
        ("keep_fp8_transpose_cache=true", "ddp_config.keep_fp8_transpose_cache", False, True),
    ],
)
def test_what_the_library_makes_of_an_option(word: str, look: str, default: Any, changed: Any) -> None:
    stage = f" {zero(1)}" if word.startswith("overlap") else ""
    assert run_shimmed(1, _seen, zero(1) if stage else zero(3), look) == [default]
    assert run_shimmed(1, _seen, f"strategy.{word}{stage}", look) == [changed]


def _optimized_in(*words: str) -> torch.dtype:
    """What the optimizer updates of a model in bfloat16."""
    cfg = composed(MEGATRON, *words, optimizer=SGD)
    return next(instantiate(cfg, model=Net().to(torch.bfloat16))[1].parameters()).dtype


def test_the_optimizer_updates_float32_weights_where_they_are_preserved() -> None:
    assert run_shimmed(1, _optimized_in) == [torch.bfloat16]
    assert run_shimmed(1, _optimized_in, "strategy.preserve_fp32_weights=true") == [torch.float32]


class _Handed(Exception):
    pass


def _handed(*words: str) -> tuple[bool, bool, bool]:
    """What is handed to the library that CPU ranks cannot run, or that shows nowhere else."""

    def stop(module: nn.Module, **options: Any) -> None:
        raise _Handed(options["nccl_ub"], options["fsdp_double_buffer"], options["disable_bucketing"])

    there = mock.patch("nemo_dist_conf.strategies.megatron_fsdp.has_module", lambda path: True)
    with there, mock.patch("megatron_fsdp.fully_shard_model", stop), pytest.raises(_Handed) as handed:
        instantiate(composed(MEGATRON, *words, optimizer=SGD), model=Net())
    return handed.value.args


def test_buffers_are_asked_for() -> None:
    assert run_shimmed(1, _handed) == [(False, False, False)]
    assert run_shimmed(1, _handed, "strategy.nccl_ub=true") == [(True, False, False)]
    assert run_shimmed(1, _handed, "strategy.fsdp_double_buffer=true") == [(False, True, False)]
    assert run_shimmed(1, _handed, "strategy.disable_bucketing=true") == [(False, False, True)]


class Flat(nn.Module):
    """A model without blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(97, 8), nn.Linear(8, 97)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids))


class Odd(Net):
    """With a parameter of a kind that the library cannot shard."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        dtype = {"double": torch.float64, "complex": torch.complex64}.get(kind)
        self.scale = nn.Parameter(torch.ones(() if kind == "scalar" else 8, dtype=dtype))
        self.embed = nn.Embedding(97, 32, sparse=kind == "sparse")
        if kind == "sparse":
            del self.scale


def odd(kind: str) -> dict[str, Any]:
    return {"_target_": f"{__name__}.Odd", "kind": kind}


LINEAR = "strategy.megatron_fsdp_unit_modules=[torch.nn.Conv2d]"


@pytest.mark.parametrize(
    ("model", "words", "text"),
    [
        (MODELS["llama"], (LINEAR,), "LlamaForCausalLM has no module of class torch.nn.Conv2d"),
        ({"_target_": f"{__name__}.Flat"}, (), "Flat shows no blocks"),
        (MODELS["tied"], ("strategy.init_fsdp_with_meta_device=true",), "are one parameter"),
        (MODELS["llama"], (TP,), "has 97 rows or columns"),
        (MODELS["module"], (TP,), "type     strategy=fsdp2 'strategy.tp_plan="),
        (odd("scalar"), (), "scale has no dimension"),
        (odd("double"), (), "scale is float64"),
        (odd("complex"), (), "scale is complex64"),
        (odd("sparse"), (), "embed is an embedding with sparse=True"),
    ],
)
def test_what_a_model_cannot_do_is_refused(model: dict[str, Any], words: tuple[str, ...], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        run_shimmed(2, _units, model, *words)


class TwoTowers(Net):
    """Blocks that no step uses, or with them a module of the root that none uses."""

    def __init__(self, root: bool) -> None:
        super().__init__()
        self.others = nn.ModuleList(copy.deepcopy(block) for block in self.blocks)
        self.norm = nn.LayerNorm(32) if root else None


def _one_tower(root: bool) -> float:
    model = TwoTowers(root)
    plain = copy.deepcopy(model)
    _, wrapped, optimizer = instantiate(composed(MEGATRON, zero(1), optimizer=SGD), model)
    loss_sum(wrapped, *batch()).backward()
    loss_sum(plain, *batch()).backward()
    optimizer.step()
    plain_optimizer = torch.optim.SGD(plain.parameters(), SGD["lr"], momentum=SGD["momentum"])
    plain_optimizer.step()
    with torch.no_grad():
        return abs(float(loss_sum(wrapped, *batch()) / loss_sum(plain, *batch())) - 1)


def test_a_group_of_which_a_step_uses_a_part_is_refused() -> None:
    """The library would update with gradients of one rank; a unit that is not used at all does no harm."""
    assert max(run_shimmed(2, _one_tower, False)) < 1e-5
    with pytest.raises(ConfigError, match=r"norm\.weight, norm\.bias got no gradient in this step"):
        run_shimmed(2, _one_tower, True)


def _not_finite(*words: str) -> float:
    _, model, optimizer = instantiate(composed(MEGATRON, *words, model=MODELS["llama"], optimizer=SGD))
    ids, labels = batch()
    rank = torch.distributed.get_rank()
    with accumulate(model, last=True):
        (loss_sum(model, ids[:2], labels[:2]) * (float("nan") if rank == 0 else 1.0)).backward()
    optimizer.step()
    return float(whole_weights(model)["lm_head.weight"].sum())


def test_gradients_that_are_not_finite_stop_all_ranks_unless_told_otherwise() -> None:
    with pytest.raises(TrainingError, match="norm of all gradients is nan"):
        run_shimmed(2, _not_finite)
    assert all(value != value for value in run_shimmed(2, _not_finite, "strategy.check_for_nan_in_grad=false"))


def _recipe(folder: str, *words: str) -> list[float]:
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    from nemo_dist_conf.recipe.yaml_folder import config_folder
    from nemo_dist_conf.train.loop import run

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        cfg = compose("train", overrides=[*TINY, "train.steps=4", "train.micro_batch_size=2", *words])
    run(cfg, folder)
    rows = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [value for row in rows for value in (json.loads(row)["loss"], json.loads(row)["grad_norm"])]


def test_the_recipe_needs_nothing_else_changed(tmp_path: Path) -> None:
    (one,) = run_ranks(1, _recipe, str(tmp_path), "strategy=ddp")
    (tmp_path / "two").mkdir()
    found = run_shimmed(2, _recipe, str(tmp_path / "two"), MEGATRON)[0]
    assert found == pytest.approx(one, rel=1e-5)
    (tmp_path / "low").mkdir()
    low = run_shimmed(2, _recipe, str(tmp_path / "low"), MEGATRON, "train.dtype=bfloat16")[0]
    assert low != found and low == pytest.approx(found, rel=0.05)


def _given() -> None:
    """An optimizer over parameters that are not the wrapped model's."""
    cfg = composed(MEGATRON, model=MODELS["llama"])
    stray = nn.Linear(2, 2)
    instantiate(cfg, optimizer=lambda parameters: torch.optim.SGD(stray.parameters(), lr=0.1))


def test_an_optimizer_over_other_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match="not the wrapped model's"):
        run_shimmed(1, _given)


def _by_manager() -> list[float]:
    """The page's own way: a manager, a model with values and an optimizer over it."""
    from torch.distributed.device_mesh import init_device_mesh

    from nemo_dist_conf.strategies.megatron_fsdp import MegatronFSDPManager

    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(
        [{"params": model.blocks.parameters(), "lr": 0.5}, {"params": model.head.parameters(), "lr": 0.25}], lr=0.1
    )
    mesh = init_device_mesh("cpu", (2, 1, 1), mesh_dim_names=("dp", "cp", "tp"))
    wrapped, same = MegatronFSDPManager(MegatronFSDPConfig(), mesh).parallelize(model, optimizer)
    assert same is optimizer and [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    before = whole_weights(wrapped)
    loss_sum(wrapped, *batch()).backward()
    optimizer.step()
    after = whole_weights(wrapped)
    return [float((after[name] - before[name]).abs().max()) for name in ("embed.weight", "head.weight")]


def test_a_manager_keeps_the_optimizers_groups() -> None:
    for embed, head in run_shimmed(2, _by_manager):
        assert embed == 0 and head > 0


def _held(by_manager: bool) -> tuple[int, int]:
    """(elements of parameters that this rank keeps, those of the whole model) on dp 2 x cp 2."""
    from torch.distributed.device_mesh import init_device_mesh

    from nemo_dist_conf.strategies.megatron_fsdp import MegatronFSDPManager

    if by_manager:
        torch.manual_seed(0)
        mesh = init_device_mesh("cpu", (2, 2, 1), mesh_dim_names=("dp", "cp", "tp"))
        wrapped = MegatronFSDPManager(MegatronFSDPConfig(), mesh).parallelize(Net())
    else:
        wrapped = instantiate(composed(MEGATRON, CP, model=MODELS["llama"], optimizer=SGD))[1]
    wrapped._replace_param_with_distributed_if_needed()
    parameters = list(wrapped.parameters())
    return sum(p.to_local().numel() for p in parameters), sum(p.numel() for p in parameters)


@pytest.mark.parametrize("by_manager", [False, True])
def test_ranks_of_the_cp_axis_share_the_weights_too(by_manager: bool) -> None:
    """Also on a mesh of the user's own, which has no axis of both."""
    found = run_shimmed(4, _held, by_manager)
    held, whole = [part for part, _ in found], found[0][1]
    assert sum(held) == whole and max(held) < 0.3 * whole


def test_every_field_has_its_place_in_the_librarys_signature() -> None:
    import megatron_fsdp

    arguments = set(inspect.signature(megatron_fsdp.fully_shard_model).parameters)
    assert set(ARGUMENTS.values()) <= arguments
    policy = set(inspect.signature(megatron_fsdp.MixedPrecisionPolicy).parameters)
    elsewhere = {
        "megatron_fsdp_unit_modules": "fsdp_unit_modules" in arguments,
        "grad_reduce_in_fp32": "main_grads_dtype" in policy,
        "preserve_fp32_weights": "main_params_dtype" in policy,
        "check_for_nan_in_grad": "check_for_nan_in_grad" not in arguments,  # gone from the library: done by us
        "activation_checkpointing": "activation_checkpointing" not in arguments,  # never was: done by us
    }
    assert all(elsewhere.values()), elsewhere
    assert {item.name for item in fields(MegatronFSDPConfig)} == set(ARGUMENTS) | set(elsewhere)
