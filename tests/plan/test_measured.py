"""Bytes, calls and activations of a plan, against what torch counts on the wrapped model."""

from __future__ import annotations

import contextlib
import dataclasses
from collections import Counter
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed._tools.mem_tracker import MemTracker

from nemo_dist_conf.families.plans import complete_plan
from nemo_dist_conf.gradients import accumulate, clip_grad_norm_
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.plan.activations import stage_bytes
from nemo_dist_conf.plan.memory import memory_of
from nemo_dist_conf.plan.rank_shards import Place, units_of
from nemo_dist_conf.plan.traffic import traffic_of
from nemo_dist_conf.runtime.techniques.loss import token_loss_sum
from tests.dist.cuda_shim import cuda_shim
from tests.dist.layouts import ADAMW, LLAMA, SGD, composed, loss_sum
from tests.dist.matrix import LENGTH, Layout, layouts, model_of
from tests.dist.pool import close_pools, run_ranks
from tests.plan.fake import fake_rank
from tests.plan.matrix import check_fake, check_real, needs_all_ranks, words_of
from tests.plan.measure import differences, job_for, seen_of_rank

pytestmark = pytest.mark.dist

PLAIN = "strategy.mp_policy=null"
NARROW = "strategy.mp_policy.output_dtype=float32"
TP = "parallelism.tp_size=2"
CP = "parallelism.cp_size=2"
ULYSSES = "context.method=ulysses"
SEQUENCE = "strategy.sequence_parallel=true"
#: Llama's own plan as a user types it, without a word on the sequence.
_PLAN = {
    name: style for name, style in (complete_plan("llama") or {}).items() if name[-7:] not in (".q_norm", ".k_norm")
}
TYPED = f"strategy.tp_plan={{{','.join(f'{name}:{style}' for name, style in _PLAN.items())}}}"
MODES = ("false", "true", "selective")
#: Wide enough for activations to be more than what is counted with them.
MODEL = {
    **LLAMA,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
}
#: Where the rest is to be small beside the blocks.
DEEPER = {**MODEL, "num_hidden_layers": 3}
QWEN = {**MODEL, "model_type": "qwen3", "head_dim": 32}
MIXTRAL = {**MODEL, "model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN_MOE = {**QWEN, "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 512}


@pytest.mark.parametrize("layout", list(layouts(2)), ids=lambda one: f"{one} {one.schedule or ''}")
def test_two_ranks_hold_and_call_what_is_planned(layout: Layout) -> None:
    assert (check_real(layout) if needs_all_ranks(layout) else check_fake(layout)) == []


FOUR = [
    Layout(dp=4, dp_replicate=2),
    Layout(dp=4, ep=2),
    Layout(dp=2, tp=2, sequence=True),
    Layout(cp=2, tp=2),
    Layout(cp=2, dp=2),
]


@pytest.mark.parametrize("layout", FOUR, ids=str)
def test_four_ranks_hold_and_call_what_is_planned(layout: Layout) -> None:
    assert check_fake(layout) == []


PIPELINE = Layout(pp=2, dp=2, schedule="1f1b")
IN_STAGES: dict[str, tuple[Layout, str]] = {
    "freed after each forward": (PIPELINE, "strategy.reshard_after_forward=true"),
    "freed, two stages a rank": (Layout(pp=2, dp=2, schedule="looped_bfs"), "strategy.reshard_after_forward=true"),
    "reduced in each backward": (PIPELINE, "strategy.defer_fsdp_grad_sync=false"),
    "recomputed": (PIPELINE, "activation_checkpointing=true"),
    "handed on in bf16": (PIPELINE, "pipeline.dtype=bfloat16"),
    "experts freed": (Layout(dp=4, ep=2), "moe.reshard_after_forward=true"),
}


@pytest.mark.parametrize("name", IN_STAGES)
def test_options_of_stages_and_experts_are_planned_as_they_run(name: str) -> None:
    layout, word = IN_STAGES[name]
    words, model = [*words_of(layout), word], model_of(layout)
    job = job_for(words, 4, model["config"], ADAMW, 16, LENGTH)
    for seen in run_ranks(4, seen_of_rank, words, model, ADAMW, LENGTH, 16):
        assert list(differences(job, seen)) == []


def test_both_ends_of_a_pipeline_hold_a_tied_embedding_and_send_its_gradients() -> None:
    model = {"config": {**model_of(PIPELINE)["config"], "vocab_size": 98, "tie_word_embeddings": True}}
    words = words_of(PIPELINE)
    job = job_for(words, 4, model["config"], ADAMW, 16, LENGTH)
    for seen in run_ranks(4, seen_of_rank, words, model, ADAMW, LENGTH, 16):
        assert list(differences(job, seen)) == []


def test_stages_hand_on_whole_tensors_under_sequence_parallelism() -> None:
    layout = Layout(pp=2, tp=2, sequence=True, schedule="interleaved_1f1b")
    assert check_real(layout) == []


CASES: dict[str, tuple[list[str], Any]] = {
    "ddp": (["strategy=ddp"], ADAMW),
    "ddp, small buckets": (["strategy=ddp", "strategy.bucket_cap_mb=0.1"], ADAMW),
    "ddp, checkpointed": (["strategy=ddp", "activation_checkpointing=true"], SGD),
    "bf16": ([], ADAMW),
    "bf16, reduced in it": (["strategy.mp_policy.reduce_dtype=null"], ADAMW),
    "resharded": ([PLAIN, "strategy.reshard_after_forward=true"], SGD),
    "not resharded": ([PLAIN, "strategy.reshard_after_forward=false"], ADAMW),
    "every microbatch reduced": ([PLAIN, "strategy.defer_fsdp_grad_sync=false"], ADAMW),
    "plain sgd": ([PLAIN], {"name": "sgd", "lr": 0.1}),
    "sp that is followed": ([PLAIN, TP, SEQUENCE, TYPED], ADAMW),
    **{
        f"{title}, {mode}": ([PLAIN, *words, f"activation_checkpointing={mode}"], ADAMW)
        for title, words in {
            "tp": [TP],
            "sp": [TP, SEQUENCE],
            "cp": [CP],
            "ulysses": [CP, ULYSSES],
        }.items()
        for mode in MODES[1:]
    },
    "ulysses": ([PLAIN, CP, ULYSSES], ADAMW),
}


@pytest.mark.parametrize("name", CASES)
def test_options_change_what_is_planned_as_they_change_the_run(name: str) -> None:
    words, optimizer = CASES[name]
    config = {**LLAMA, "num_key_value_heads": 8}
    job = job_for(words, 2, config, optimizer, 8, 16)
    for seen in run_ranks(2, seen_of_rank, words, {"config": config}, optimizer, 16, 8):
        assert list(differences(job, seen)) == []


def test_heads_of_keys_that_are_sent_in_copies_are_planned_as_they_are_sent() -> None:
    words, config = [PLAIN, CP, ULYSSES], {**LLAMA, "num_key_value_heads": 1}
    job = job_for(words, 2, config, ADAMW, 8, 16)
    for seen in run_ranks(2, seen_of_rank, words, {"config": config}, ADAMW, 16, 8):
        assert list(differences(job, seen)) == []


WIDE: dict[str, list[str]] = {
    "plain": [PLAIN],
    "bf16": [],
    "resharded": [PLAIN, "strategy.reshard_after_forward=true"],
    "not resharded": [PLAIN, "strategy.reshard_after_forward=false"],
    "tp": [PLAIN, TP],
    "sp": [PLAIN, TP, SEQUENCE],
}


@pytest.mark.parametrize("name", WIDE)
def test_a_large_embedding_is_gathered_once_and_apart_from_the_head(name: str) -> None:
    config = {**LLAMA, "vocab_size": 4096, "num_key_value_heads": 8}
    job = job_for(WIDE[name], 2, config, ADAMW, 8, 16)
    assert [unit.title for unit in units_of(job, job.stages[0])] == ["block", "embedding", "head"]
    for seen in run_ranks(2, seen_of_rank, WIDE[name], {"config": config}, ADAMW, 16, 8):
        assert list(differences(job, seen)) == []


@pytest.mark.parametrize("config", [QWEN, {**QWEN, "tie_word_embeddings": True}], ids=["qwen3", "tied"])
def test_other_models(config: dict[str, Any]) -> None:
    words = [PLAIN, TP]
    job = job_for(words, 2, config, ADAMW, 4, 16)
    for seen in run_ranks(2, seen_of_rank, words, {"config": config}, ADAMW, 16, 4):
        assert list(differences(job, seen)) == []


@pytest.mark.parametrize("mode", MODES)
def test_experts_that_are_recomputed_exchange_their_tokens_again(mode: str) -> None:
    """Only where everything is: selective checkpointing keeps what was exchanged."""
    words = [PLAIN, "parallelism.ep_size=2", f"activation_checkpointing={mode}"]
    job = job_for(words, 2, MIXTRAL, ADAMW, 4, 16)
    for seen in run_ranks(2, seen_of_rank, words, {"config": MIXTRAL}, ADAMW, 16, 4):
        assert list(differences(job, seen)) == []


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "config, more",
    [(MIXTRAL, []), (QWEN_MOE, []), (MIXTRAL, [SEQUENCE])],
    ids=["mixtral", "qwen3_moe", "mixtral along the sequence"],
)
def test_experts_split_inside(config: dict[str, Any], more: list[str], mode: str) -> None:
    words = [PLAIN, TP, *more, f"activation_checkpointing={mode}"]
    job = job_for(words, 2, config, ADAMW, 4, 16)
    for seen in run_ranks(2, seen_of_rank, words, {"config": config}, ADAMW, 16, 4):
        assert list(differences(job, seen)) == []


def test_whole_experts_beside_tensor_parallelism() -> None:
    """All but the tokens that come to a rank, of which a plan knows the mean."""
    words = [PLAIN, TP, "parallelism.ep_size=2"]
    job = job_for(words, 2, MIXTRAL, ADAMW, 4, 16)
    for seen in run_ranks(2, seen_of_rank, words, {"config": MIXTRAL}, ADAMW, 16, 4):
        found = [entry for entry in differences(job, seen) if "only counted" in entry]
        assert all("all_gather" not in entry and "all_reduce" not in entry for entry in found), found
        assert not [entry for entry in differences(job, seen) if "CommDebugMode" in entry]


def megatron_elements(words: list[str], config: dict[str, Any]) -> tuple[int, int]:
    """On a rank: elements of parameters and of optimizer states that it holds."""
    with cuda_shim():
        _, model, optimizer = instantiate(composed(*words, model={"config": config}, optimizer=ADAMW))
        logits = model(torch.randint(90, (2, 8))).logits
        logits.float().square().mean().backward()
        optimizer.step()
        states = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.dim()]
        local = [getattr(v, "_local_tensor", v) for v in states]
        held = [getattr(p, "_local_tensor", p) for p in model.parameters()]
        return sum(p.numel() for p in held), sum(s.numel() for s in local)


def test_megatron_fsdp_splits_over_ranks_what_its_stage_says() -> None:
    """The library cuts flat buffers, so a rank has not just its part; all together have what is planned."""
    for zero in (1, 3):
        words = ["strategy=megatron_fsdp", f"strategy.zero_dp_strategy={zero}"]
        with cuda_shim():
            job = job_for(words, 2, MODEL, ADAMW, 4, 16)
        tensors = sum(unit.count * len(unit.weights) for unit in units_of(job, job.stages[0]))
        planned = [memory_of(job, 0, Place(shard=rank)) for rank in (0, 1)]
        found = run_ranks(2, megatron_elements, words, MODEL)
        # Two states of four bytes for each element, beside a step count for each tensor.
        assert sum(states for _, states in found) == sum(memory.optimizer - 4 * tensors for memory in planned) / 4
        if zero == 3:  # else parameters() shows what the optimizer has of them
            assert sum(held for held, _ in found) == sum(memory.parameters for memory in planned) / 4


def megatron_calls(words: list[str], microbatches: int) -> list[tuple[str, int]]:
    """On a rank: (function, bytes of its largest tensor) of every collective of a step that the library calls."""
    calls: list[tuple[str, int]] = []

    def counted(name: str) -> Any:
        function = getattr(dist, name)

        def call(*args: Any, **options: Any) -> Any:
            tensors = [value for value in (*args, *options.values()) if torch.is_tensor(value)]
            calls.append((name, max(tensor.numel() * tensor.element_size() for tensor in tensors)))
            return function(*args, **options)

        return patch.object(dist, name, call)

    with cuda_shim(), contextlib.ExitStack() as stack:
        _, model, optimizer = instantiate(composed(*words, model={"config": LLAMA}, optimizer=ADAMW))
        for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce"):
            stack.enter_context(counted(name))
        for _ in range(2):
            calls.clear()
            for index in range(microbatches):
                ids = torch.randint(90, (2, 16))
                with accumulate(model, last=index == microbatches - 1):
                    loss_sum(model, ids, ids).backward()
            clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return [call for call in calls if call[1] > 8]  # the norm is a scalar


@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_megatron_fsdp_calls_what_is_planned(zero: int, microbatches: int) -> None:
    """As often; its buffers are padded, here by less than a hundredth."""
    words = ["strategy=megatron_fsdp", f"strategy.zero_dp_strategy={zero}"]
    with cuda_shim():
        job = job_for(words, 2, LLAMA, ADAMW, 4, 16)
    planned: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for entry in traffic_of(dataclasses.replace(job, microbatches=microbatches), 0):
        planned[entry.kind] += entry.calls
        sizes[entry.kind] += entry.bytes
    kinds = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}
    for calls in run_ranks(2, megatron_calls, words, microbatches):
        assert Counter(kinds.get(name, name) for name, _ in calls) == planned
        for kind, size in sizes.items():
            found = sum(called for name, called in calls if kinds.get(name, name) == kind)
            assert size <= found <= 1.01 * size


# ---------------------------------------------------------------------------------------------------- activations


def tracked(
    words: list[str], config: dict[str, Any], ranks: int, rows: int, length: int, steps: int = 1
) -> dict[str, dict[str, int]]:
    """On one rank of many: what torch's MemTracker has after the loss and at the peak of backward, bytes by kind.

    steps: 2 where the optimizer's states count, which the first update makes.
    """
    alone = contextlib.nullcontext() if ranks == 1 else fake_rank(0, ranks)
    with alone:
        setup, model, optimizer = instantiate(composed(*words, model={"config": config}, optimizer=ADAMW))
        ids, labels = setup.mesh_context.split_sequence(*[torch.randint(90, (rows, length))] * 2)
        found: dict[str, dict[str, int]] = {}
        for _ in range(steps):
            tracker = MemTracker()
            tracker.track_external(model, optimizer)
            with tracker:
                logits = model(ids).logits
                loss = token_loss_sum(logits, labels)
                found["loss"] = _by_kind(tracker.get_tracker_snapshot("current"))
                loss.backward()
                found["peak"] = _by_kind(tracker.get_tracker_snapshot("peak"))
                optimizer.step()
                optimizer.zero_grad()
            del logits, loss
        return found


def _by_kind(snapshot: Any) -> dict[str, int]:
    found = next(sizes for device, sizes in snapshot.items() if device.type == "cpu")
    return {getattr(kind, "name", str(kind)).rpartition(".")[2]: size for kind, size in found.items()}


ACTIVATIONS: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    **{
        f"{name}, {dtype}, {mode}": (config, 1, [word, f"activation_checkpointing={mode}"])
        for name, config in {"llama": MODEL, "mixtral": MIXTRAL, "qwen3": QWEN, "qwen3_moe": QWEN_MOE}.items()
        for dtype, word in {"fp32": PLAIN, "bf16": NARROW}.items()
        for mode in MODES
        if dtype == "bf16" or name in ("llama", "mixtral")  # what a dtype changes is the same in the others
    },
    **{
        f"{name}, {mode}": (MODEL, 2, [PLAIN, *words, f"activation_checkpointing={mode}"])
        for name, words in {"tp": [TP], "sp": [TP, SEQUENCE], "cp": [CP], "ulysses": [CP, ULYSSES]}.items()
        for mode in MODES
    },
    **{
        f"attention drops out, {name}, {mode}": (
            {**MODEL, "attention_dropout": 0.1},
            1,
            [word, f"activation_checkpointing={mode}"],
        )
        for name, word, mode in (("fp32", PLAIN, "false"), ("bf16", NARROW, "false"), ("bf16", NARROW, "selective"))
    },
    **{
        f"ddp autocast, {mode}": (
            MODEL,
            1,
            ["strategy=ddp", "strategy.autocast_dtype=bfloat16", f"activation_checkpointing={mode}"],
        )
        for mode in MODES
    },
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_what_torch_tracks(name: str) -> None:
    """Within a tenth, and mostly within a hundredth."""
    config, ranks, words = ACTIVATIONS[name]
    if ranks > 1:
        close_pools()
    found = run_ranks(1, tracked, words, config, ranks, 2, 64)[0]
    job = job_for(words, ranks, config, ADAMW, 2, 64)
    assert stage_bytes(job, job.stages[0]).saved == pytest.approx(found["loss"]["ACT"], rel=0.1)


@pytest.mark.parametrize(
    "config, mode",
    [*((DEEPER, mode) for mode in MODES), ({**DEEPER, "vocab_size": 4096}, "false")],
    ids=[*MODES, "wide"],
)
def test_the_peak_of_sharded_ranks_is_what_torch_tracks(config: dict[str, Any], mode: str) -> None:
    """Until the update, which the tracker's peak leaves out here."""
    words = [NARROW, f"activation_checkpointing={mode}"]
    close_pools()
    found = run_ranks(1, tracked, words, config, 4, 4, 128, 2)[0]
    memory = memory_of(job_for(words, 4, config, ADAMW, 16, 128), 0, Place())
    assert memory.moment in ("loss", "backward")
    assert memory.peak == pytest.approx(found["peak"]["Total"], rel=0.1)


def test_the_measure_tells_layouts_apart() -> None:
    """A plan of another layout than the one that ran is found out."""
    words, config = [PLAIN], {**LLAMA, "num_key_value_heads": 8}
    seen = run_ranks(2, seen_of_rank, words, {"config": config}, ADAMW, 16, 8)
    assert dist.is_initialized() is False
    for other in ([PLAIN, TP], ["strategy=ddp"], [PLAIN, "strategy.reshard_after_forward=true"], []):
        assert list(differences(job_for(other, 2, config, ADAMW, 8, 16), seen[0]))
