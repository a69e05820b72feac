"""When gradients of earlier microbatches are there, and in what size."""

from __future__ import annotations

import dataclasses

import pytest

from nemo_dist_conf.plan import Job
from nemo_dist_conf.plan.memory import Memory, memory_of
from nemo_dist_conf.plan.rank_shards import Place
from tests.dist.layouts import ADAMW, LLAMA
from tests.plan.measure import job_for

#: A vocabulary that makes the loss the moment at which most is there.
CONFIG = {**LLAMA, "vocab_size": 32_000}


def memory(words: list[str], microbatches: int) -> tuple[Job, Memory]:
    job = dataclasses.replace(job_for(words, 4, CONFIG, ADAMW, 16, 16), microbatches=microbatches)
    found = memory_of(job, 0, Place())
    assert found.moment == "loss"
    return job, found


@pytest.mark.parametrize(
    "words, whole",
    [
        (["strategy=ddp"], False),
        (["strategy.mp_policy=null"], True),
        (["strategy.mp_policy=null", "strategy.defer_fsdp_grad_sync=false"], False),
    ],
    ids=["ddp", "fsdp2", "fsdp2, each reduced"],
)
def test_accumulated_gradients_are_there_at_the_next_loss(words: list[str], whole: bool) -> None:
    """Whole on every rank where fully_shard reduces them at the end only, else as they rest."""
    job, once = memory(words, 1)
    _, twice = memory(words, 2)
    expected = 4 * job.model.parameters if whole else once.gradients
    assert twice.peak - once.peak == pytest.approx(expected, rel=0.01)


def test_ddp_has_buckets_from_the_second_rank_on() -> None:
    """And none where gradients live in them."""
    peaks = {}
    for name, ranks, words in (("one", 1, []), ("two", 2, []), ("views", 2, ["strategy.gradient_as_bucket_view=true"])):
        job = job_for(["strategy=ddp", *words], ranks, CONFIG, ADAMW, 4 * ranks, 16)
        peaks[name] = memory_of(job, 0, Place()).peak
    assert peaks["two"] - peaks["one"] == 4 * job.model.parameters
    assert peaks["views"] == peaks["one"]
