"""Selective activation checkpointing whose kept results stay what they were, although forward writes into them."""

from __future__ import annotations

import functools
from typing import Any, Callable, Iterator

from torch import Tensor
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from nemo_dist_conf.runtime.torch_inside.tensors import schema_of, storage_id

__all__ = ["selective_contexts"]


def selective_contexts(policy: Callable[..., Any]) -> tuple[Any, Any]:
    """``create_selective_checkpoint_contexts``, but a result that forward changes in place is kept as it was before.

    policy: as there. torch keeps a result by a tensor on the same memory. It refuses one that was written into, but for
    results that are handed on by another tensor (matmul hands on a view of what bmm gave): what is recomputed from such
    a one is silently wrong.
    torch 2.11 to 2.13: what is kept cannot be reached otherwise, and a policy is asked too late.
    Test: tests/runtime/techniques/test_activation_checkpointing.py.
    """
    first, second = create_selective_checkpoint_contexts(policy)
    return _copies_on_write()(first.policy_fn, first.storage), second


@functools.cache
def _copies_on_write() -> Any:
    from torch.utils.checkpoint import _CachingTorchDispatchMode, _VersionWrapper

    class CopiesOnWrite(_CachingTorchDispatchMode):
        """The first run of a block: results are kept, and copied before somebody writes into them."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            written = {memory for value in _written(func, args, kwargs or {}) for memory in _memory(value)}
            if written:
                for kept in tree_leaves(_plain(self.storage)):
                    value = getattr(kept, "val", None)
                    if isinstance(kept, _VersionWrapper) and isinstance(value, Tensor):
                        if not written.isdisjoint(_memory(value)):
                            kept.val = value.clone()
                            kept.version = kept.val._version
            return super().__torch_dispatch__(func, types, args, kwargs)

    return CopiesOnWrite


def _plain(storage: Any) -> Any:
    """Dictionaries of any kind and lists as a tree."""
    return list(map(_plain, storage.values())) if isinstance(storage, dict) else storage


@functools.cache
def _writing(func: Any) -> tuple[tuple[int, str], ...]:
    """Places and names of the arguments that an operator writes into."""
    arguments = enumerate(schema_of(func).arguments)
    return tuple((place, each.name) for place, each in arguments if each.alias_info and each.alias_info.is_write)


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    for place, name in _writing(func):
        given = args[place] if place < len(args) else kwargs.get(name)
        yield from (leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor))


def _memory(tensor: Tensor) -> list[int]:
    """Where a tensor lies; of one that is made of others, where they do."""
    if hasattr(tensor, "__tensor_flatten__"):
        parts = (getattr(tensor, name) for name in tensor.__tensor_flatten__()[0])
        return [memory for part in parts if isinstance(part, Tensor) for memory in _memory(part)]  # a mesh is none
    return [storage_id(tensor)]
