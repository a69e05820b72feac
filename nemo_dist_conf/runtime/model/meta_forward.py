"""A forward of a model on the meta device: what each part of it keeps for backward, computes and moves.

No tensor has a value, so no memory is taken and nothing is computed. What Python asks of a value is answered as if
every condition held: rows are not padded, every token is meant.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import defaultdict
from dataclasses import replace
from typing import Any, Callable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

from nemo_dist_conf.families.built_shape import Given, Passage, Run, Work
from nemo_dist_conf.runtime.model.blocks import Blocks
from nemo_dist_conf.runtime.torch_inside import (
    ASKED_VALUE,
    ATTENTION_IN_STEPS,
    GROUPED_PRODUCT,
    QuickDispatchMode,
    schema_of,
    storage_id,
    tree_leaves,
    tree_map_only,
)

__all__ = ["run_on_meta"]

_aten = torch.ops.aten

#: Operator -> which of its arguments' last dimension is summed over for each element of the result.
_PRODUCTS: Mapping[Any, int] = {
    _aten.mm.default: 0,
    _aten.addmm.default: 1,
    _aten.bmm.default: 0,
    _aten.baddbmm.default: 1,
    GROUPED_PRODUCT: 0,
}
_INDEXING = (_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default)


def run_on_meta(
    model: nn.Module,
    blocks: Blocks,
    kept: frozenset[Any],
    rows: int,
    length: int,
    dtype: str,
    fuses_dropout: bool = False,
) -> Run:
    """What a microbatch of so many rows and tokens takes, part by part.

    model: on the meta device; it is in ``dtype`` (float32, bfloat16) for the time of the run. kept: operators whose
    results selective checkpointing keeps. fuses_dropout: as on a GPU, where dropout keeps one byte for each element and
    an attention that drops out nothing but where its random numbers began; on a CPU attention then keeps its scores.
    Raises whatever the model's forward raises there.
    """
    parameters = list(model.parameters())
    before = [(tensor, tensor.dtype) for tensor in (*parameters, *model.buffers()) if tensor.is_floating_point()]
    ids = torch.empty(rows, length, dtype=torch.long, device="meta")
    try:
        for tensor, _ in before:
            tensor.data = tensor.data.to(getattr(torch, dtype))
        counted = _Counted(model, blocks, kept)
        random = _Random(counted, fuses_dropout)
        with counted.watched(), torch.device("meta"), random, counted, torch.enable_grad():
            output = _call(model, ids)
    finally:
        for tensor, own in before:
            tensor.data = tensor.data.to(own)
    return counted.run(output)


def _call(model: nn.Module, ids: Tensor) -> Any:
    names = inspect.signature(model.forward).parameters
    output = model(input_ids=ids) if "input_ids" in names else model(ids)
    return getattr(output, "logits", output)


class _Counted(QuickDispatchMode):
    """Counts what every operator does for the part of the model that it runs in.

    Parts are numbered as the blocks are; -1: before the first, their number: after the last and in between.
    """

    def __init__(self, model: nn.Module, blocks: Blocks, kept: frozenset[Any]) -> None:
        super().__init__()
        self._blocks, self._kept, self._model = list(blocks.values()), kept, model
        self._first: set[str] = set()
        self._inside: list[int] = []
        self._seen = False
        self._sums: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._widths: dict[int, int] = {}
        self._own = {storage_id(tensor) for tensor in (*model.parameters(), *model.buffers())}
        #: By storage: (what is saved of it, parts that save it). The tensors keep ids of storages theirs.
        self._saved: dict[int, tuple[Tensor, list[int]]] = {}
        self._results: dict[int, tuple[Tensor, int]] = {}
        #: By module: its calls, and how often something had been saved by then.
        self._passages: dict[str, list[tuple[Passage, int]]] = defaultdict(list)
        #: How often something was saved, and how often by the time of each part's last.
        self._saves, self._last_save = 0, dict[int, int]()

    @property
    def _part(self) -> int:
        return self._inside[-1] if self._inside else len(self._blocks) if self._seen else -1

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Know which block runs, what modules are given and return, and what autograd saves."""
        with contextlib.ExitStack() as stack, saved_tensors_hooks(self._pack, lambda packed: packed):
            for name, module in self._model.named_modules():
                stack.callback(module.register_forward_hook(self._passing(name), with_kwargs=True).remove)
            for number, block in enumerate(self._blocks):
                enter, leave = self._entering(number), self._leaving
                stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(leave).remove)
            inside = {id(module) for block in self._blocks for module in block.modules()}
            for name, module in self._model.named_modules():
                if id(module) not in inside:
                    stack.callback(module.register_forward_pre_hook(self._noting(name)).remove)
            yield

    def _entering(self, number: int) -> Callable[..., None]:
        def enter(_: nn.Module, args: Any, kwargs: Any) -> None:
            if not self._inside:
                stream = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.requires_grad]
                self._sums[number]["entered"] += sum({storage_id(t): _bytes(t) for t in stream}.values())
                self._widths.setdefault(number, stream[0].shape[-1] if stream else 0)
            self._inside.append(number)
            self._seen = True

        return enter

    def _noting(self, name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            if not self._seen:
                self._first.add(name)

        return note

    def _leaving(self, *_: Any) -> None:
        self._inside.pop()

    def _passing(self, name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            given = tuple(
                Given(place, _bytes(leaf), leaf.shape[-1] if leaf.dim() else 1, leaf.requires_grad)
                for place, value in _by_name(module, args, kwargs).items()
                for leaf in tree_leaves(value)
                if isinstance(leaf, Tensor)
            )
            first = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
            returned = (_bytes(first), first.shape[-1] if first.dim() else 1) if first is not None else (0, 1)
            self._passages[name].append((Passage(self._part, given, *returned), self._saves))

        return note

    def _pack(self, tensor: Tensor) -> Tensor:
        key = storage_id(tensor)
        self._saves += 1
        self._last_save[self._part] = self._saves
        if key not in self._own:
            _, parts = self._saved.setdefault(key, (tensor, []))
            if self._part not in parts:
                parts.append(self._part)
        return tensor

    # ------------------------------------------------------------------------------------------------ operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = _all_on_meta(args, kwargs or {})
        if func is ASKED_VALUE:
            return {torch.bool: True}.get(args[0].dtype, 0.0 if args[0].is_floating_point() else 0)
        if func is _aten.nonzero.default:
            return args[0].new_empty((args[0].numel(), args[0].dim()), dtype=torch.long)
        if func in _INDEXING:
            args = (args[0], _without_masks(args[1]), *args[2:])
        if func is GROUPED_PRODUCT:  # on meta for bfloat16 alone
            out = args[0].new_empty((*args[0].shape[:-1], args[1].shape[-1]))
        else:
            out = func(*args, **kwargs)
        self._count(func, args, kwargs, out)
        return out

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        sums, known = self._sums[self._part], {storage_id(tensor) for tensor in given}
        if func in self._kept:
            self.keep(made)
        if func in _PRODUCTS:
            self.product("matmul", 2.0 * made[0].numel() * args[_PRODUCTS[func]].shape[-1])
            return
        if func is _aten.convolution.default:
            self.product("matmul", 2.0 * made[0].numel() * args[1].numel() / args[1].shape[0])
            return
        if not made or (all(storage_id(t) in known for t in made) and not schema_of(func).is_mutable):
            return  # a view, or nothing
        sums["moved"] += sum(map(_bytes, (*given, *made)))
        sums["kernels"] += 1

    def product(self, kind: str, flops: float) -> None:
        """A matrix product or an attention."""
        sums = self._sums[self._part]
        sums[kind] += flops
        sums["kernels"] += 1

    def keep(self, made: list[Tensor]) -> None:
        """Results that selective checkpointing keeps."""
        for tensor in made:
            self._results.setdefault(storage_id(tensor), (tensor, self._part))

    def exchange(self, keys_and_values: int, queries_and_outputs: int) -> None:
        """Of an attention, in bytes."""
        self._sums[self._part]["keys_and_values"] += keys_and_values
        self._sums[self._part]["queries_and_outputs"] += queries_and_outputs

    # ------------------------------------------------------------------------------------------------ sums

    def run(self, output: Any) -> Run:
        """What was counted; output: what the model returned."""
        for tensor, parts in self._saved.values():
            # What many blocks save, masks and rotary tables, is there once; a block hands its output to the next one.
            part = parts[0] if len(parts) <= 2 else -1
            self._add("saved", part, tensor)
        for tensor, part in self._results.values():
            self._add("kept", part, tensor)
        works = [self._work(part) for part in range(-1, len(self._blocks) + 1)]
        logits = next((leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)), None)
        vocab = logits.shape[-1] if logits is not None and logits.dim() else 0
        width = next((self._widths[n] for n in sorted(self._widths) if self._widths[n]), 0)
        passages = {
            name: tuple(replace(one, again=saves < self._last_save.get(one.part, 0)) for one, saves in calls)
            for name, calls in self._passages.items()
        }
        first, used = frozenset(self._first), _used(self._model, output)
        return Run(tuple(works[1:-1]), works[0], works[-1], width, vocab, first, passages, used)

    def _add(self, name: str, part: int, tensor: Tensor) -> None:
        # What has the width of the residual stream is whole on every rank of tensor parallelism.
        width = self._widths.get(part) or next(iter(self._widths.values()), 0)
        is_stream = tensor.dim() > 1 and tensor.shape[-1] == width
        self._sums[part][f"{name}_{'stream' if is_stream else 'inner'}"] += tensor.untyped_storage().nbytes()

    def _work(self, part: int) -> Work:
        sums = self._sums[part]
        kept = ("saved_stream", "saved_inner", "kept_stream", "kept_inner", "entered")
        exchanged = ("keys_and_values", "queries_and_outputs")
        counts = {name: int(sums[name]) for name in (*kept, *exchanged, "moved", "kernels")}
        return Work(**counts, matmul=sums["matmul"], attention=sums["attention"])


class _Random(TorchFunctionMode):
    """scaled_dot_product_attention as a fused kernel has it, which keeps no scores, and dropout as a device has it.

    fuses_dropout: of ``run_on_meta``.
    """

    def __init__(self, counted: _Counted, fuses_dropout: bool) -> None:
        self.counted, self.fuses_dropout = counted, fuses_dropout

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func is nn.functional.dropout and self.fuses_dropout:
            return self._dropout(*args, **kwargs)
        return func(*args, **kwargs)

    def _dropout(self, x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, True)[0] if training and 0 < p < 1 else nn.functional.dropout(x, p, training)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **options: Any,
    ) -> Tensor:
        if dropout_p > 0 and not self.fuses_dropout:
            stepwise = _in_steps(query, key, value, attn_mask, dropout_p, is_causal, **options)
            self.counted.exchange(_bytes(key) + _bytes(value), _bytes(query) + _bytes(stepwise))
            return stepwise
        scores = query.shape[:-1].numel() * key.shape[-2]
        flops = 2.0 * scores * (query.shape[-1] + value.shape[-1])
        out: Tensor = _Fused.apply(query, key, value, attn_mask)
        self.counted.product("attention", flops)
        self.counted.keep([out])
        self.counted.exchange(_bytes(key) + _bytes(value), _bytes(query) + _bytes(out))
        return out


def _in_steps(query: Tensor, key: Tensor, value: Tensor, *others: Any, **options: Any) -> Tensor:
    """Attention without a fused kernel, each step of it an operator."""
    out: Tensor = ATTENTION_IN_STEPS(query, key, value, *others, **options)[0]
    return out


class _Fused(torch.autograd.Function):
    """Keeps what a fused attention keeps: [batch, heads, queries, width] of each, and the scores' logarithm of sums."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        *batch, heads, queries, _ = query.shape  # laid out so that heads come together without a copy
        out = query.new_empty((*batch, queries, heads, value.shape[-1])).transpose(-3, -2)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, sums, *([mask] if mask is not None else []))
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise AssertionError("nothing runs backward on the meta device")


def _used(model: nn.Module, output: Any) -> frozenset[str]:
    """Names of the parameters that what a model returned depends on."""
    waiting = [leaf.grad_fn for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.grad_fn is not None]
    seen, found = set(waiting), set[int]()
    while waiting:
        node: Any = waiting.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        for other, _ in node.next_functions:
            if other is not None and other not in seen:
                seen.add(other)
                waiting.append(other)
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in found)


def _by_name(module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a forward was given, by the names of its arguments; by number those that it has no name for."""
    names = _names_of(type(module).forward)
    return {**{names[i] if i < len(names) else str(i): value for i, value in enumerate(args)}, **kwargs}


@functools.cache
def _names_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return tuple(p.name for p in list(inspect.signature(forward).parameters.values())[1:] if p.kind not in several)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _all_on_meta(args: Any, kwargs: Any) -> Any:
    """The same for an operator some of whose tensors have values, wherever the model keeps them."""
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    if len({tensor.is_meta for tensor in given}) < 2:
        return args, kwargs
    return tree_map_only(Tensor, lambda tensor: tensor if tensor.is_meta else tensor.to("meta"), (args, kwargs))


def _without_masks(indices: Any) -> list[Any]:
    """Indices of all elements in the place of masks."""
    found: list[Any] = []
    for index in indices:
        if isinstance(index, Tensor) and index.dtype in (torch.bool, torch.uint8):
            found += [index.new_empty(index.numel(), dtype=torch.long) for _ in range(index.dim())]
        else:
            found.append(index)
    return found
