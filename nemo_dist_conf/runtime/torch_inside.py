"""Everything of torch that it does not publish and that is used here: what, since when, why, and the test that breaks.

torch 2.11 to 2.13 have all of it.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

__all__ = ["generator_of", "is_plain", "replace_trunc_normal", "schema_of", "storage_id"]


def storage_id(tensor: Tensor) -> int:
    """A number that all views of one storage share, and no other storage as long as this one lives.

    Storages without memory (meta) all have the data pointer 0, which is the published answer.
    tests/runtime/test_recorder.py::test_views_and_aliases
    """
    if is_lazy(tensor):
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.untyped_storage()._cdata
    return tensor.untyped_storage()._cdata


def schema_of(operator: Any) -> Any:
    """What an operator takes, writes and returns: torch gives it to dispatch modes with the operator only.

    tests/runtime/test_recorder.py::test_the_tape_is_what_the_constructor_did
    """
    return operator._schema


def generator_of(device: torch.device) -> torch.Generator:
    """The device's default generator. torch.manual_seed would also queue a seed for each kind of device to come.

    tests/runtime/test_materialise.py::test_the_global_random_state_is_neither_read_nor_moved
    """
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[device.index or 0]


def is_plain(kind: type) -> bool:
    """Whether a class of tensors leaves operators to torch; a subclass that has its own way with them has no storage.

    tests/runtime/test_recorder.py::test_what_cannot_be_recorded
    """
    return kind.__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl  # type: ignore[attr-defined]


def replace_trunc_normal(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What nn.init.trunc_normal_ calls, now; it becomes the function.

    Since torch 2.12 it looks at what it drew and draws again, and on the meta device it draws nothing.
    tests/runtime/test_recorder.py::test_the_tape_is_what_the_constructor_did
    """
    init: Any = torch.nn.init
    before, init._no_grad_trunc_normal_ = init._no_grad_trunc_normal_, function
    return before
