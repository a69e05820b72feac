"""Sequence parallelism that is derived from a plan without it, against one process: a family for each mechanism."""

from __future__ import annotations

import pytest
import torch

from tests.dist.pool import run_ranks
from tests.dist.test_tensor_parallel import OWN_PLAN, TIED, Case, compare

pytestmark = pytest.mark.dist

HEADS = {"model.layers.*.self_attn.q_proj": "colwise", "model.layers.*.self_attn.k_proj": "colwise"}
HEADS |= {"model.layers.*.self_attn.v_proj": "colwise", "model.layers.*.self_attn.o_proj": "rowwise"}

CASES = {
    "sandwich norms, scaled embedding, caps; an odd length": (
        2,
        Case("gemma2", {"head_dim": 8, **TIED, "query_pre_attn_scalar": 8}, steps=2, seq_len=7),
    ),
    "post norms, norms of whole heads": (2, Case("olmo2", {"pad_token_id": 0}, steps=2)),
    "parallel block, scaled logits; x dp, recomputed": (
        4,
        Case("cohere", {"pad_token_id": 0, **TIED, "logit_scale": 0.5}, dp=2, checkpoint=True, steps=2, seq_len=7),
    ),
    "scaled residual": (
        2,
        Case("granite", {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 2.0}, steps=2),
    ),
    "experts on whole rows": (
        2,
        Case("mixtral", {"num_local_experts": 4, "sliding_window": None}, plan=HEADS, steps=2, seq_len=7),
    ),
    "a mixer that is not split": (2, Case("olmo_hybrid", {"pad_token_id": 0, "linear_num_key_heads": 2}, steps=2)),
    "own": (2, Case("own", plan=OWN_PLAN, steps=2, seq_len=7)),
    "shorter than the ranks": (4, Case("olmo2", {"pad_token_id": 0, "num_key_value_heads": 4}, steps=2, seq_len=3)),
}


@pytest.mark.parametrize("world_size, case", CASES.values(), ids=CASES.keys())
def test_training_equals_one_process(world_size: int, case: Case) -> None:
    case.sequence_parallel = True
    for report in run_ranks(world_size, compare, case):
        assert report["loss"] < 1e-6
        assert report["logits"] < 1e-5
        assert max(report["gradient"].values()) < 1e-4, report["gradient"]
        assert report["type"] is torch.Tensor and report["same"]
