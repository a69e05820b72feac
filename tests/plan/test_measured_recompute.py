"""Plans of jobs that recompute a part of the model, against what torch counts on the wrapped one."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from nemo_dist_conf.plan.activations import stage_bytes
from nemo_dist_conf.runtime.on_paper import read_model
from tests.dist.layouts import ADAMW, LLAMA
from tests.dist.pool import close_pools, run_ranks
from tests.plan import measure
from tests.plan.measure import differences, job_for, seen_of_rank
from tests.plan.test_measured import MIXTRAL, MODEL, NARROW, PLAIN, QWEN_MOE, SEQUENCE, TP, tracked

pytestmark = pytest.mark.dist

FULL = "activation_checkpointing=true"
EVERY, MLP = "recompute.every=2", "recompute.modules=[mlp]"
ATTENTION = "recompute.modules=[self_attn,layers.0]"
#: What is asked of modules inside of blocks.
MODULES = (MLP, ATTENTION)
FOUR = {**MODEL, "num_hidden_layers": 4}
SMALL = {**LLAMA, "num_key_value_heads": 8, "num_hidden_layers": 3}

#: (config, ranks, words)
ACTIVATIONS: dict[str, tuple[dict[str, Any], int, list[str]]] = {
    "every second block": (FOUR, 1, [PLAIN, FULL, EVERY]),
    "mlp": (FOUR, 1, [NARROW, FULL, MLP]),
    "attention, and one block": (FOUR, 1, [NARROW, FULL, ATTENTION]),
    "experts": (QWEN_MOE, 1, [PLAIN, FULL, MLP]),
    "mlp, tp": (FOUR, 2, [PLAIN, TP, FULL, MLP]),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_are_what_torch_tracks(name: str) -> None:
    """Within a fiftieth: a plan of all blocks recomputed, or of none, is further off."""
    config, ranks, words = ACTIVATIONS[name]
    if ranks > 1:
        close_pools()
    kept = run_ranks(1, tracked, words, config, ranks, 2, 64)[0]["loss"]["ACT"]
    assert planned(words, ranks, config) == pytest.approx(kept, rel=0.02)
    without = [word for word in words if not word.startswith("recompute")]
    nothing = [word for word in without if not word.startswith("activation")]
    assert planned(without, ranks, config) < 0.9 * kept and planned(nothing, ranks, config) > 1.05 * kept


def planned(words: list[str], ranks: int, config: dict[str, Any]) -> int:
    """Read off the built model where modules inside of blocks are asked for, as a recipe's plan does."""
    inside = any(word in MODULES for word in words)
    read: Any = (lambda config: read_model({"config": config})) if inside else measure.shape_for
    with patch.object(measure, "shape_for", read):
        job = job_for(words, ranks, config, ADAMW, 2, 64)
    return stage_bytes(job, job.stages[0]).saved


CALLS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "sp": (SMALL, [TP, SEQUENCE, FULL]),
    "cp": (SMALL, ["parallelism.cp_size=2", FULL]),
    "ep": ({**MIXTRAL, "num_hidden_layers": 3}, ["parallelism.ep_size=2", FULL]),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_blocks_that_run_again_call_again(name: str) -> None:
    config, words = CALLS[name]
    words = [PLAIN, *words, EVERY]
    job = job_for(words, 2, config, ADAMW, 8, 16)
    for seen in run_ranks(2, seen_of_rank, words, {"config": config}, ADAMW, 16, 8):
        assert list(differences(job, seen)) == []
