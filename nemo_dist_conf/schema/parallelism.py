"""The group ``parallelism``: how many ranks each axis gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from nemo_dist_conf.schema.option import option

__all__ = ["ParallelismConf"]


@dataclass
class ParallelismConf:
    """Sizes of the axes; the product pp x dp x cp x tp is the number of ranks."""

    dp_size: Optional[int] = option(None, "data-parallel ranks; null: world size / (pp x cp x tp)")
    dp_replicate_size: Optional[int] = option(
        None, "HSDP: replicas that the data-parallel ranks form (fsdp2 only); null or 1: parameters sharded over all"
    )
    tp_size: int = option(1, "tensor-parallel ranks: each matrix is split over them")
    pp_size: int = option(1, "pipeline stages: the layers are split over them")
    cp_size: int = option(1, "context-parallel ranks: the sequence is split over them")
    ep_size: int = option(1, "expert-parallel ranks: the experts of a MoE layer are split over them")
