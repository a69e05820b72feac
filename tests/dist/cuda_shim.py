"""What megatron-fsdp asks of ``torch.cuda``, answered for CPU ranks: the library itself runs unmodified on gloo.

    with cuda_shim():
        ...

Streams do nothing, because a CPU rank computes in order, and a collective that need not be waited for has ended when it
was called: the library may free a buffer that is still being filled, which a stream would keep for so long and gloo's
threads would write to. The current device is 0; moving to it leaves a tensor where it is. Fusing the division into the
reduction is switched off, which gloo cannot do. Our own refusals of a machine without CUDA are silent inside.
"""

from __future__ import annotations

import contextlib
import importlib
from typing import Any, Iterator
from unittest import mock

import torch
from torch.distributed import distributed_c10d

__all__ = ["cuda_shim"]

ENGINE = "nemo_dist_conf.runtime.engines.megatron_fsdp"


class _Stream:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record_event(self, event: Any = None) -> "_Event":
        return _Event()

    def synchronize(self) -> None: ...


class _Event:
    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...


@contextlib.contextmanager
def _waited_for(group: Any, device: Any = None, async_ops: bool = False) -> Iterator[Any]:
    """torch's own manager of several collectives, which waits for them."""
    with distributed_c10d._coalescing_manager(group, device):
        yield _Event()


@contextlib.contextmanager
def cuda_shim() -> Iterator[None]:
    library = importlib.import_module("megatron_fsdp.fully_shard")  # the attribute is hidden by the function
    config = library.DistributedDataParallelConfig

    def unfused(**options: Any) -> Any:
        return config(**options, gradient_reduce_div_fusion=False)

    with contextlib.ExitStack() as stack:
        for name, value in {
            "Stream": _Stream,
            "Event": _Event,
            "current_stream": lambda *_: _Stream(),
            "stream": lambda _: contextlib.nullcontext(),
            "current_device": lambda: 0,
            "synchronize": lambda *_: None,
            "empty_cache": lambda: None,
        }.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, value))
        stack.enter_context(mock.patch.object(torch.Tensor, "cuda", lambda tensor, *_, **__: tensor))
        stack.enter_context(mock.patch("megatron_fsdp.param_and_grad_buffer._coalescing_manager", _waited_for))
        stack.enter_context(mock.patch.object(library, "DistributedDataParallelConfig", unfused))
        stack.enter_context(mock.patch("nemo_dist_conf.strategies.megatron_fsdp.cuda_present", lambda: True))
        stack.enter_context(mock.patch(f"{ENGINE}.require_cuda", lambda mesh: None))
        yield
