"""Frozen parts and groups by name: every layout trains what one process trains that froze and grouped them by hand."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
from torch import nn

from nemo_dist_conf.checkpoint import load, save
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.runtime.own_names import own_named_parameters
from tests.dist.cuda_shim import cuda_shim
from tests.dist.layouts import (
    ADAMW,
    LLAMA,
    TOKENS,
    Trajectory,
    composed,
    full_state,
    plain_model,
    take_plain_steps,
    take_steps,
)
from tests.dist.pool import run_ranks
from tests.plan.measure import differences, job_for, seen_of_rank

pytestmark = pytest.mark.dist

STEPS = 3
RATE = {**ADAMW, "lr": 0.003}
FOUR: dict[str, Any] = {**LLAMA, "num_hidden_layers": 4}
MIXTRAL: dict[str, Any] = {
    **{key: value for key, value in LLAMA.items() if key != "model_type"},
    **{"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 4, "num_experts_per_tok": 2},
}
#: The library splits tensors into equal parts only.
EVEN = {**LLAMA, "vocab_size": 98}
GROUPS = [
    {"params": "*.mlp", "lr": 0.01, "betas": [0.5, 0.9]},
    {"params": ["*norm*", "lm_head"], "weight_decay": 0.3, "decay_1d": False},
]


@dataclass(frozen=True)
class Choice:
    """What is asked for, and what it means for a parameter's name: whether it is trained, and its group's number."""

    config: dict[str, Any]
    is_trained: Callable[[str], bool]
    freeze: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    groups: tuple[dict[str, Any], ...] = ()

    @property
    def nodes(self) -> dict[str, Any]:
        optimizer = {**RATE, "decay_1d": not self.groups, "groups": list(self.groups)}
        trainable = {"freeze": list(self.freeze), "train": list(self.train)}
        return {"model": {"config": self.config}, "optimizer": optimizer, "trainable": trainable}


def _begins(*starts: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(starts)


CHOICES = {
    "end": Choice(
        FOUR,
        _begins("model.layers.3.", "model.norm.", "lm_head."),
        freeze=("model.embed_tokens", "model.layers.[012]"),
    ),
    "head": Choice(FOUR, _begins("lm_head."), train=("lm_head",)),
    "beginning": Choice(
        FOUR, _begins("model.embed_tokens.", "model.layers.0."), train=("model.embed_tokens", "model.layers.0")
    ),
    "parts of blocks": Choice(
        FOUR, lambda name: "q_proj" in name or "norm" in name, train=("*.q_proj.weight", "*norm")
    ),
    "but one": Choice(
        FOUR,
        lambda name: not name.startswith("model.layers.") or name == "model.layers.1.mlp.up_proj.weight",
        freeze=("model.layers",),
        train=("model.layers.1.mlp.up_proj",),
    ),
    "tie": Choice({**LLAMA, "tie_word_embeddings": True}, _begins("model.embed_tokens."), train=("lm_head",)),
    "no tie": Choice(
        {**LLAMA, "tie_word_embeddings": True}, lambda name: "embed" not in name, freeze=("lm_head.weight",)
    ),
    "half of experts": Choice(MIXTRAL, lambda name: name.endswith("experts.down_proj"), train=("*.experts.down_proj",)),
    "groups": Choice(FOUR, lambda name: ".0." not in name, freeze=("model.layers.0",), groups=tuple(GROUPS)),
    "even": Choice(EVEN, lambda name: ".1." in name or "q_proj" in name, train=("model.layers.1", "*.q_proj")),
}
FP32, AGAIN = "strategy.mp_policy=null", "activation_checkpointing=true"
TP, SP, PP = "parallelism.tp_size=2", "strategy.sequence_parallel=true", "parallelism.pp_size=2"
ROWS = ("pipeline.pp_batch_size=16", "pipeline.pp_microbatch_size=4")
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ddp": (2, ("strategy=ddp",)),
    "ddp, recomputed": (2, ("strategy=ddp", "strategy.static_graph=true", AGAIN)),
    "fsdp2": (2, (FP32,)),
    "fsdp2, recomputed, prefetched": (2, (FP32, AGAIN, "strategy.enable_fsdp2_prefetch=true")),
    "hsdp": (4, (FP32, "parallelism.dp_replicate_size=2")),
    "tp": (2, (FP32, TP, "activation_checkpointing=selective")),
    "sp": (2, (FP32, TP, SP)),
    "cp": (2, (FP32, "parallelism.cp_size=2")),
    "pp": (2, (FP32, PP, *ROWS)),
    "pp, both ends on one rank": (2, (FP32, PP, "pipeline=dualpipe_v", *ROWS)),
    "ep": (2, (FP32, "parallelism.ep_size=2")),
    "megatron": (2, ("strategy=megatron_fsdp",)),
    "megatron, tp": (2, ("strategy=megatron_fsdp", TP, "strategy.zero_dp_strategy=1")),
}
CASES = [
    *(("ddp", name) for name in ("beginning", "parts of blocks", "no tie", "groups")),
    ("ddp, recomputed", "end"),
    *(("fsdp2", name) for name in ("end", "head", "parts of blocks", "but one", "tie", "groups")),
    ("fsdp2, recomputed, prefetched", "but one"),
    ("hsdp", "beginning"),
    *(("tp", name) for name in ("parts of blocks", "groups")),
    *(("sp", name) for name in ("but one", "tie")),
    ("cp", "end"),
    *(("pp", name) for name in ("head", "beginning", "tie", "no tie", "groups")),
    ("pp, both ends on one rank", "but one"),
    ("ep", "half of experts"),
    ("megatron", "even"),
    ("megatron, tp", "even"),
]


def length_of(layout: str) -> int:
    return 16 if layout == "cp" else TOKENS


def _groups_by_hand(model: nn.Module, choice: Choice) -> torch.optim.Optimizer:
    """The groups of ``GROUPS`` as torch takes them; decay spares parameters of one dimension."""
    found: dict[tuple[str, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if choice.is_trained(name):
            which = "mlp" if ".mlp." in name else "norm" if "norm" in name or "lm_head" in name else "rest"
            found.setdefault((which, parameter.dim() > 1), []).append(parameter)
    settings: dict[str, dict[str, Any]] = {
        "mlp": {"lr": 0.01, "betas": (0.5, 0.9), "weight_decay": 0.1},
        "norm": {"lr": 0.003, "weight_decay": 0.3},
        "rest": {"lr": 0.003, "weight_decay": 0.1},
    }
    return torch.optim.AdamW(
        [
            {"params": held, **settings[which], **({} if decays else {"weight_decay": 0.0})}
            for (which, decays), held in found.items()
        ],
        eps=1e-6,
    )


def by_hand(name: str, length: int) -> Trajectory:
    """Plain torch from the same weights; ``weights`` are those after the last step."""
    choice = CHOICES[name]
    weights = full_state(instantiate(composed("strategy=ddp", model={"config": choice.config}))[1])
    model = plain_model(choice.config)
    model.load_state_dict(weights)
    for key, parameter in model.named_parameters():
        parameter.requires_grad_(choice.is_trained(key))
    update: Any = functools.partial(_groups_by_hand, choice=choice) if choice.groups else RATE
    seen = take_plain_steps(model, update, STEPS, length)
    seen.weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
    return seen


def by_name(layout: str, name: str, length: int) -> tuple[Trajectory, set[str]]:
    """A rank's steps, with the weights after them, and the parameters of which the optimizer keeps something."""

    def steps() -> tuple[Trajectory, set[str]]:
        setup, model, optimizer = instantiate(composed(*LAYOUTS[layout][1], **CHOICES[name].nodes))
        is_whole = not layout.startswith("megatron")
        seen = take_steps(setup, model, optimizer, 1, STEPS, is_whole, length)
        names = {id(parameter): key for key, parameter in own_named_parameters(model)}
        kept = {names[id(p)] for p, state in optimizer.state.items() if state and id(p) in names}
        if is_whole:
            seen.weights = full_state(model)
        return seen, kept

    if not layout.startswith("megatron"):
        return steps()
    with cuda_shim():
        return steps()


@functools.cache
def expected(name: str, length: int) -> Trajectory:
    return run_ranks(1, by_hand, name, length)[0]


@pytest.mark.parametrize("layout, name", CASES, ids=[f"{layout}-{name}" for layout, name in CASES])
def test_equals_one_process_that_did_it_by_hand(layout: str, name: str) -> None:
    want = expected(name, length_of(layout))
    ranks = run_ranks(LAYOUTS[layout][0], by_name, layout, name, length_of(layout))
    for seen, kept in ranks:
        assert seen.losses == pytest.approx(want.losses, rel=1e-5)
        assert seen.norms == pytest.approx(want.norms, rel=1e-5)
        assert all(CHOICES[name].is_trained(key) for key in kept)
    first = ranks[0][0]
    if first.weights:
        assert set(first.gradients) == set(want.gradients)
        apart = {key: float((value - want.weights[key]).norm()) for key, value in first.weights.items()}
        assert {key: off for key, off in apart.items() if off > 1e-5 * float(want.weights[key].norm())} == {}


def test_what_is_compared_tells_choices_apart() -> None:
    full = [expected(name, TOKENS).losses[-1] for name in ("end", "head", "beginning", "parts of blocks", "groups")]
    assert min(abs(a - b) for i, a in enumerate(full) for b in full[:i]) > 1e-4


# ------------------------------------------------------------------------------------------ what frozen parts cost


@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "hsdp", "tp", "pp"])
@pytest.mark.parametrize("name", ["end", "parts of blocks"])
def test_frozen_parts_have_no_gradients_and_no_states_as_planned(layout: str, name: str) -> None:
    """Bytes of every rank after a step, and its collectives where backward goes as far as without frozen parts."""
    ranks, words = LAYOUTS[layout]
    words = tuple(word for word in words if not word.startswith("activation"))
    choice = CHOICES[name]
    trainable = choice.nodes["trainable"]
    job = job_for([*words], ranks, FOUR, ADAMW, 16, 16, trainable)
    whole = job_for([*words], ranks, FOUR, ADAMW, 16, 16)
    found = run_ranks(ranks, seen_of_rank, [*words], {"config": FOUR}, ADAMW, 16, trainable=trainable)
    for seen in found:
        told = [line for line in differences(job, seen) if name != "end" or "holds" in line]
        assert told == []
        assert any("holds" in line for line in differences(whole, seen))


# ---------------------------------------------------------------------------------------------------- checkpoints


EXCHANGED = ("ddp", "fsdp2", "tp", "pp")


def saved_and_gone_on(layout: str, source: str | None, folder: Path, target: Path) -> list[float]:
    """Losses of steps after a checkpoint of another layout, or of the first step, after which one is saved."""
    setup, model, optimizer = instantiate(composed(*LAYOUTS[layout][1], **CHOICES["groups"].nodes))
    if source is None:
        losses = take_steps(setup, model, optimizer, 1, 1, False, TOKENS).losses
        save(target, model, optimizer)
        return losses
    for group in optimizer.param_groups:
        group["lr"] = 0.5  # what is loaded says otherwise
    load(folder, model, optimizer)
    return take_steps(setup, model, optimizer, 1, STEPS - 1, False, TOKENS).losses


def test_groups_and_frozen_parts_are_kept_in_checkpoints_of_any_layout(tmp_path: Path) -> None:
    """Each layout goes on from what another one saved, as if it had not been interrupted."""
    want = expected("groups", TOKENS)
    for layout in EXCHANGED:
        run_ranks(2, saved_and_gone_on, layout, None, tmp_path, tmp_path / layout)
    for source, layout in zip(EXCHANGED, (*EXCHANGED[1:], EXCHANGED[0])):
        found = run_ranks(2, saved_and_gone_on, layout, source, tmp_path / source, tmp_path)
        assert all(losses == pytest.approx(want.losses[1:], rel=1e-5) for losses in found)


# ------------------------------------------------------------------------------------------------------ refusals


def refused(words: tuple[str, ...], nodes: dict[str, Any]) -> tuple[str, str]:
    with pytest.raises(ConfigError) as error:
        instantiate(composed(*words, **nodes))
    return error.value.what, error.value.type


@pytest.mark.parametrize(
    "nodes, what, instead",
    [
        (
            {"trainable": {"freeze": ["blocks.*.norms"]}},
            "trainable.freeze: no parameter or module of the model is named blocks.*.norms",
            "'trainable.freeze=[blocks.*.norm]'",
        ),
        (
            {"trainable": {"freeze": ["*"]}},
            "trainable.freeze leaves no parameter to train",
            "'trainable.freeze=[]'",
        ),
        (
            {"optimizer": {**RATE, "groups": [{"params": "haed", "lr": 0.1}]}},
            "optimizer.groups[0].params: no parameter or module of the model is named haed",
            "'optimizer.groups=[{params:head,lr:0.1}]'",
        ),
    ],
)
def test_a_pattern_that_means_nothing_is_refused_on_every_rank_before_anything_is_wrapped(
    nodes: dict[str, Any], what: str, instead: str
) -> None:
    node = {"model": {"_target_": "tests.dist.layouts.Net"}, "optimizer": RATE, **nodes}
    assert run_ranks(2, refused, (FP32,), node) == [(what, instead)] * 2


def without_a_model() -> tuple[str, str]:
    return refused((), {"trainable": {"train": ["head"]}})


def test_a_choice_without_a_model_is_refused() -> None:
    what = "trainable.train names parameters, and there is no model"
    assert run_ranks(1, without_a_model) == [(what, "'trainable.train=[]'")]


# ---------------------------------------------------------------------------------------- optimizers of one's own


def own_optimizer(named_parameters: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
    head = [parameter for name, parameter in named_parameters if name.startswith("lm_head.")]
    rest = [parameter for name, parameter in named_parameters if not name.startswith("lm_head.")]
    return torch.optim.SGD([{"params": rest, "lr": 0.1}, {"params": head, "lr": 0.2}])


def groups_of_own(words: tuple[str, ...], is_node: bool) -> list[list[str]]:
    nodes = {**CHOICES["head"].nodes, "trainable": {"train": ["lm_head", "model.norm"]}}
    node = {"optimizer": {"_target_": "tests.dist.test_trainable.own_optimizer"}} if is_node else {"optimizer": None}
    given: Any = None if is_node else own_optimizer
    _, model, optimizer = instantiate(composed(*words, **{**nodes, **node}), optimizer=given)
    names = {id(parameter): name for name, parameter in own_named_parameters(model)}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


@pytest.mark.parametrize("is_node", [True, False])
def test_an_optimizer_of_ones_own_may_take_names(is_node: bool) -> None:
    for layout in ("ddp, recomputed", "fsdp2"):
        found = run_ranks(2, groups_of_own, LAYOUTS[layout][1], is_node)
        assert found == [[["model.norm.weight"], ["lm_head.weight"]]] * 2
    assert run_ranks(2, groups_of_own, LAYOUTS["pp"][1], is_node) == [
        [[], []],  # a stage of which nothing is trained
        [["model.norm.weight"], ["lm_head.weight"]],
    ]


def given_parameters(words: tuple[str, ...]) -> list[Any]:
    _, _, optimizer = instantiate(
        composed(*words, **{**CHOICES["head"].nodes, "optimizer": None}),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    )
    return [len(group["params"]) for group in optimizer.param_groups]


def test_a_stage_of_which_nothing_is_trained_has_an_optimizer_without_parameters() -> None:
    assert run_ranks(2, given_parameters, LAYOUTS["pp"][1]) == [[0], [1]]
