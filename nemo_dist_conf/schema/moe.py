"""The group ``moe``: how a mixture-of-experts model is wrapped, in effect where ep_size is above 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from nemo_dist_conf.names import DType
from nemo_dist_conf.schema.option import option
from nemo_dist_conf.schema.policies import MixedPrecisionConf

__all__ = ["MoEConf"]


def _no_policy() -> MixedPrecisionConf:
    return MixedPrecisionConf(enabled=False)


@dataclass
class MoEConf:
    """Expert parallelism and its sharding; names and defaults of the API page."""

    ignore_router_for_ac: bool = option(
        True, "save the router's choice instead of recomputing it under activation checkpointing"
    )
    reshard_after_forward: bool = option(False, "free gathered MoE parameters after forward, gather again in backward")
    lm_head_precision: Optional[DType] = option(None, "dtype in which the output head computes; null: as the rest")
    wrap_outer_model: bool = option(
        True, "shard embedding, final norm and head as one unit; false: the head is a unit of its own"
    )
    mp_policy: Optional[MixedPrecisionConf] = option(
        _no_policy, "precision of the MoE blocks; off: as strategy.mp_policy"
    )
