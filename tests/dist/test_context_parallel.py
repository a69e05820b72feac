"""Context parallelism: sequences split over ranks, the numbers of one process.

Which families of models are equal or refused: tests/conformance/of_context.py.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.runtime.techniques.context.parallel import apply_context_parallel, local_positions, split_sequence
from tests.conformance.of_context import built, compared, on_megatron
from tests.dist.layouts import (
    ADAMW,
    FEWER_STEPS,
    LLAMA,
    MODELS,
    ROWS,
    SGD,
    Net,
    Trajectory,
    batch,
    composed,
    single_process,
    train,
)
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist

FP32 = "strategy.mp_policy=null"
CP = "parallelism.cp_size=2"
ULYSSES = "context.method=ulysses"
#: Eight chunks on four cp ranks, of two tokens each.
LENGTH = 16

#: name -> (ranks, words, microbatches)
LAYOUTS: dict[str, tuple[int, tuple[str, ...], int]] = {
    "cp 2": (2, (CP,), 1),
    "cp 2, 4 microbatches": (2, (CP,), 4),
    "cp 2, full checkpointing": (2, (CP, "activation_checkpointing=true"), 1),
    "cp 2, selective checkpointing, prefetch": (
        2,
        (CP, "activation_checkpointing=selective", "strategy.enable_fsdp2_prefetch=true"),
        1,
    ),
    "cp 4": (4, ("parallelism.cp_size=4",), 1),
    "cp 2 x dp 2": (4, (CP,), 2),
    "hsdp 2x2 x cp 2": (8, (CP, "parallelism.dp_replicate_size=2"), 1),
    "cp 2 x tp 2": (4, (CP, "parallelism.tp_size=2"), 1),
    "cp 2 x tp 2, sequence parallel": (4, (CP, "parallelism.tp_size=2", "strategy.sequence_parallel=true"), 2),
    "ulysses, full checkpointing, 4 microbatches": (2, (CP, ULYSSES, "activation_checkpointing=true"), 4),
    "ulysses, cp 4, selective checkpointing": (
        4,
        ("parallelism.cp_size=4", ULYSSES, "activation_checkpointing=selective"),
        1,
    ),
    "ulysses, cp 2 x tp 2, sequence parallel": (
        4,
        (CP, ULYSSES, "parallelism.tp_size=2", "strategy.sequence_parallel=true"),
        2,
    ),
}


def run_layout(name: str, sgd: bool) -> Trajectory:
    _, words, microbatches = LAYOUTS[name]
    cfg = composed(FP32, *words, model=MODELS["llama"], optimizer=SGD if sgd else ADAMW)
    return train(cfg, microbatches, FEWER_STEPS, sgd, LENGTH)


@functools.cache
def expected(sgd: bool) -> Trajectory:
    cfg = composed("strategy=ddp", model=MODELS["llama"], optimizer=SGD)
    weights = run_ranks(1, train, cfg, steps=0, whole=True)[0].weights
    return run_ranks(1, single_process, "llama", SGD if sgd else ADAMW, weights, LENGTH)[0]


#: SGD shows a wrong scale of the gradients, which Adam divides away.
RUNS = [(name, True) for name in LAYOUTS] + [("cp 2 x dp 2", False)]


@pytest.mark.parametrize(("name", "sgd"), RUNS, ids=[f"{name}, {'sgd' if sgd else 'adamw'}" for name, sgd in RUNS])
def test_equals_one_process(name: str, sgd: bool) -> None:
    want = expected(sgd)
    found = run_ranks(LAYOUTS[name][0], run_layout, name, sgd)
    for rank in found:
        assert rank.losses == pytest.approx(want.losses[:FEWER_STEPS], rel=1e-5)
        assert rank.norms == pytest.approx(want.norms[:FEWER_STEPS], rel=1e-5)
    for key, gradient in (want.gradients if sgd else {}).items():
        assert float((found[0].gradients[key] - gradient).norm() / gradient.norm()) < 1e-5, key


def _pieces(length: int) -> tuple[list[int], Tensor]:
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    whole = torch.arange(2 * length).view(2, length)
    return local_positions(length // mesh.size(), mesh, torch.device("cpu")).tolist(), split_sequence(whole, mesh)


def test_a_rank_holds_one_early_and_one_late_chunk_and_all_tokens_are_held_once() -> None:
    pieces = run_ranks(2, _pieces, 8)
    assert [positions for positions, _ in pieces] == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert pieces[1][1].tolist() == [[2, 3, 4, 5], [10, 11, 12, 13]]
    assert sorted(torch.cat([part for _, part in pieces], 1).flatten().tolist()) == list(range(16))


def test_a_length_that_does_not_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="10 tokens do not split"):
        run_ranks(2, _pieces, 10)


def _windows_in_a_pipeline(method: str) -> Trajectory:
    words = (
        CP,
        f"context.method={method}",
        "parallelism.pp_size=2",
        "pipeline.pp_batch_size=16",
        "pipeline.pp_microbatch_size=4",
    )
    return train(composed(FP32, *words, model={"config": WINDOWS}, optimizer=SGD), 1, FEWER_STEPS, True, LENGTH)


#: A window of 5 tokens reaches into chunks of other ranks.
WINDOWS = {**LLAMA, "model_type": "mistral", "sliding_window": 5, "head_dim": 8, "num_hidden_layers": 4}


@pytest.mark.parametrize("method", ["gather", "ulysses"])
def test_a_stage_of_a_pipeline_makes_the_masks_of_its_layers(method: str) -> None:
    found = run_ranks(4, _windows_in_a_pipeline, method)
    want = run_ranks(1, single_process, WINDOWS, SGD, found[0].weights, LENGTH)[0]
    for rank in found:
        assert rank.losses == pytest.approx(want.losses[:FEWER_STEPS], rel=1e-5)
        assert rank.norms == pytest.approx(want.norms[:FEWER_STEPS], rel=1e-5)


class OwnAttention(nn.Module):
    """Attention of a user's own through transformers' registry. adds: what it hands over beside the usual."""

    def __init__(self, config: Any, adds: str) -> None:
        super().__init__()
        self.config, self.adds = config, adds
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)
        self.is_causal = adds != "both ways"

    def forward(self, x_BSH: Tensor) -> Tensor:
        from transformers.masking_utils import create_sliding_window_causal_mask
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        query, key, value = self.qkv(x_BSH).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        place_S = torch.arange(x_BSH.size(1))
        slopes_H11 = torch.tensor([0.5, 0.25, 0.1, 0.05]).view(4, 1, 1)
        more = {
            "bias of keys": {"position_bias": (place_S * slopes_H11).unsqueeze(0)},
            "bias of pairs": {"position_bias": ((place_S - place_S[:, None]) * slopes_H11).unsqueeze(0)},
            "unknown": {"slopes": slopes_H11},
        }.get(self.adds, {})
        mask = None
        if self.adds == "window":
            mask = create_sliding_window_causal_mask(self.config, x_BSH, None, None)
        attention = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        return self.out(attention(self, query, key, value, mask, scaling=1.0, **more)[0].flatten(2))


class Pooled(nn.Module):
    def forward(self, x_BSH: Tensor) -> Tensor:
        return x_BSH + x_BSH.mean(1, keepdim=True)


class Dilated(nn.Module):
    """Sees a token far behind, and none between."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(32, 32, 2, dilation=20)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.conv(F.pad(x_BSH.transpose(1, 2), (20, 0))).transpose(1, 2)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(32)

    def forward(self, x_BSH: Tensor) -> Tensor:
        return self.norm(x_BSH.transpose(1, 2)).transpose(1, 2)


class FlatMean(nn.Module):
    """Means over all tokens so far of rows that come and go as one, with the number of a row's tokens."""

    def forward(self, x_TH: Tensor, length: int) -> tuple[Tensor, int]:
        x_BSH = x_TH.unflatten(0, (-1, length))
        return (x_BSH.cumsum(1) / torch.arange(1, length + 1).unsqueeze(-1)).flatten(0, 1), length


class Flat(nn.Module):
    """Whose mixer is given rows in one."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.out = FlatMean(), nn.Linear(32, 32)

    def forward(self, x_BSH: Tensor) -> Tensor:
        mixed_TH, length = self.mean(x_BSH.flatten(0, 1), x_BSH.size(1))
        return self.out(mixed_TH.unflatten(0, (-1, length)))


class Direct(nn.Module):
    """Attention that asks no registry."""

    def forward(self, x_BSH: Tensor) -> Tensor:
        x_BHSD = x_BSH.unflatten(-1, (4, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(x_BHSD, x_BHSD, x_BHSD, is_causal=True).transpose(1, 2).flatten(2)


class Weighed(nn.Module):
    """A recurrence whose layer also wants its states to be small: backward adds a gradient that nobody asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.fade = nn.Parameter(torch.full((32,), 0.5))

    def forward(self, x_BSH: Tensor) -> Tensor:
        state, states = torch.zeros_like(x_BSH[:, 0]), []
        for x_BH in x_BSH.unbind(1):
            state = state * self.fade + x_BH
            states.append(state)
        return _WithLoss.apply(torch.stack(states, 1), self.fade.square().sum())


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, torch.full((), 100.0)


class Counted(nn.Module):
    """Scales each token by how many up to it are no padding."""

    def forward(self, x_BSH: Tensor) -> Tensor:
        seen_BS = (x_BSH[..., 0] > 0).long()
        return x_BSH * seen_BS.cumsum(-1).unsqueeze(-1) / 8


class Own(nn.Module):
    """Learned positions, counted by the model itself, and two layers of ``mixer``."""

    def __init__(self, mixer: str) -> None:
        from transformers import LlamaConfig

        super().__init__()
        config = LlamaConfig(attn_implementation="sdpa", sliding_window=5)
        kinds: dict[str, Callable[[], nn.Module]] = {"pooled": Pooled, "dilated": Dilated, "batch norm": Normed}
        kinds |= {"direct": Direct, "weighed": Weighed, "counted": Counted, "flat": Flat}
        self.embed, self.positions = nn.Embedding(97, 32), nn.Embedding(40, 32)
        self.blocks = nn.ModuleList(kinds.get(mixer, lambda: OwnAttention(config, mixer))() for _ in range(2))
        self.head = nn.Linear(32, 97)

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSH = self.embed(ids_BS) + self.positions(torch.arange(ids_BS.size(1)))
        for block in self.blocks:
            x_BSH = x_BSH + block(x_BSH)
        return self.head(x_BSH)


def own_model(mixer: str) -> nn.Module:
    torch.manual_seed(0)
    return Own(mixer)


@pytest.mark.parametrize("mixer", ["registry", "both ways", "bias of keys", "counted"])
def test_an_own_model_whose_attention_asks_the_registry_equals_one_process(mixer: str) -> None:
    """Also one that counts positions, for its embedding and for a bias, by itself."""
    assert max(run_ranks(2, compared, functools.partial(own_model, mixer), (FP32,))) < 1e-5


@pytest.mark.parametrize(
    ("mixer", "words"),
    [("pooled", ("activation_checkpointing=true",)), ("flat", ()), ("direct", ("parallelism.cp_size=4",))],
)
def test_what_mixes_tokens_by_itself_is_run_on_whole_rows(mixer: str, words: tuple[str, ...]) -> None:
    ranks = 4 if "parallelism.cp_size=4" in words else 2
    assert max(run_ranks(ranks, compared, functools.partial(own_model, mixer), (FP32, *words))) < 1e-5


def test_a_block_that_makes_its_mask_or_counts_positions_does_so_again_in_backward() -> None:
    recomputed = (FP32, "activation_checkpointing=true")
    for mixer in ("window", "bias of keys"):
        make = functools.partial(own_model, mixer)
        assert max(run_ranks(2, compared, make, recomputed)) < 1e-5
        assert max(run_ranks(2, on_megatron, make, "activation_checkpointing=true")) < 1e-5


@pytest.mark.parametrize(
    ("mixer", "text"),
    [
        ("dilated", r"blocks\.0 \(Dilated\) mixes the tokens of a row"),
        ("weighed", "has other gradients on parts of a row than on whole rows, with Weighed on whole ones"),
        ("batch norm", r"blocks\.0 \(Normed\) mixes the tokens of a row"),
        ("bias of pairs", r"position_bias of OwnAttention has the shape \(1, 4, 8, 8\)"),
        ("unknown", "OwnAttention hands slopes to its attention, which cannot be exchanged"),
    ],
)
def test_an_own_model_that_would_see_a_part_of_the_row_is_refused(mixer: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text) as caught:
        run_ranks(2, compared, functools.partial(own_model, mixer), (FP32,))
    assert caught.value.type == "parallelism.cp_size=1"


def _net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def test_a_model_that_mixes_no_tokens_needs_no_exchange() -> None:
    assert max(run_ranks(2, compared, _net, (FP32,))) < 1e-5


def _adapted() -> nn.Module:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(built("llama", {}), LoraConfig(target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.normal_(0, 0.1)
    return adapted


def test_a_wrapped_model_of_transformers_is_given_its_positions() -> None:
    assert max(run_ranks(2, compared, _adapted, (FP32,))) < 1e-5


def _capped(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any) -> Any:
    score = torch.tanh(query @ key.repeat_interleave(2, 1).mT)
    score = score.masked_fill(torch.ones_like(score, dtype=torch.bool).triu(1), -torch.inf)
    return (score.softmax(-1) @ value.repeat_interleave(2, 1)).transpose(1, 2).contiguous(), None


def _with_own_attention() -> nn.Module:
    from transformers import AttentionInterface

    AttentionInterface.register("capped", _capped)
    model = built("llama", {})
    model.set_attn_implementation("capped")  # type: ignore[operator]
    return model


def test_an_attention_of_the_user_s_own_in_a_known_model_is_not_replaced_by_another() -> None:
    """The module that asks for it is run on whole rows, with it."""
    assert max(run_ranks(2, compared, _with_own_attention, (FP32,))) < 1e-5


def _beside_another() -> bool:
    """One of two models that were built of one config object, and the part of it that is run without its head."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{key: value for key, value in LLAMA.items() if key != "model_type"})
    torch.manual_seed(0)
    other = LlamaForCausalLM(config)
    model: Any = copy.deepcopy(other)
    model.config = model.model.config = config
    mesh = init_device_mesh("cpu", (2,))
    versions = [parameter._version for parameter in model.parameters()]
    generator = torch.get_rng_state()
    apply_context_parallel(model, mesh)
    assert torch.equal(generator, torch.get_rng_state())
    assert versions == [parameter._version for parameter in model.parameters()]
    ids_BS = batch(LENGTH)[0][:2]
    with torch.no_grad():
        wanted = other.model(ids_BS).last_hidden_state
        found = model.model(split_sequence(ids_BS, mesh)).last_hidden_state
    torch.testing.assert_close(found, split_sequence(wanted, mesh))
    return config._attn_implementation == "sdpa"


def test_another_model_of_the_same_config_and_a_part_of_the_model_run_as_before() -> None:
    assert all(run_ranks(2, _beside_another))


def _refused(given: dict[str, Any], split: bool) -> str:
    from nemo_dist_conf.instantiate import instantiate

    setup, model, _ = instantiate(composed(FP32, CP, model=MODELS["llama"], optimizer=SGD))
    (ids_BS,) = setup.mesh_context.split_sequence(batch(LENGTH)[0])
    if not split:  # as in an evaluation between steps of training
        model(input_ids=ids_BS)
        ids_BS = batch(LENGTH)[0]
    given = {key: torch.ones_like(ids_BS) if value == "tokens" else value for key, value in given.items()}
    with pytest.raises(ConfigError) as caught:
        model(input_ids=ids_BS, **given)
    if split:  # a refusal leaves the model as it was
        model(input_ids=ids_BS)
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "split", "text"),
    [
        ({"attention_mask": "tokens"}, True, "an attention mask cannot be split"),
        ({"labels": "tokens"}, True, "labels cannot be split"),
        ({"logits_to_keep": 1}, True, "was given logits_to_keep"),
        ({"position_ids": torch.zeros(3, ROWS, LENGTH // 2, dtype=torch.int64)}, True, "position_ids of shape"),
        ({"output_attentions": True}, True, "hands output_attentions to its attention"),
        ({"cu_seq_lens_q": torch.tensor([0, 8])}, True, "cu_seq_lens_q"),
        ({}, False, "rows that were not split"),
    ],
    ids=str,
)
def test_what_cannot_be_split_is_refused(given: dict[str, Any], split: bool, text: str) -> None:
    assert all(text in message for message in run_ranks(2, _refused, given, split))


def _padded(family: str) -> str:
    from nemo_dist_conf.instantiate import instantiate

    kind = "AutoModelForMaskedLM" if family == "bert" else "AutoModelForCausalLM"
    model = built(family, {"tie_word_embeddings": False}, kind)
    setup, model, _ = instantiate(composed(FP32, CP, optimizer=SGD), model)
    (ids_BS,) = setup.mesh_context.split_sequence(batch(LENGTH)[0])
    with pytest.raises(ConfigError) as caught:
        model(input_ids=ids_BS, attention_mask=torch.ones_like(ids_BS))
    return caught.value.type


def test_padding_is_left_to_a_causal_attention_only() -> None:
    assert run_ranks(2, _padded, "llama")[0] == "attention_mask=None"
    assert run_ranks(2, _padded, "bert")[0] == "parallelism.cp_size=1"
