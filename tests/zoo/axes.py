"""The axes of the zoo's table: what a user types for each of them, and on how many ranks."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass
from typing import Any, Callable, Iterator
from unittest import mock

import torch

from nemo_dist_conf.runtime.techniques import compile as block_compile
from tests.dist.cuda_shim import cuda_shim
from tests.dist.layouts import ROWS

__all__ = ["AXES", "OF_KINDS", "OF_TOWERS", "Axis"]


@dataclass(frozen=True)
class Axis:
    """A column of the table.

    words: overrides of a user who wants this. around: what has to hold on a rank while it runs. freezes: one of the
    model's towers is not trained.
    """

    name: str
    ranks: int
    words: tuple[str, ...]
    around: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    freezes: bool = False


@contextlib.contextmanager
def compiled_without_cpp() -> Iterator[None]:
    """Blocks are traced and their graphs run as they are, which needs no C++ compiler."""
    with mock.patch.object(block_compile, "BACKEND", "eager"):
        torch._dynamo.reset()
        try:
            yield
        finally:
            torch._dynamo.reset()


_DDP, _FSDP2 = "strategy=ddp", "strategy=fsdp2"
_FP32 = (_FSDP2, "strategy.mp_policy=null")


def _of(*axes: str) -> tuple[str, ...]:
    return tuple(f"parallelism.{axis}_size=2" for axis in axes)


def _stages(data_ranks: int = 1) -> tuple[str, ...]:
    """Four microbatches on two stages."""
    rows = ROWS // data_ranks
    return ("pipeline=1f1b", f"pipeline.pp_batch_size={rows}", f"pipeline.pp_microbatch_size={rows // 4}", *_of("pp"))


AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        Axis("dp", 2, (_DDP,)),
        Axis("fsdp2", 2, _FP32),
        Axis("hsdp", 4, (*_FP32, *_of("dp_replicate"))),
        Axis("tp", 2, (*_FP32, *_of("tp"))),
        Axis("tp+sp", 2, (*_FP32, *_of("tp"), "strategy.sequence_parallel=true")),
        Axis("cp", 2, (*_FP32, *_of("cp"))),
        Axis("cp ulysses", 2, (*_FP32, *_of("cp"), "context.method=ulysses")),
        Axis("pp", 2, (*_FP32, *_stages())),
        Axis("ep", 2, (*_FP32, *_of("ep"))),
        Axis("ac full", 2, (*_FP32, "activation_checkpointing=true")),
        Axis("ac selective", 2, (*_FP32, "activation_checkpointing=selective")),
        Axis("compile", 2, (*_FP32, "strategy.enable_compile=true"), compiled_without_cpp),
        Axis("megatron", 2, ("strategy=megatron_fsdp",), cuda_shim),
        Axis("fsdp2 x tp", 4, (*_FP32, *_of("tp"))),
        Axis("fsdp2 x pp", 4, (*_FP32, *_stages(2))),
        Axis("fsdp2 x ep", 4, (*_FP32, *_of("ep"))),
        Axis("tp x ep", 4, (*_FP32, *_of("tp", "ep"))),
        Axis("tp x pp", 4, (*_FP32, *_of("tp"), *_stages())),
        Axis("cp x ep", 4, (*_FP32, *_of("cp", "ep"))),
    )
}
#: Of models that are none of causal language, which bring a batch of their own.
OF_KINDS = ("dp", "fsdp2", "hsdp", "tp", "ac full", "ac selective", "compile", "megatron")
#: Of kinds with several towers, beside those: one tower recomputed, and one frozen.
OF_TOWERS: dict[str, Axis] = {
    **{
        f"ac {scope}": Axis(f"ac {scope}", 2, (*_FP32, "activation_checkpointing=true", f"recompute.scope={scope}"))
        for scope in ("language", "vision", "encoder")
    },
    **{
        f"frozen {name}": dataclasses.replace(AXES[name], name=f"frozen {name}", freezes=True)
        for name in ("dp", "fsdp2", "tp", "megatron")
    },
}
