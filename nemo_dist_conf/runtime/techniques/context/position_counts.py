"""Positions that a module counts by itself, with torch.arange or a running sum over a row's tokens.

On a rank they would not be those in the whole row. Nothing is replaced but calls at places in the code of which a trial
has shown that they count a row's tokens: torch.arange gives their positions in the whole row, and torch.cumsum, as of
the tokens that are no padding, is taken over the whole row.
"""

from __future__ import annotations

import contextlib
import sys
from typing import Any, Callable, Collection, Iterator

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nemo_dist_conf.runtime.techniques.context.exchange import Exchange

__all__ = ["CountsPositions", "Site", "counted_by", "counting_from"]

#: Where tokens are counted: the file, the line, and "arange" or "cumsum".
Site = tuple[str, int, str]


class _Counts(TorchFunctionMode):
    """Hands over to ``replace`` what torch.arange or torch.cumsum return for so many tokens.

    replace: (what was returned, where it was called, of torch.cumsum: what it was given and along which dim).
    """

    def __init__(self, lengths: set[int], replace: Callable[[Tensor, Site, tuple[Tensor, int] | None], Tensor]) -> None:
        super().__init__()
        self.lengths, self.replace = lengths, replace

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is torch.arange and result.numel() in self.lengths and not result.is_meta:
            return self.replace(result, _site("arange"), None)
        if func is torch.cumsum or func is Tensor.cumsum:
            dim = kwargs["dim"] if "dim" in kwargs else args[1]
            if isinstance(dim, int) and result.dim() and result.size(dim) in self.lengths and not result.is_meta:
                return self.replace(result, _site("cumsum"), (args[0] if args else kwargs["input"], dim))
        return result


def _site(name: str) -> Site:
    frame: Any = sys._getframe(2)
    while frame.f_code.co_filename == __file__:  # of one mode inside of another
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno, name


def counted_by(
    model: nn.Module, length: int, run: Callable[[], Any], but: Collection[type] = ()
) -> dict[type, set[Site]]:
    """The classes of modules in whose own code ``run`` counts to ``length``, and where they do.

    but: classes of modules that may count, with what is in them.
    """
    found: dict[type, set[Site]] = {}
    stack: list[type] = []
    handles = []

    def note(counted: Tensor, site: Site, summed: Any) -> Tensor:
        if stack and not any(kind in but for kind in stack):
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
def counting_from(length: int, offset: int, sites: set[Site] | None = None, only_late: bool = False) -> Iterator[None]:
    """torch.arange over ``length`` numbers starts ``offset`` later, at these places, or wherever it is called.

    only_late: its second half does, as if the row's second half were somewhere else.
    """

    def moved(counted: Tensor, site: Site, summed: Any) -> Tensor:
        if site[2] != "arange" or (sites is not None and site not in sites):
            return counted
        if not only_late:
            return counted + offset
        return torch.cat([counted[: length // 2], counted[length // 2 :] + offset])

    with _Counts({length}, moved):
        yield


class CountsPositions:
    """The forward of a module that counts a row's tokens: it is given their positions in the whole row."""

    def __init__(
        self, forward: Callable[..., Any], sites: set[Site], exchange: Exchange, positions: Callable[[int], Tensor]
    ) -> None:
        """positions: of L tokens of this rank, [L]."""
        self.forward, self.sites, self.exchange, self.positions = forward, sites, exchange, positions

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.exchange.on_whole_rows:
            return self.forward(*args, **kwargs)
        with _Counts(self.exchange.lengths, self._placed):
            return self.forward(*args, **kwargs)

    def _placed(self, counted: Tensor, site: Site, summed: tuple[Tensor, int] | None) -> Tensor:
        if site not in self.sites or self.exchange.on_whole_rows:
            return counted
        if summed is not None:
            part, dim = summed[0], summed[1] % summed[0].dim()
            return self.exchange.own(self.exchange.whole(part, dim).cumsum(dim), dim).to(counted)
        # Whatever it started from, and in whatever type.
        return counted[:1] + self.positions(counted.numel()).to(counted)
