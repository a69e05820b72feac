"""One rank of many in a process of its own, on torch's fake process group: collectives return at once, without values.

What ranks tell each other as objects, and how many tokens travel to which expert, is answered as if all ranks were
alike; so shapes and calls are those of a real run.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, Iterator
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

__all__ = ["fake_rank"]


@contextlib.contextmanager
def fake_rank(rank: int, ranks: int) -> Iterator[None]:
    """This process, a rank of ``tests.dist.pool`` alone in its group, as rank ``rank`` of ``ranks``."""

    def gather(found: list[Any], mine: Any, group: Any = None) -> None:
        found[:] = [mine] * len(found)

    def exchange(output: Tensor, source: Tensor, *sizes: Any, **options: Any) -> None:
        output.copy_(source)

    variables = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": "0"}
    dist.destroy_process_group()
    torch.manual_seed(0)
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        with (
            patch.dict(os.environ, variables),
            patch.object(dist, "all_gather_object", gather),
            patch.object(dist, "broadcast_object_list", lambda *args, **kwargs: None),
            patch.object(dist, "all_to_all_single", exchange),
        ):
            yield
    finally:
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
