"""Pipeline parallelism: stages on real ranks, every schedule, the numbers of one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.gradients import clip_grad_norm_
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.names import SCHEDULES
from nemo_dist_conf.runtime.engines.pipeline_model import Pipeline
from tests.dist.layouts import (
    ADAMW,
    FEWER_STEPS,
    LLAMA,
    MAX_NORM,
    ROWS,
    SGD,
    VOCABULARY,
    Block,
    Operators,
    Trajectory,
    batch,
    composed,
    full_state,
    train,
)
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist

FP32 = "strategy.mp_policy=null"
PP, TP, CP = (f"parallelism.{axis}_size=2" for axis in ("pp", "tp", "cp"))
HSDP, SEQUENCE = "parallelism.dp_replicate_size=2", "strategy.sequence_parallel=true"
LENGTH = 16
MODEL = {"config": {**LLAMA, "num_hidden_layers": 4}}


class Chain(nn.Module):
    """A user's own model without names that anyone knows; it says where its blocks are."""

    distributed_blocks = "stack"

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(32, VOCABULARY)  # first here, last in forward
        self.table = nn.Embedding(VOCABULARY, 32)
        self.stack = nn.ModuleList(Block(32) for _ in range(4))

    def forward(self, ids_BS: Tensor) -> Tensor:
        x_BSH = self.table(ids_BS)
        for block in self.stack:
            x_BSH = block(x_BSH)
        return self.out(x_BSH)


CHAIN = {"_target_": "tests.dist.test_pipeline.Chain"}


def rows(count: int) -> str:
    return f"pipeline.pp_batch_size={count}"


#: name -> (ranks, words, microbatches of the loop, model)
CASES: dict[str, tuple[int, tuple[str, ...], int, dict[str, Any]]] = {
    **{f"pp 2, {name}": (2, (PP, f"pipeline={name}", rows(ROWS)), 1, MODEL) for name in SCHEDULES},
    "pp 2, microbatches of 4 rows": (2, (PP, rows(ROWS), "pipeline.pp_microbatch_size=4"), 1, MODEL),
    "pp 2, 4 steps accumulated": (2, (PP, rows(ROWS // 4)), 4, MODEL),
    "pp 2, 2 steps accumulated, means": (
        2,
        (PP, rows(ROWS // 2), "pipeline.scale_grads_in_schedule=true"),
        2,
        MODEL,
    ),
    "pp 2, every backward reduced": (2, (PP, rows(ROWS), "strategy.defer_fsdp_grad_sync=false"), 1, MODEL),
    "pp 2, full checkpointing, zbv": (
        2,
        (PP, rows(ROWS), "pipeline=zbv_zero_bubble", "activation_checkpointing=true"),
        1,
        MODEL,
    ),
    "pp 2, selective checkpointing": (2, (PP, rows(ROWS), "activation_checkpointing=selective"), 1, MODEL),
    "pp 2, own model": (2, (PP, rows(ROWS)), 1, CHAIN),
    "pp 4": (4, ("parallelism.pp_size=4", rows(ROWS)), 1, MODEL),
    "pp 2 x dp 2": (4, (PP, rows(ROWS // 2), "strategy.reshard_after_forward=true"), 1, MODEL),
    "pp 2 x dp 2, zbv, own model": (4, (PP, rows(ROWS // 2), "pipeline=zbv_zero_bubble"), 1, CHAIN),
    "pp 2 x cp 2, interleaved": (4, (PP, CP, rows(ROWS), "pipeline=interleaved_1f1b"), 1, MODEL),
    "pp 2 x tp 2, sequence parallel": (4, (PP, TP, SEQUENCE, rows(ROWS), "pipeline.pp_microbatch_size=8"), 1, MODEL),
    "pp 2 x hsdp 2x2, dualpipe": (8, (PP, HSDP, rows(ROWS // 4), "pipeline=dualpipe_v"), 1, MODEL),
}


def run_case(name: str) -> Trajectory:
    _, words, microbatches, model = CASES[name]
    return train(composed(FP32, *words, model=model, optimizer=SGD), microbatches, FEWER_STEPS, True, LENGTH)


@functools.cache
def expected(own: bool) -> Trajectory:
    return run_ranks(1, one_rank, CHAIN if own else MODEL)[0]


def one_rank(model: dict[str, Any]) -> Trajectory:
    """One rank, whose equality with plain torch is proven in test_parity."""
    return train(composed(FP32, model=model, optimizer=SGD), 1, FEWER_STEPS, True, LENGTH)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(name: str) -> None:
    want = expected("own model" in name)
    found = run_ranks(CASES[name][0], run_case, name)
    for rank in found:
        assert rank.losses == pytest.approx(want.losses, rel=1e-5)
        assert rank.norms == pytest.approx(want.norms, rel=1e-5)
    assert found[0].weights.keys() == want.weights.keys()
    assert [key for key in want.weights if not torch.equal(want.weights[key], found[0].weights[key])] == []
    off = {key: float((found[0].gradients[key] - g).norm() / g.norm()) for key, g in want.gradients.items()}
    assert max(off.values()) < 1e-5, max(off.items(), key=lambda entry: entry[1])


def test_what_is_compared_moves() -> None:
    """By far more than the tolerance, and clipping scales every step."""
    for own in (False, True):
        want = expected(own)
        assert abs(want.losses[-1] / want.losses[0] - 1) > 1e-2 and min(want.norms) > MAX_NORM


# What a rank holds.


def _held(*words: str) -> tuple[list[str], int, str]:
    _, model, _ = instantiate(composed(FP32, PP, rows(ROWS), *words, model=MODEL, optimizer=ADAMW))
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    own = sum(row.parameter_bytes for row in model.rows if row.pp_rank == torch.distributed.get_rank())
    assert held == own
    assert model.num_parameters == sum(row.parameters for row in model.rows)
    return [name for name, _ in model.named_parameters()], held, model.table()


def test_a_rank_holds_its_stages_and_no_other_parameter() -> None:
    first, last = run_ranks(2, _held)
    whole = expected(False).weights
    assert {name.split(".")[1] for name in first[0]} == {"embed_tokens", "layers"}
    assert sorted([*first[0], *last[0]]) == sorted(whole)
    assert first[1] + last[1] == sum(value.numel() * 4 for value in whole.values())
    assert first[2] == last[2]
    lines = first[2].splitlines()
    assert lines[0].split() == ["stage", "pp", "rank", "parameters", "MiB", "modules"]
    assert lines[1].endswith("model.embed_tokens, model.layers.0-1") and lines[1].split()[:2] == ["0", "0"]
    assert lines[2].endswith("model.layers.2-3, model.norm, lm_head") and lines[2].split()[:2] == ["1", "1"]


SPLITS: dict[str, tuple[tuple[str, ...], list[int], list[int]]] = {
    "layers_per_stage": (("pipeline.layers_per_stage=1", "pipeline=interleaved_1f1b"), [1, 1, 1, 1], [0, 1, 0, 1]),
    "named": (
        (
            "pipeline.module_fqns_per_model_part="
            "[[model.embed_tokens,model.layers.0,model.layers.1,model.layers.2],[model.layers.3,model.norm,lm_head]]",
        ),
        [3, 1],
        [0, 1],
    ),
    "V": (("pipeline=zbv_zero_bubble",), [1, 1, 1, 1], [0, 1, 1, 0]),
}


def _split(*words: str, model: dict[str, Any] = MODEL) -> list[tuple[int, int]]:
    _, pipeline, _ = instantiate(composed(FP32, PP, rows(ROWS), *words, model=model, optimizer=ADAMW))
    return [(row.pp_rank, sum("layers" in name for name in row.modules)) for row in pipeline.rows]


@pytest.mark.parametrize("name", SPLITS)
def test_the_splitting_options_decide_what_a_stage_holds(name: str) -> None:
    words, layers, ranks = SPLITS[name]
    for found in run_ranks(2, _split, *words):
        assert [count for _, count in found] == layers and [rank for rank, _ in found] == ranks


def test_stages_are_rounded_to_a_multiple_of_the_ranks() -> None:
    """Five layers, two a stage, make three stages: neither schedule has a place for those."""
    model = {"config": {**LLAMA, "num_hidden_layers": 5}}
    words = ("pipeline=interleaved_1f1b", "pipeline.layers_per_stage=2")
    with pytest.raises(ConfigError, match="3 stages do not fit Interleaved1F1B"):
        run_ranks(2, _split, *words, model=model)
    up = "pipeline.round_virtual_stages_to_pp_multiple=up"
    assert [layers for _, layers in run_ranks(2, _split, *words, up, model=model)[0]] == [1, 1, 1, 2]
    down = "pipeline.round_virtual_stages_to_pp_multiple=down"
    assert [layers for _, layers in run_ranks(2, _split, words[1], down, model=model)[0]] == [2, 3]


# Every other option has its effect.


def _losses(path: str | None, *words: str) -> list[float]:
    csv = [f"pipeline.pp_schedule_csv={path}"] if path else []
    cfg = composed(FP32, PP, rows(4), *csv, *words, model=MODEL, optimizer=SGD)
    return train(cfg, 4, FEWER_STEPS, length=LENGTH).losses


def test_a_schedule_from_a_file_runs(tmp_path: Path) -> None:
    """Two stages a rank, the second one's forward of a microbatch as early as it can be: no schedule of torch's."""
    rows_of_ranks = [
        "0F0,0F1,2F0,0F2,2F1,0F3,2F2,2F3,2B0,2B1,2B2,2B3,0B0,0B1,0B2,0B3",
        "1F0,3F0,3B0,1F1,3F1,3B1,1F2,3F2,3B2,1F3,3F3,3B3,1B0,1B1,1B2,1B3",
    ]
    path = tmp_path / "own.csv"
    path.write_text("\n".join(rows_of_ranks) + "\n")
    for losses in run_ranks(2, _losses, str(path)):
        assert losses == pytest.approx(expected(False).losses, rel=1e-5)


def mean_loss(logits_BSV: Tensor, labels_BS: Tensor) -> Tensor:
    return F.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten()) * 3


def _one_step(*words: str) -> tuple[float, float]:
    _, model, _ = instantiate(composed(FP32, PP, rows(ROWS), *words, model=MODEL, optimizer=SGD))
    loss = model.step(*batch(LENGTH))
    return float(loss), float(clip_grad_norm_(model, None))


def test_a_loss_function_of_the_users_own_and_its_scaling() -> None:
    own = "pipeline.loss_fn=tests.dist.test_pipeline.mean_loss"
    (sum_loss, sum_norm), _ = run_ranks(2, _one_step, own)
    (mean, mean_norm), _ = run_ranks(2, _one_step, own, "pipeline.scale_grads_in_schedule=true")
    assert sum_loss == pytest.approx(3 * ROWS * expected(False).losses[0], rel=0.05)
    assert (mean, mean_norm) == (pytest.approx(sum_loss / ROWS), pytest.approx(sum_norm / ROWS))


def _forwards() -> tuple[int, int]:
    """Forwards of the first layer in the first step and in the second."""
    _, model, _ = instantiate(composed(FP32, PP, rows(4), model=MODEL, optimizer=SGD))
    counts = [0]
    part = next(iter(model.parts.values()))
    part.get_submodule("model.layers.0").register_forward_pre_hook(lambda *_: counts.__setitem__(0, counts[0] + 1))
    ids, labels = (tensor[:4] for tensor in batch(LENGTH))
    model.step(ids, labels)
    first, counts[0] = counts[0], 0
    model.step(ids, labels)
    return first, counts[0]


def test_no_forward_is_spent_on_finding_shapes() -> None:
    """torch would spend one, which also counts in what experts and user's hooks see."""
    assert run_ranks(2, _forwards)[0] == (4, 4)


def _sent(*words: str) -> set[torch.dtype]:
    """dtypes of what the first stage hands on."""
    _, model, _ = instantiate(composed(PP, rows(4), *words, model=MODEL, optimizer=SGD))
    found: set[torch.dtype] = set()
    part = next(iter(model.parts.values()))
    part.register_forward_hook(lambda module, args, output: found.add(output.dtype))
    loss = model.step(*(tensor[:4] for tensor in batch(LENGTH)))
    assert torch.isfinite(loss)
    return found


BF16 = "strategy.mp_policy.output_dtype=float32"  # computes in bfloat16 by default


@pytest.mark.parametrize(
    ("words", "sent"),
    [
        ((FP32,), torch.float32),
        ((FP32, "pipeline.dtype=bfloat16"), torch.bfloat16),
        ((BF16,), torch.bfloat16),
        ((BF16, "pipeline.dtype=float32"), torch.float32),
        (("strategy.autocast_dtype=bfloat16", FP32), torch.float32),
    ],
)
def test_stages_send_what_they_compute_in_unless_told_otherwise(words: tuple[str, ...], sent: torch.dtype) -> None:
    first, last = run_ranks(2, _sent, *words)
    assert first == {sent}
    # The model's own outputs are cast as the strategy says, whatever stages send.
    assert last == {torch.bfloat16 if "strategy.autocast_dtype=bfloat16" in words else torch.float32}


def _reductions(*words: str) -> tuple[int, int, int]:
    """Reduce-scatters of one step: before the last backward, inside it, after it."""
    _, model, _ = instantiate(composed(FP32, PP, rows(4), *words, model=MODEL, optimizer=SGD))
    ids, labels = (tensor[:4] for tensor in batch(LENGTH))
    model.step(ids, labels)  # makes the schedule
    marks: list[int] = []
    stage = model._schedule._stage
    inner = stage.backward_one_chunk

    def counted(*args: Any, **kwargs: Any) -> None:
        marks.append(seen.count("reduce_scatter"))
        inner(*args, **kwargs)
        marks.append(seen.count("reduce_scatter"))

    stage.backward_one_chunk = counted
    with Operators() as seen:
        model.step(ids, labels)
    return marks[-2], marks[-1] - marks[-2], seen.count("reduce_scatter") - marks[-1]


def test_when_gradients_are_reduced() -> None:
    """Two layers and the root of a stage; four microbatches."""
    assert run_ranks(4, _reductions)[0] == (0, 0, 3)
    assert run_ranks(4, _reductions, "pipeline.patch_stage_backward_maybe_with_nosync=true")[0] == (0, 3, 0)
    assert run_ranks(4, _reductions, "strategy.defer_fsdp_grad_sync=false")[0] == (9, 3, 0)


def _gathers(*words: str) -> int:
    _, model, _ = instantiate(composed(FP32, PP, rows(4), *words, model=MODEL, optimizer=SGD))
    ids, labels = (tensor[:4] for tensor in batch(LENGTH))
    model.step(ids, labels)
    with Operators() as seen:
        model.step(ids, labels)
    assert all(isinstance(part, FSDPModule) for part in model.parts.values())
    return seen.count("all_gather")


def test_parameters_stay_gathered_between_the_microbatches_of_a_step() -> None:
    """By default; reshard_after_forward=true frees them after each forward."""
    assert run_ranks(4, _gathers)[0] == 3
    assert run_ranks(4, _gathers, "strategy.reshard_after_forward=true")[0] > 3


class Skipping(nn.Module):
    """A model written to be split: it skips what is None, and takes hidden states in place of ids."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, 32)
        self.stack = nn.ModuleList(Block(32) for _ in range(4))
        self.out = nn.Linear(32, VOCABULARY)
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        x = self.table(x) if self.table is not None else x
        for block in self.stack:
            x = block(x) if block is not None else x
        return self.out(x) if self.out is not None else x


def _unpatched(model: dict[str, Any], *words: str) -> tuple[float, bool]:
    _, pipeline, _ = instantiate(composed(FP32, PP, rows(ROWS), *words, model=model, optimizer=SGD))
    loss = float(pipeline.step(*batch(LENGTH)))
    children = [child for part in pipeline.parts.values() for child in part._modules.values()]
    return loss, None in children


SKIPPING = {"_target_": "tests.dist.test_pipeline.Skipping"}


def test_a_model_that_skips_what_it_lacks_is_left_as_it_is() -> None:
    """patch_inner_model=false: modules of other stages are None; true: stand-ins."""
    (patched, none), _ = run_ranks(2, _unpatched, SKIPPING)
    (own, skipped), _ = run_ranks(2, _unpatched, SKIPPING, "pipeline.patch_inner_model=false")
    assert own == pytest.approx(patched, rel=1e-6) and (none, skipped) == (False, True)


@pytest.mark.parametrize(
    ("model", "word", "text"),
    [
        (MODEL, "pipeline.patch_inner_model=false", "does not skip modules that are None"),
        (MODEL, "pipeline.patch_causal_lm_model=false", "does not skip modules that are None"),
        (SKIPPING, "pipeline.patch_causal_lm_model=false", "has no model inside it"),
    ],
)
def test_a_model_that_does_not_skip_is_refused_unpatched(model: dict[str, Any], word: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        run_ranks(2, _unpatched, model, word)


def _peak_bytes(schedule: str) -> int:
    """The most bytes that this rank's stage holds at a time for its backward; parameters not counted."""
    words = (FP32, PP, rows(8), f"pipeline={schedule}", f"pipeline.pp_seq_len={LENGTH}")
    _, model, _ = instantiate(composed(*words, model=MODEL, optimizer=SGD))
    held, peak = [0], [0]

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor
            self.bytes = 0 if tensor.is_leaf and tensor.requires_grad else tensor.nbytes
            held[0] += self.bytes
            peak[0] = max(peak[0], held[0])

        def __del__(self) -> None:
            held[0] -= self.bytes

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        model.step(*(tensor[:8] for tensor in batch(LENGTH)))
    assert held[0] == 0
    return peak[0]


def test_1f1b_holds_the_activations_of_fewer_microbatches_than_gpipe() -> None:
    """Of eight: two on the first stage, and one on the last, which begins backward at once."""
    first, last = run_ranks(2, _peak_bytes, "gpipe")
    assert run_ranks(2, _peak_bytes, "1f1b") == [
        pytest.approx(first * 2 / 8, rel=0.02),
        pytest.approx(last * 1 / 8, rel=0.02),
    ]


# What is given to it has to fit.


def _step_with(count: int, length: int) -> None:
    _, model, _ = instantiate(composed(FP32, PP, rows(4), model=MODEL, optimizer=SGD))
    ids, labels = (tensor[:4] for tensor in batch(LENGTH))
    model.step(ids, labels)
    held = [parameter.grad.full_tensor() for parameter in model.parameters()]
    try:
        model.step(ids[:count, :length], labels[:count, :length])
    finally:  # a stage that was set up again would have lost what is accumulated
        assert all(torch.equal(p.grad.full_tensor(), grad) for p, grad in zip(model.parameters(), held, strict=True))


@pytest.mark.parametrize(("count", "length", "text"), [(3, LENGTH, "batches of 4 rows"), (4, 8, "16 tokens")])
def test_a_batch_of_another_shape_is_refused_on_every_rank(count: int, length: int, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        run_ranks(2, _step_with, count, length)


def _first_step() -> None:
    _, model, _ = instantiate(composed(FP32, PP, rows(4), "pipeline.pp_seq_len=8", model=MODEL, optimizer=SGD))
    model.step(*(tensor[:4] for tensor in batch(LENGTH)))


def test_rows_have_the_length_that_was_given() -> None:
    with pytest.raises(ConfigError, match="rows of 8 tokens") as error:
        run_ranks(2, _first_step)
    assert error.value.problems[0].asked == "pipeline.pp_seq_len=8"


def _forward() -> None:
    _, model, _ = instantiate(composed(FP32, PP, rows(4), model=MODEL, optimizer=SGD))
    assert isinstance(model, Pipeline)
    model(batch(LENGTH)[0])


def test_a_pipeline_has_no_forward_of_its_own() -> None:
    with pytest.raises(ConfigError, match=r"model\.step\(input_ids, labels\)"):
        run_ranks(2, _forward)


def _state() -> bool:
    cfg = composed(FP32, PP, rows(4), model=MODEL, optimizer=SGD)
    _, model, optimizer = instantiate(cfg)
    names = {name for name, _ in model.named_parameters()}
    assert set(model.state_dict()) == names
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(names)
    return set(full_state(model)) == set(expected_names())


def expected_names() -> list[str]:
    _, model, _ = instantiate(composed(FP32, PP, rows(4), model=MODEL, optimizer=SGD))
    return [name for row in model.rows for name in _names(row.modules)]


def _names(modules: tuple[str, ...]) -> list[str]:
    from tests.dist.layouts import plain_model  # the transformers model that nothing of ours has touched

    plain = {name for name, _ in plain_model("llama").named_parameters()} | {
        name.replace("layers.2", "layers.3") for name, _ in plain_model("llama").named_parameters()
    }
    return [name for name in plain if any(name.startswith(f"{module}.") for module in modules)]


def test_parameters_have_the_names_of_the_whole_model() -> None:
    assert run_ranks(2, _state) == [True, True]
