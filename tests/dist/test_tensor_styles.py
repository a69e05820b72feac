"""Styles of modules whose code runs on parts of their weights, against one process; and plans that are repaired."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from nemo_dist_conf.checkpoint import load, save
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.runtime.model.shard_boxes import Box, boxes_of, cut_boxes
from nemo_dist_conf.runtime.torch_inside.styles import packed_shard
from tests.dist.layouts import (
    SGD,
    Trajectory,
    composed,
    full_gradients,
    full_state,
    take_plain_steps,
    take_steps,
)
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist

VOCABULARY, WIDTH, HEADS, EXPERTS, HIDDEN, STEPS, LENGTH = 97, 16, 4, 3, 12, 2, 6
TP, FSDP2 = "parallelism.tp_size=2", ("strategy=fsdp2", "strategy.mp_policy=null")


class Attention(nn.Module):
    """Latent keys, their last four numbers rotary and shared by all heads; a sink and a scale for each head."""

    def __init__(self) -> None:
        super().__init__()
        self.qk_rope_head_dim = 4
        self.q = nn.Linear(WIDTH, HEADS * 8, bias=False)
        self.kv_a = nn.Linear(WIDTH, 8 + 4)
        self.kv_b = nn.Linear(8, HEADS * 8, bias=False)
        self.out = nn.Linear(HEADS * 4, WIDTH)
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x_BSH: Tensor) -> Tensor:
        heads = len(self.sinks)
        q = self.q(x_BSH).unflatten(-1, (heads, 8)).transpose(1, 2)
        latent, rotary = self.kv_a(x_BSH).split([8, 4], dim=-1)
        k, v = self.kv_b(latent.tanh()).unflatten(-1, (heads, 8)).transpose(1, 2).chunk(2, dim=-1)
        k = torch.cat([k, rotary.unsqueeze(1).expand_as(k)], dim=-1)
        scores = q @ k.transpose(-1, -2)
        sinks = self.sinks.view(1, heads, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat([scores, sinks], dim=-1).softmax(dim=-1)[..., :-1]
        return self.out((weights @ v).transpose(1, 2).flatten(2))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * HIDDEN, WIDTH) / 4)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / 4)
        self.scale = nn.Parameter(torch.rand(EXPERTS))
        self.same = nn.Identity()

    def forward(self, x_BSH: Tensor, weights_BSE: Tensor) -> Tensor:
        found = self.same(x_BSH) * weights_BSE[..., :1]
        for index in range(EXPERTS):
            gate, up = F.linear(x_BSH, self.gate_up[index]).chunk(2, dim=-1)
            one = F.linear(gate.sigmoid() * up * self.scale[index], self.down[index])
            found = found + one * weights_BSE[..., index : index + 1]
        return found


class Shared(nn.Module):
    """[input, output] as some models keep them, in no layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(WIDTH, 2 * HIDDEN) / 4)
        self.down = nn.Parameter(torch.randn(HIDDEN, WIDTH) / 4)

    def forward(self, x_BSH: Tensor) -> Tensor:
        gate, up = (x_BSH @ self.up).chunk(2, dim=-1)
        return (gate.tanh() * up) @ self.down


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up = nn.Linear(WIDTH, 2 * HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x_BSH: Tensor) -> Tensor:
        gate, up = self.gate_up(x_BSH).chunk(2, dim=-1)
        return self.down(gate.sigmoid() * up)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.fused, self.shared = Attention(), Fused(), Shared()
        self.router, self.experts = nn.Linear(WIDTH, EXPERTS), Experts()

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_BSH = x_BSH + self.attention(x_BSH)
        x_BSH = x_BSH + self.fused(x_BSH)
        out = self.shared(x_BSH)
        return x_BSH + out + self.experts(x_BSH, self.router(x_BSH).softmax(dim=-1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSH = self.embed(ids_BS)
        for block in self.blocks:
            x_BSH = block(x_BSH)
        return self.head(x_BSH)


PLAN = {
    "attention.q": "colwise",
    "attention.kv_a": "mla_kv_a_proj",
    "attention.kv_b": "colwise",
    "attention.sinks": "colwise",
    "attention": "local_params",
    "attention.out": "rowwise",
    "fused.gate_up": "packed_colwise",
    "fused.down": "rowwise",
    "shared.up": "packed_rowwise",
    "shared.down": "colwise",
    "shared": "all_reduce",
    "experts.gate_up": "packed_colwise",
    "experts.down": "rowwise",
    "experts.same": "moe_identity_expert",
    "experts": "moe_tp_experts",
}


def words(plan: dict[str, str], blocks: str = "blocks.*.") -> str:
    return f"strategy.tp_plan={{{','.join(f'{blocks}{name}:{style}' for name, style in plan.items())}}}"


def model() -> Model:
    torch.manual_seed(5)
    return Model()


@functools.cache
def plain() -> tuple[Trajectory, dict[str, Tensor]]:
    single = model()
    return take_plain_steps(single, SGD, STEPS, LENGTH), {k: v.detach() for k, v in single.named_parameters()}


def trained(plan: dict[str, str], folder: Path | None = None) -> tuple[Trajectory, dict[str, Tensor]]:
    """A run's losses, norms and gradients, and its weights after the last step; saved into a folder then."""
    setup, split, optimizer = instantiate(composed(*FSDP2, TP, words(plan), optimizer=SGD), model=model())
    seen = take_steps(setup, split, optimizer, 1, STEPS, True, LENGTH)
    if folder is not None:
        save(folder, split, optimizer, step=STEPS)
    return seen, full_state(split)


def off(found: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    assert found.keys() == want.keys()
    return {name: float((found[name] - w).norm() / (w.norm() + 1e-6)) for name, w in want.items()}


@pytest.mark.parametrize("ranks", [2, 4], ids=["tp 2", "tp 2 x dp 2"])
def test_every_style_computes_what_one_process_does(ranks: int) -> None:
    want, after = plain()
    found = run_ranks(ranks, trained, PLAN)
    for seen, _ in found:
        assert seen.losses == pytest.approx(want.losses, rel=1e-5)
        assert seen.norms == pytest.approx(want.norms, rel=1e-5)
    seen, weights = found[0]
    assert max(off(seen.gradients, want.gradients).values()) < 1e-5, off(seen.gradients, want.gradients)
    assert max(off(weights, after).values()) < 1e-5


OTHERS = {
    "attention.kv_a": "replicated",  # the rotary part's gradient is left in parts
    "experts.same": "replicated",  # added once for each rank
    "fused.gate_up": "colwise",  # all of the gate on one rank
    "shared.up": "rowwise",
    "experts": "local_params",  # parts of a sum
}


def refusals(plans: list[dict[str, str]]) -> list[str]:
    """What is said of each plan."""
    tp = f"parallelism.tp_size={torch.distributed.get_world_size()}"
    found = []
    for plan in plans:
        with pytest.raises(ConfigError) as caught:
            instantiate(composed(*FSDP2, tp, words(plan), optimizer=SGD), model=model())
        found.append(str(caught.value))
    return found


def test_a_style_that_is_another_is_seen_in_the_trial() -> None:
    for rank in run_ranks(2, refusals, [{**PLAN, name: style} for name, style in OTHERS.items()]):
        assert all("computes something else than the plain model" in said for said in rank), rank


def test_what_does_not_fit_is_told() -> None:
    plans = [{"fused": "packed_rowwise"}, {"experts.gate_up": "mla_kv_a_proj"}]
    for parameter, modules in run_ranks(2, refusals, plans):
        assert "the style packed_rowwise is for Parameter, and blocks.0.fused is Fused" in parameter
        assert "is for modules, and blocks.0.experts.gate_up is Parameter" in modules
    for (uneven,) in run_ranks(5, refusals, [{"experts.gate_up": "packed_colwise"}]):
        assert "tp_size=5 does not divide the width of blocks.0.experts.gate_up (12)" in uneven


# What lies where.


def _boxes(size: int) -> list[list[tuple[Box, Box]]]:
    """Of [size] twice packed over tp, and of that sharded once more over dp, as this rank holds it."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    found = []
    for placements in ([packed_shard(0, 2)], [packed_shard(0, 2), packed_shard(0, 2)]):
        over = mesh["tp"] if len(placements) == 1 else mesh
        found.append([(one.box, one.here) for one in cut_boxes([size], over, placements)])
    return found


def test_a_rank_holds_its_part_of_each_weight_that_is_packed() -> None:
    ranks = run_ranks(4, _boxes, 12)
    assert [[(box.offsets[0], box.sizes[0]) for box, _ in rank[0]] for rank in ranks[:2]] == [
        [(0, 3), (6, 3)],
        [(3, 3), (9, 3)],
    ]
    assert [here.offsets[0] for _, here in ranks[1][0]] == [0, 3]
    spans = [(box.offsets[0], box.sizes[0]) for rank in ranks for box, _ in rank[1]]
    assert sorted(i for begin, size in spans for i in range(begin, begin + size)) == list(range(12))


# Checkpoints.


def _loaded(words: tuple[str, ...], folder: Path) -> tuple[dict[str, Tensor], list[float]]:
    setup, other, optimizer = instantiate(composed(*words, optimizer=SGD), model=model())
    load(folder, other, optimizer)
    return full_state(other), take_steps(setup, other, optimizer, 1, 1, False, LENGTH).losses


def test_a_checkpoint_of_packed_weights_loads_without_them_and_with(tmp_path: Path) -> None:
    (_, saved), *_ = run_ranks(4, trained, PLAN, tmp_path / "tp")
    followed = []
    for ranks, layout in ((1, FSDP2), (4, FSDP2), (2, (*FSDP2, TP, words(PLAN)))):
        (weights, losses), *_ = run_ranks(ranks, _loaded, layout, tmp_path / "tp")
        assert [name for name in saved if not torch.equal(weights[name], saved[name])] == []
        followed.append(losses)
    assert followed[1] == pytest.approx(followed[0], rel=1e-5) and followed[2] == pytest.approx(followed[0], rel=1e-5)


# Plans of families that leave something out, or take too much for split.


class Slope(nn.Module):
    """An activation with a parameter, in a split MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(0.3))

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() * self.slope


class Centred(nn.Module):
    """An activation over all of the width."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x - x.mean(dim=-1, keepdim=True))


def _family(change: str) -> tuple[float, dict[str, float], list[str]]:
    """A model of transformers with such an activation, split by its own plan, beside one process."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from nemo_dist_conf.runtime.techniques.tensor.parallel import apply_tensor_parallel

    sizes: dict[str, Any] = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2)
    heads: dict[str, Any] = dict(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16)
    found = []
    for _ in range(2):
        torch.manual_seed(2)
        one: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model("arcee", **sizes, **heads))
        for layer in one.model.layers:
            layer.mlp.act_fn = Slope() if change == "parameter" else Centred()
        found.append(one)
    single, split = found
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    styles = apply_tensor_parallel(split, mesh)
    ids = torch.arange(12).view(2, 6)
    losses = [m(ids, labels=ids).loss for m in (single, split)]
    for loss in losses:
        loss.backward()
    gap = abs(float(losses[0] - losses[1]))
    return gap, off(full_gradients(split), full_gradients(single)), [name for name in styles if "layers.1" in name]


def test_the_gradient_of_a_parameter_between_split_layers_is_summed() -> None:
    for loss, gradients, styles in run_ranks(2, _family, "parameter"):
        assert loss < 1e-6 and max(gradients.values()) < 1e-4
        assert "model.layers.1.mlp.act_fn" in styles


def test_code_that_takes_all_of_a_width_is_given_all_of_it() -> None:
    for loss, gradients, _ in run_ranks(2, _family, "width"):
        assert loss < 1e-6 and max(gradients.values()) < 1e-4


def _whole_of_packed() -> bool:
    """Whether torch's own full tensor, and the boxes, say the same of where a packed weight lies."""
    _, split, _ = instantiate(composed(*FSDP2, TP, words(PLAN), optimizer=SGD), model=model())
    for name, weight in split.named_parameters():
        assert isinstance(weight, DTensor)
        whole, local = weight.full_tensor(), weight.to_local()
        for one in boxes_of(weight):
            assert torch.equal(one.box.of(whole), one.here.of(local)), name
    return True


def test_torch_puts_together_what_the_boxes_say() -> None:
    assert all(run_ranks(4, _whole_of_packed))
