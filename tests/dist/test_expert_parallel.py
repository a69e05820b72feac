"""Expert parallelism: experts on their own mesh, tokens sent to them, the numbers of one process."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.runtime.techniques.expert.routing import ExpertLoad
from nemo_dist_conf.train.step import train_step
from tests.dist.layouts import (
    FEWER_STEPS,
    LLAMA,
    MODELS,
    SGD,
    Operators,
    Trajectory,
    batch,
    composed,
    full_gradients,
    full_state,
    loss_sum,
    plain_model,
    single_process,
    train,
)
from tests.dist.pool import run_ranks
from tests.zoo.axes import AXES
from tests.zoo.cell import model_of

pytestmark = pytest.mark.dist

FP32 = "strategy.mp_policy=null"
EP, CP, PP, TP = (f"parallelism.{axis}_size=2" for axis in ("ep", "cp", "pp", "tp"))
FULL, SELECTIVE = "activation_checkpointing=true", "activation_checkpointing=selective"
LENGTH = 16
SHAPE = {**LLAMA, "num_hidden_layers": 2, "num_experts_per_tok": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {**SHAPE, "model_type": "mixtral", "num_local_experts": 4},
    "qwen3_moe": {
        **SHAPE,
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "head_dim": 8,
        "norm_topk_prob": True,
    },
}
#: Experts from the second half of the layers on, so that the first of two pipeline ranks has none.
LATE = {**FAMILIES["qwen3_moe"], "num_hidden_layers": 4, "mlp_only_layers": [0, 1]}

#: name -> (ranks, words, microbatches)
CASES: dict[str, tuple[int, tuple[str, ...], int]] = {
    "ep 2": (2, (EP,), 1),
    "no ep, ddp": (2, (), 1),
    "ep 2, full checkpointing, 4 microbatches": (2, (EP, FULL), 4),
    "ep 2, selective checkpointing, prefetch": (2, (EP, SELECTIVE, "strategy.enable_fsdp2_prefetch=true"), 1),
    "ep 2, router recomputed": (2, (EP, FULL, "moe.ignore_router_for_ac=false"), 1),
    "ep 2, head apart": (2, (EP, "moe.wrap_outer_model=false", "moe.lm_head_precision=float32"), 1),
    "ep 4": (4, ("parallelism.ep_size=4",), 1),
    "ep 2 x ep_shard 2": (4, (EP, "moe.reshard_after_forward=true"), 2),
    "ep 2 x hsdp 2x2": (4, (EP, "parallelism.dp_replicate_size=2"), 2),
    "ep 2 x cp 2": (4, (EP, CP), 1),
    "tp 2": (2, (TP,), 1),
    "tp 2 x dp 2, full checkpointing": (4, (TP, FULL), 2),
    "ep 2 x tp 2": (2, (EP, TP), 1),
    "ep 2 x tp 2 x dp 2, selective checkpointing": (4, (EP, TP, SELECTIVE), 2),
    "ep 4 x tp 2": (4, ("parallelism.ep_size=4", TP), 1),
    "ep 2 x tp 2 x cp 2": (4, (EP, TP, CP), 1),
    "ep 2 x tp 2 x pp 2": (4, (EP, TP, PP, "pipeline.pp_batch_size=16"), 1),
    "ep 2 x pp 2": (4, (EP, PP, "pipeline.pp_batch_size=8"), 1),
    "ep 2 x pp 2, late experts": (4, (EP, PP, "pipeline.pp_batch_size=8"), 1),
    "ep 2 x pp 2, zbv, full checkpointing": (
        4,
        (EP, PP, "pipeline.pp_batch_size=8", "pipeline=zbv_zero_bubble", FULL, "moe.ignore_router_for_ac=false"),
        1,
    ),
}
#: Qwen3-MoE is another code of the same kind.
RUNS = [("mixtral", name) for name in CASES if "late" not in name] + [
    ("qwen3_moe", name) for name in ("ep 2", "tp 2", "ep 2 x tp 2", "ep 2 x ep_shard 2", "ep 2 x pp 2, late experts")
]


def config_of(family: str, name: str) -> dict[str, Any]:
    if "late" in name:
        return LATE
    return {**FAMILIES[family], "num_hidden_layers": 4 if "zbv" in name else 2}


def run_case(family: str, name: str) -> Trajectory:
    _, words, microbatches = CASES[name]
    first = ("strategy=ddp",) if "ddp" in name else (FP32,)
    cfg = composed(*first, *words, model={"config": config_of(family, name)}, optimizer=SGD)
    return train(cfg, microbatches, FEWER_STEPS, True, LENGTH)


def expected(config: dict[str, Any]) -> Trajectory:
    return _expected(json.dumps(config))


@functools.cache
def _expected(text: str) -> Trajectory:
    config = json.loads(text)
    weights = run_ranks(1, initial_weights, config)[0]
    return run_ranks(1, single_process, config, SGD, weights, LENGTH)[0]


def initial_weights(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    return full_state(instantiate(composed("strategy=ddp", model={"config": config}, optimizer=SGD))[1])


@pytest.mark.parametrize(("family", "name"), RUNS)
def test_equals_one_process(family: str, name: str) -> None:
    want = expected(config_of(family, name))
    found = run_ranks(CASES[name][0], run_case, family, name)
    for rank in found:
        assert rank.losses == pytest.approx(want.losses[:FEWER_STEPS], rel=1e-5)
        assert rank.norms == pytest.approx(want.norms[:FEWER_STEPS], rel=1e-5)
    assert [key for key in want.weights if not torch.equal(want.weights[key], found[0].weights[key])] == []
    off = {key: float((found[0].gradients[key] - g).norm() / g.norm()) for key, g in want.gradients.items()}
    assert max(off.values()) < 1e-5, max(off.items(), key=lambda entry: entry[1])


# Where experts are.


def _shapes() -> tuple[list[int], list[int], list[str]]:
    cfg = composed(FP32, EP, model={"config": FAMILIES["mixtral"]}, optimizer=SGD)
    setup, model, _ = instantiate(cfg)
    weight = model.get_parameter("model.layers.0.mlp.experts.down_proj")
    assert isinstance(weight, DTensor)
    names = list(weight.device_mesh.mesh_dim_names or ())
    assert setup.mesh_context.moe_mesh is not None
    return list(weight.shape), list(weight.to_local().shape), names


def test_a_rank_holds_its_part_of_some_experts() -> None:
    """Four experts of [64, 96] on a mesh of ep_shard 2 x ep 2: two of them on a rank, of each one half the rows."""
    for whole, local, names in run_ranks(4, _shapes):
        assert (whole, local, names) == ([4, 64, 96], [2, 32, 96], ["ep_shard", "ep"])


def _without_tokens() -> tuple[float, float, list[float]]:
    """A router that sends every token to the same two experts, which lie on one rank."""
    words = (EP,) if torch.distributed.get_world_size() > 1 else ()
    cfg = composed(FP32, *words, model={"config": FAMILIES["mixtral"]}, optimizer=SGD)
    setup, model, optimizer = instantiate(cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("gate.weight"):
                parameter.zero_()
    context, load = setup.mesh_context, ExpertLoad(model, 4)
    ids, labels = (part.chunk(context.data_size)[context.data_rank] for part in batch(LENGTH))
    tokens = int((batch(LENGTH)[1] != -100).sum())
    losses = []
    for _ in range(2):
        done = train_step(
            model, optimizer, [(ids, labels)], context, global_tokens=tokens, max_grad_norm=None, load=load
        )
        losses.append(done.loss)
        norm, imbalance = done.grad_norm, done.more["expert_imbalance"]
    return norm, imbalance, losses


def test_a_rank_that_gets_no_token_does_not_hang() -> None:
    ((norm, imbalance, losses),) = run_ranks(1, _without_tokens)
    for rank in run_ranks(2, _without_tokens, timeout_s=60):
        assert rank[0] == pytest.approx(norm, rel=1e-5) and rank[2] == pytest.approx(losses, rel=1e-5)
        assert rank[1] == imbalance
    assert imbalance > 1.3


def _late_experts(*words: str) -> tuple[float, float]:
    """Loss and imbalance of a step."""
    setup, model, optimizer = instantiate(composed(FP32, *words, model={"config": LATE}, optimizer=SGD))
    context, load = setup.mesh_context, ExpertLoad(model, 4)
    ids, labels = (part.chunk(context.data_size)[context.data_rank] for part in batch(LENGTH))
    done = train_step(
        model, optimizer, [(ids, labels)], context, global_tokens=ids.numel(), max_grad_norm=None, load=load
    )
    return done.loss, done.more["expert_imbalance"]


def test_a_pipeline_rank_without_experts_takes_part_in_what_is_counted() -> None:
    ((loss, imbalance),) = run_ranks(1, _late_experts)
    assert imbalance > 1
    for found in run_ranks(2, _late_experts, PP, "pipeline.pp_batch_size=16", timeout_s=60):
        assert found == (pytest.approx(loss, rel=1e-5), imbalance)


# The loss that balances experts.


BALANCED = {**FAMILIES["mixtral"], "output_router_logits": True, "router_aux_loss_coef": 0.1}


def _balanced(*words: str, microbatches: int = 1) -> tuple[float, float, dict[str, torch.Tensor]]:
    setup, model, optimizer = instantiate(composed(*words, model={"config": BALANCED}, optimizer={**SGD, "lr": 0.0}))
    context = setup.mesh_context
    gradients: dict[str, torch.Tensor] = {}
    step, optimizer.step = optimizer.step, lambda: gradients.update(full_gradients(model)) or step()
    parts = (part.chunk(context.data_size)[context.data_rank] for part in batch(LENGTH))
    ids, labels = context.split_sequence(*parts)
    tokens = int((batch(LENGTH)[1] != -100).sum())
    split = list(zip(ids.chunk(microbatches), labels.chunk(microbatches)))
    done = train_step(model, optimizer, split, context, global_tokens=tokens, max_grad_norm=None)
    return done.loss, done.more["aux_loss"], gradients


def _plain_balanced(weights: dict[str, torch.Tensor]) -> tuple[float, float, dict[str, torch.Tensor]]:
    """transformers' own loss on the whole batch."""
    model = plain_model(BALANCED)
    model.load_state_dict(weights)
    ids, labels = batch(LENGTH)
    output = model(ids)
    loss = F.cross_entropy(output.logits.flatten(0, 1), labels.flatten())
    (loss + BALANCED["router_aux_loss_coef"] * output.aux_loss).backward()
    return float(loss), float(output.aux_loss), full_gradients(model)


@pytest.mark.parametrize(
    ("ranks", "words", "microbatches"),
    [
        (1, ("strategy=ddp",), 4),
        (2, ("strategy=ddp",), 1),
        (2, ("strategy=ddp",), 2),
        (2, (FP32, EP), 4),
        (2, (FP32, EP, FULL), 1),
        (4, (FP32, EP, CP), 1),
    ],
    ids=["1, 4 microbatches", "ddp 2", "ddp 2, 2 microbatches", "ep 2, 4 microbatches", "ep 2, full ac", "ep 2 x cp 2"],
)
def test_the_balancing_loss_is_that_of_the_whole_batch(ranks: int, words: tuple[str, ...], microbatches: int) -> None:
    """However it is split over ranks and microbatches."""
    weights = run_ranks(1, initial_weights, BALANCED)[0]
    loss, balance, gradients = run_ranks(1, _plain_balanced, weights)[0]
    for found_loss, found_balance, found in run_ranks(ranks, _balanced, *words, microbatches=microbatches):
        assert (found_loss, found_balance) == (pytest.approx(loss, rel=1e-5), pytest.approx(balance, rel=1e-5))
        off = {key: float((found[key] - g).norm() / g.norm()) for key, g in gradients.items()}
        assert max(off.values()) < 1e-5, max(off.items(), key=lambda entry: entry[1])


def _balanced_without_a_loss() -> None:
    config = {
        **SHAPE,
        "model_type": "glm4_moe",
        "n_routed_experts": 4,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
        "output_router_logits": True,
    }
    setup, model, optimizer = instantiate(composed(FP32, model={"config": config}, optimizer=SGD))
    ids, labels = batch(LENGTH)
    train_step(model, optimizer, [(ids, labels)], setup.mesh_context, global_tokens=1, max_grad_norm=None)


def test_a_model_that_has_no_such_loss_is_refused() -> None:
    with pytest.raises(ConfigError, match="Glm4MoeForCausalLM has no loss that balances its experts"):
        run_ranks(1, _balanced_without_a_loss)


# Every option has its effect.


def _counts(word: str, *words: str) -> int:
    """Operators of one step whose name holds the word."""
    _, model, _ = instantiate(composed(FP32, EP, *words, model={"config": FAMILIES["mixtral"]}, optimizer=SGD))
    ids, _ = batch(LENGTH)
    with Operators() as seen:
        model(input_ids=ids[:2]).logits.sum().backward()
    return seen.count(word)


def test_the_routers_choice_is_saved_or_made_again() -> None:
    assert run_ranks(2, _counts, "topk", FULL) == [2, 2]
    assert run_ranks(2, _counts, "topk", FULL, "moe.ignore_router_for_ac=false") == [4, 4]
    assert run_ranks(2, _counts, "topk", SELECTIVE) == [2, 2]


def test_experts_stay_gathered_or_are_gathered_again() -> None:
    kept, freed = (
        run_ranks(4, _counts, "all_gather", f"moe.reshard_after_forward={value}")[0] for value in ("false", "true")
    )
    assert freed == kept + 2  # layers


def _precisions(*words: str) -> dict[str, torch.dtype]:
    """What the head and the experts compute in."""
    cfg = composed(EP, *words, model={"config": FAMILIES["mixtral"]}, optimizer=SGD)
    _, model, _ = instantiate(cfg)
    found: dict[str, torch.dtype] = {}
    model.lm_head.register_forward_hook(lambda module, args, out: found.update(head=out.dtype))
    experts = model.model.layers[0].mlp.experts
    experts.register_forward_hook(lambda module, args, out: found.update(experts=out.dtype))
    model(input_ids=batch(LENGTH)[0][:2]).logits.float().sum().backward()
    return found


@pytest.mark.parametrize(
    ("words", "head", "experts"),
    [
        ((), torch.bfloat16, torch.bfloat16),
        (("moe.lm_head_precision=float32",), torch.float32, torch.bfloat16),
        (("moe.mp_policy.enabled=true", "moe.mp_policy.param_dtype=float32"), torch.bfloat16, torch.float32),
        ((FP32, "moe.lm_head_precision=bfloat16"), torch.bfloat16, torch.float32),
    ],
)
def test_precision_of_head_and_experts(words: tuple[str, ...], head: torch.dtype, experts: torch.dtype) -> None:
    for found in run_ranks(2, _precisions, *words):
        assert found == {"head": head, "experts": experts}


def _units(*words: str) -> tuple[bool, bool]:
    _, model, _ = instantiate(composed(FP32, EP, *words, model={"config": FAMILIES["mixtral"]}, optimizer=SGD))
    return isinstance(model.lm_head, FSDPModule), isinstance(model.model, FSDPModule)


def test_the_head_is_one_with_the_embedding_or_a_unit_of_its_own() -> None:
    assert run_ranks(2, _units) == [(False, False)] * 2
    assert run_ranks(2, _units, "moe.wrap_outer_model=false") == [(True, True)] * 2


def _refused(model: Any, *words: str) -> None:
    """model: its node, or a function that builds it, of which nothing is known before."""
    instantiate(composed(FP32, EP, *words, model=model, optimizer=SGD))


TIED = {**FAMILIES["mixtral"], "tie_word_embeddings": True}


def build_tied() -> torch.nn.Module:
    return plain_model(TIED)


@pytest.mark.parametrize("model", [{"config": TIED}, {"_target_": f"{__name__}.build_tied"}], ids=["config", "built"])
@pytest.mark.parametrize("word", ["moe.lm_head_precision=float32", "moe.wrap_outer_model=false"])
def test_a_tied_head_is_not_sharded_apart(model: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match="embedding and head are one parameter") as error:
        run_ranks(2, _refused, model, word)
    (problem,) = error.value.problems
    assert word in problem.asked
    run_ranks(2, _refused, model, problem.instead)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ({"config": {**FAMILIES["mixtral"], "num_local_experts": 3}}, "does not divide the model's 3 experts"),
        (MODELS["llama"], "has no experts"),
        (MODELS["module"], "has no experts"),
    ],
)
def test_what_has_no_experts_to_split_is_refused(model: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        run_ranks(2, _refused, model)


def grouped_products(family: str, axis: str) -> int:
    """On a rank: products of grouped matrices in a forward and backward."""
    model = instantiate(composed(*AXES[axis].words, optimizer=SGD), model=model_of(family))[1]
    ids = torch.randint(90, (4, 16))
    with Operators() as seen:
        loss_sum(model, ids, ids).backward()
    return seen.count("grouped_mm")


@pytest.mark.parametrize("axis", ["tp", "ep"])
def test_experts_are_grouped_products_however_they_are_split(axis: str) -> None:
    """As many as where nothing is split: torch has them on a CPU too, and transformers' models use them by default."""
    (whole,) = run_ranks(1, grouped_products, "qwen3_moe", "fsdp2")
    assert whole > 0 and run_ranks(2, grouped_products, "qwen3_moe", axis) == [whole] * 2
