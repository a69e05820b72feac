"""Modules that run again in backward, in a forward on the meta device: they save what they are given, and no more."""

from __future__ import annotations

import contextlib
from typing import Any, Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from nemo_dist_conf.runtime.model.replaced_forwards import Around
from nemo_dist_conf.runtime.torch_inside import QuickDispatchMode, tree_leaves

__all__ = ["without_saving"]


@contextlib.contextmanager
def without_saving(modules: Iterable[nn.Module], kept: frozenset[Any]) -> Iterator[None]:
    """Inside, autograd saves of these modules what they are given, and results of ``kept`` operators in them.

    As activation checkpointing has it, whose own code asks the device for random numbers.
    """
    before = []
    for module in modules:
        before.append((module, vars(module).get("forward")))
        module.forward = _WithoutSaving(module.forward, kept)
    try:
        yield
    finally:
        for module, forward in before:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


class _WithoutSaving(Around):
    def __init__(self, forward: Any, kept: frozenset[Any]) -> None:
        super().__init__(forward)
        self.kept = kept

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        _save(given)
        results = _Results(self.kept)
        with saved_tensors_hooks(lambda tensor: None, lambda packed: packed), results:
            output = self.__wrapped__(*args, **kwargs)
        _save(results.found)
        return output


def _save(tensors: list[Tensor]) -> None:
    """Let autograd save these, for whatever counts it."""
    if tensors:
        _Saved.apply(torch.empty(0, device=tensors[0].device, requires_grad=True), *tensors)


class _Saved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _: Tensor, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors)
        return _.view(0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise AssertionError("nothing runs backward on the meta device")


class _Results(QuickDispatchMode):
    """What operators return, in ``found``."""

    def __init__(self, kept: frozenset[Any]) -> None:
        super().__init__()
        self.kept, self.found = kept, []  # type: ignore[var-annotated]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in self.kept:
            self.found += [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        return out
