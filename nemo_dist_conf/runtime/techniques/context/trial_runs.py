"""What a trial of context parallelism runs and reads: attention that mixes nothing, tensors by token, gradients.

Shapes: B rows, S tokens of a row, H heads, K key/value heads, D head width.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from nemo_dist_conf.runtime.techniques.context.exchange import Exchange
from nemo_dist_conf.runtime.techniques.context.whole_rows import TokenDims, kept_tokens
from nemo_dist_conf.runtime.torch_inside import tree_leaves

__all__ = [
    "Unmixed",
    "by_token",
    "gathered",
    "gradients_differ",
    "gradients_of",
    "sees_itself",
    "tokens_of",
    "watched",
]

#: Sums of gradients over tokens and ranks, in another order.
_GRADIENTS_SAME = 1e-3


class Unmixed:
    """The forward of a module that is run on whole rows, where mixing by others is looked for.

    In the run with a changed token it returns, for all others, what it returned in the run before.
    """

    def __init__(self, forward: Callable[..., Any], dims: TokenDims) -> None:
        self.forward, self.dims = forward, dims
        self.outputs: list[Any] | None = None
        self.changed: tuple[int, int, int] | None = None

    def start(self, changed: tuple[int, int, int] | None) -> None:
        """changed: (rows, tokens, the one that changed) in the second run, None in the first."""
        self.changed = changed
        self.outputs = [] if changed is None or self.outputs is None else self.outputs

    def stop(self) -> None:
        self.outputs = self.changed = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.forward(*args, **kwargs)
        if self.outputs is None:
            return output
        if self.changed is None:
            self.outputs.append(output)
            return output
        return kept_tokens(output, self.outputs.pop(0), self.dims, *self.changed)


@contextlib.contextmanager
def watched(model: nn.Module) -> Iterator[list[str]]:
    """Names of the modules whose forward has begun and not ended, the innermost last; also after an exception."""
    running: list[str] = []
    handles = []

    def enter(name: str, module: nn.Module, args: Any) -> None:
        running.append(name)

    def leave(name: str, module: nn.Module, args: Any, output: Any) -> None:
        while running.pop() != name:  # one that ended by an exception which somebody caught
            pass

    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(functools.partial(enter, name)))
            handles.append(module.register_forward_hook(functools.partial(leave, name)))
        yield running
    finally:
        for handle in handles:
            handle.remove()


def gradients_of(
    model: nn.Module, inputs: Mapping[str, Any], rows: int, length: int, exchange: Exchange | None = None
) -> list[Tensor]:
    """Gradients of a sum over all that the model returns for each token, weighed with numbers that no two share.

    exchange: the model is run on this rank's parts of rows, and length is that of a part.
    """
    torch.manual_seed(0)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad and not p.is_meta]  # those of blocks that are run
    total = torch.zeros(())
    with torch.enable_grad():
        output = model(**inputs)
        for leaf in tree_leaves(dict(output) if isinstance(output, Mapping) else output):
            if not isinstance(leaf, Tensor) or not leaf.requires_grad or leaf.shape[:2] != (rows, length):
                continue
            whole = length if exchange is None else length * exchange.size
            weights = torch.randn(rows, whole, *leaf.shape[2:], generator=torch.Generator().manual_seed(0))
            weights = weights.to(leaf.device, leaf.dtype)
            total = total + (leaf * (weights if exchange is None else exchange.own(weights, 1))).sum().cpu()
        found: list[Tensor] = []
        if parameters and total.requires_grad:
            found += torch.autograd.grad(total, parameters, allow_unused=True, materialize_grads=True)
    model.eval()
    return found


def gradients_differ(wanted: list[Tensor], found: list[Tensor]) -> bool:
    """Whether one of them does, by more than rounding errors of the largest leave of those that are nothing."""
    least = _GRADIENTS_SAME * max(
        (float(gradient.abs().amax()) for gradient in wanted if gradient.numel()), default=0.0
    )
    apart = [(one - other).abs() for one, other in zip(wanted, found, strict=True) if one.numel()]
    largest = [max(float(one.abs().amax()), least) for one in wanted if one.numel()]
    return any(not float(part.amax()) <= _GRADIENTS_SAME * most for part, most in zip(apart, largest))


def tokens_of(inputs: Mapping[str, Any]) -> tuple[str, Tensor] | None:
    """The argument that holds a row's tokens, [B, S] or [B, S, width]."""
    for name, value in inputs.items():
        if isinstance(value, Tensor) and name != "pixel_values" and value.dim() in (2, 3):
            return name, value
    return None


def sees_itself(
    attended: set[tuple[type, int, int]],
    module: nn.Module,
    query_BHSD: Tensor,
    key_BKSD: Tensor,
    value_BKSD: Tensor,
    attention_mask: Any = None,
    *,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """An attention in which a token sees itself alone; it shows every change of what is told of a token.

    attended: gets the module's class and its heads of queries and of keys.
    """
    attended.add((type(module), query_BHSD.size(1), key_BKSD.size(1)))
    if query_BHSD.size(2) != key_BKSD.size(2):
        raise NotImplementedError(f"attention from {query_BHSD.size(2)} to {key_BKSD.size(2)} tokens")
    groups = query_BHSD.size(1) // key_BKSD.size(1)
    key_BHSD, value_BHSD = (part.repeat_interleave(groups, 1) for part in (key_BKSD, value_BKSD))
    probe_D = torch.linspace(-1, 1, query_BHSD.size(-1), device=query_BHSD.device, dtype=query_BHSD.dtype)
    score = ((query_BHSD + 2 * key_BHSD) * probe_D).sum(-1, keepdim=True)
    for added in (attention_mask, position_bias):
        if isinstance(added, Tensor) and added.is_floating_point() and added.size(-1) == query_BHSD.size(2):
            own = added.expand(*added.shape[:-2], added.size(-1), -1).diagonal(dim1=-2, dim2=-1)
            score = score + own.unsqueeze(-1)
    return (value_BHSD * torch.sigmoid(score)).transpose(1, 2).contiguous(), None


def by_token(tensor: Tensor, rows: int, length: int) -> Tensor | None:
    """[S, ...] of something that has a value for every token; None of anything else."""
    if tensor.shape[:2] == (rows, length):
        return tensor.transpose(0, 1)
    if tensor.dim() > 1 and tensor.size(0) == rows * length:
        return tensor.unflatten(0, (rows, length)).transpose(0, 1)
    return None


def gathered(exchange: Exchange, tensor: Tensor, rows: int, length: int) -> Tensor:
    """The tensor for the whole row, where it has a value for every token of a rank."""
    if tensor.shape[:2] == (rows, length):
        return exchange.whole(tensor, 1)
    if tensor.dim() > 1 and tensor.size(0) == rows * length:
        return exchange.whole(tensor.unflatten(0, (rows, length)), 1).flatten(0, 1)
    if tensor.dim() == 4 and tensor.size(2) == length:  # [B, H, L, D]
        return exchange.whole(tensor, 2)
    return tensor
