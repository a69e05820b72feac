"""Positions that a module counts by itself with torch.arange, which on a rank are not those in the whole row.

Nothing is replaced but calls at places in the code of which a trial has shown that they count a row's tokens.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any, Callable, Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["CountsPositions", "Site", "counted_by", "counting_from"]

#: Where torch.arange is called: the file and the line.
Site = tuple[str, int]


class _Counts(TorchFunctionMode):
    """Hands each torch.arange over so many numbers to ``replace``, with where it was called."""

    def __init__(self, lengths: set[int], replace: Callable[[Tensor, Site], Tensor]) -> None:
        super().__init__()
        self.lengths, self.replace = lengths, replace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.arange and result.numel() in self.lengths and not result.is_meta:
            return self.replace(result, _site())
        return result


def _site() -> Site:
    frame: Any = sys._getframe(2)
    while frame.f_code.co_filename == __file__:  # of one mode inside of another
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def counted_by(model: nn.Module, length: int, run: Callable[[], Any]) -> dict[type, set[Site]]:
    """The classes of modules in whose own code ``run`` counts to ``length``, and where they do."""
    found: dict[type, set[Site]] = {}
    stack: list[type] = []
    handles = []

    def note(counted: Tensor, site: Site) -> Tensor:
        if stack:
            found.setdefault(stack[-1], set()).add(site)
        return counted

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(type(module))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack.pop()

    try:
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
        with _Counts({length}, note):
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


@contextlib.contextmanager
def counting_from(length: int, offset: int, sites: set[Site] | None = None) -> Iterator[None]:
    """torch.arange over ``length`` numbers starts ``offset`` later, at these places, or wherever it is called."""
    with _Counts({length}, lambda counted, site: counted + offset if sites is None or site in sites else counted):
        yield


class CountsPositions:
    """The forward of a module that counts a row's tokens: it is given their positions in the whole row."""

    def __init__(
        self, forward: Callable[..., Any], sites: set[Site], lengths: set[int], positions: Callable[[int], Tensor]
    ) -> None:
        """lengths: L, the numbers of tokens that a rank holds of rows. positions: of L tokens, [L]."""
        self.forward, self.sites, self.lengths, self.positions = forward, sites, lengths, positions

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Counts(self.lengths, self._placed):
            return self.forward(*args, **kwargs)

    def _placed(self, counted: Tensor, site: Site) -> Tensor:
        if site not in self.sites:
            return counted
        # Whatever it started from, and in whatever type.
        return counted[:1] + self.positions(counted.numel()).to(counted)
