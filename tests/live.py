"""Memory of tensors while something runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Live"]


class Live(TorchDispatchMode):
    """The most bytes of storages that were alive at once, of those that an operator met inside."""

    def __init__(self) -> None:
        super().__init__()
        self.peak, self._known = 0, {}  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves((args, kwargs, found)):
            storage = leaf.untyped_storage() if isinstance(leaf, Tensor) and type(leaf) is not DTensor else leaf
            if isinstance(storage, torch.UntypedStorage) and storage.device.type == "cpu":
                self._known[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self._known = {key: value for key, value in self._known.items() if not value[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._known.values()))
        return found
