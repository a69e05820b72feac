"""Attention of some queries over the keys of a whole sequence, in memory that grows with the sequence.

No mask of queries x keys is ever made. Where a kernel of torch does what a rule says (everything, causal, causal in
chunks) it runs; whatever else there is, windows, documents, soft caps, sinks, biases, runs in blocks of queries and
keys, of which backward computes each anew.

Shapes: B rows, H heads of queries, K of keys and values, G = H / K, n queries, S keys, D width of queries and keys, V
of values; t queries and k keys of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from nemo_dist_conf.runtime.techniques.context.mask_rules import Both, Causal, Chunks, Everything, Rule
from nemo_dist_conf.runtime.torch_inside import flash_backward_on_cpu, flash_on_cpu

__all__ = ["Scores", "attend"]

#: Scores of one block, over rows and heads: 16 MiB in float32.
_BLOCK_ELEMENTS = 2**22
_BLOCK_QUERIES = 256
#: Queries x keys up to which one kernel with a mask is faster than two without one, or than blocks: 256 KiB.
_MASK_ELEMENTS = 2**18


@dataclass(frozen=True)
class Scores:
    """What becomes of the products of queries and keys before they are weights, in this order.

    scale: a factor; None: 1 / sqrt(D). cap: c * tanh(x / c) of them. bias: added to them, 1 or B x 1 or H x 1 or n x S.
    sinks: [H], a score without a key. dropout: probability that a weight is 0.
    """

    scale: float | None = None
    cap: float | None = None
    bias: Tensor | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0

    @property
    def are_plain(self) -> bool:
        return self.cap is None and self.bias is None and self.sinks is None


def attend(query: Tensor, key: Tensor, value: Tensor, start: int, rule: Rule, scores: Scores = Scores()) -> Tensor:
    """[B, H, n, V]: what queries at positions from ``start`` on see of all keys.

    query: [B, H, n, D]. key, value: [B, K, S, D] and [B, K, S, V]; head h of the queries sees head h // G of the keys.
    """
    if scores.are_plain:
        end = start + query.size(2)
        if isinstance(rule, Everything):
            return _with_kernel(query, key, value, False, scores, rule, start)
        masked = _with_small_mask(query, key, value, start, rule, scores)
        if masked is not None:
            return masked
        if isinstance(rule, Causal):
            return _with_kernel(query, key[:, :, :end], value[:, :, :end], True, scores, rule, start)
        size = _causal_chunks(rule)
        if size is not None:
            borders = [start, *range((start // size + 1) * size, end, size), end]
            parts = []
            for begin, stop in zip(borders, borders[1:]):
                keys = slice(begin // size * size, stop)
                part = query[:, :, begin - start : stop - start]
                own = (part, key[:, :, keys], value[:, :, keys])
                parts.append(_with_kernel(*own, True, scores, Causal(), begin - keys.start))
            return torch.cat(parts, dim=2)
    return _in_blocks(query, key, value, start, rule, scores)


def _with_small_mask(
    query: Tensor, key: Tensor, value: Tensor, start: int, rule: Rule, scores: Scores
) -> Tensor | None:
    """With a mask of the keys in reach, where it is small and no kernel without one is as fast; else None."""
    if isinstance(rule, Causal) and (start == 0 or query.device.type == "cuda"):
        return None
    begin, end = rule.reach(start, start + query.size(2) - 1, key.size(2))
    if query.size(2) * (end - begin) > _MASK_ELEMENTS:
        return None
    mask = _seen(rule, query, range(start, start + query.size(2)), range(begin, end))
    keys = slice(begin, end)
    return F.scaled_dot_product_attention(
        query,
        key[:, :, keys],
        value[:, :, keys],
        mask,
        scores.dropout,
        scale=scores.scale,
        enable_gqa=query.size(1) != key.size(1),
    )


def _seen(rule: Rule, query: Tensor, queries: range, keys: range) -> Tensor:
    """The mask [B or 1, 1, t, k] of a block."""
    batch = torch.arange(query.size(0), device=query.device).view(-1, 1, 1, 1)
    places = torch.arange(queries.start, queries.stop, device=query.device).view(1, 1, -1, 1)
    others = torch.arange(keys.start, keys.stop, device=query.device).view(1, 1, 1, -1)
    return rule.seen(batch, places, others)


def _causal_chunks(rule: Rule) -> int | None:
    if isinstance(rule, Both) and len(rule.rules) == 2 and Causal() in rule.rules:
        return next((part.size for part in rule.rules if isinstance(part, Chunks)), None)
    return None


def _with_kernel(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scores: Scores, rule: Rule, start: int
) -> Tensor:
    """All keys or, causal, those up to the query, where the last key is that of the last query; as ``rule`` says."""
    grouped = query.size(1) != key.size(1)
    if query.device.type == "cuda":
        usable = _usable_on_cuda(query, key, value, scores.dropout, causal, grouped)
        if usable is not None:
            key, value, grouped = usable
            mask = causal_lower_right(query.size(2), key.size(2)) if causal else None
            return F.scaled_dot_product_attention(
                query, key, value, mask, scores.dropout, scale=scores.scale, enable_gqa=grouped
            )
    elif query.device.type == "cpu" and not scores.dropout and query.size(-1) == key.size(-1) == value.size(-1):
        if not causal or query.size(2) == key.size(2):
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=causal, scale=scores.scale, enable_gqa=grouped
            )
        out: Tensor = _CausalEnd.apply(query, key, value, scores.scale)
        return out
    return _in_blocks(query, key, value, start, rule, scores)


def _usable_on_cuda(
    query: Tensor, key: Tensor, value: Tensor, dropout: float, causal: bool, grouped: bool
) -> tuple[Tensor, Tensor, bool] | None:
    """Keys, values and whether they are grouped, as a kernel without a mask takes them; None where none does.

    Flash attention takes fewer heads of keys than of queries, the kernel for float32 does not.
    """
    from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

    if can_use_flash_attention(SDPAParams(query, key, value, None, dropout, causal, grouped)):
        return key, value, grouped
    if grouped:
        repeats = query.size(1) // key.size(1)
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    if can_use_efficient_attention(SDPAParams(query, key, value, None, dropout, causal, False)):
        return key, value, False
    return None


class _CausalEnd(torch.autograd.Function):
    """Causal attention on a CPU of queries that are the last of the keys: over those before them and over their own.

    The two are put together by their log-sum-exps. Each part's backward gives its part of the gradients when it is
    told the output and the log-sum-exp of both (as in ring attention, arXiv:2310.01889).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        before = key.size(2) - query.size(2)
        parts = [
            flash_on_cpu(query, key[:, :, :before], value[:, :, :before], False, scale),
            flash_on_cpu(query, key[:, :, before:], value[:, :, before:], True, scale),
        ]
        (out, log_sum), (own, own_log_sum) = parts  # type: ignore[misc]
        both = torch.logaddexp(log_sum, own_log_sum)
        weight = torch.exp(log_sum - both).unsqueeze(-1).to(out.dtype)
        own_weight = torch.exp(own_log_sum - both).unsqueeze(-1).to(out.dtype)
        out = out * weight + own * own_weight
        ctx.save_for_backward(query, key, value, out, both)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, out, log_sum = ctx.saved_tensors
        before = key.size(2) - query.size(2)
        grads = []
        for keys, causal in ((slice(None, before), False), (slice(before, None), True)):
            part = (key[:, :, keys], value[:, :, keys], out, log_sum)
            grads.append(flash_backward_on_cpu(gradient, query, *part, causal, ctx.scale))
        (dq, dk, dv), (own_dq, own_dk, own_dv) = grads
        return dq + own_dq, torch.cat([dk, own_dk], 2), torch.cat([dv, own_dv], 2), None


@torch.compiler.disable
def _in_blocks(query: Tensor, key: Tensor, value: Tensor, start: int, rule: Rule, scores: Scores) -> Tensor:
    scale = query.size(-1) ** -0.5 if scores.scale is None else scores.scale
    seed = int(torch.randint(2**62, ())) if scores.dropout else 0
    settings = _Settings(start, rule, scale, scores.cap, scores.dropout, seed)
    out: Tensor = _Blocks.apply(query, key, value, scores.bias, scores.sinks, settings)
    return out


@dataclass(frozen=True)
class _Settings:
    start: int
    rule: Rule
    scale: float
    cap: float | None
    dropout: float
    seed: int


@dataclass(frozen=True)
class _Block:
    """One block: its queries, its keys, and the mask of what its queries see, None where they see all of it."""

    number: int
    queries: slice
    keys: slice
    mask: Tensor | None


def _blocks(query: Tensor, key: Tensor, settings: _Settings) -> Iterator[list[_Block]]:
    """For each block of queries, those of the keys in its reach."""
    rows, heads, count, length = *query.shape[:3], key.size(2)
    step = min(count, max(16, min(_BLOCK_QUERIES, _BLOCK_ELEMENTS // (rows * heads * 64))))
    width = max(64, _BLOCK_ELEMENTS // (rows * heads * step))
    number = 0
    for begin in range(0, count, step):
        queries = slice(begin, min(begin + step, count))
        first, last = settings.start + begin, settings.start + queries.stop - 1
        from_key, to_key = settings.rule.reach(first, last, length)
        found = []
        for left in range(from_key, to_key, width):
            keys = slice(left, min(left + width, to_key))
            mask = None
            if not settings.rule.sees_all(first, last, keys.start, keys.stop):
                mask = _seen(settings.rule, query, range(first, last + 1), range(keys.start, keys.stop))
            found.append(_Block(number, queries, keys, mask))
            number += 1
        yield found


class _Blocks(torch.autograd.Function):
    """Attention by blocks, with a running maximum and sum of the scores' exponentials (arXiv:2205.14135).

    Products are taken in the inputs' type, everything else in float32 (float64 for inputs of that type).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        sinks: Tensor | None,
        settings: _Settings,
    ) -> Tensor:
        exact = torch.promote_types(query.dtype, torch.float32)
        out = query.new_empty((*query.shape[:3], value.size(-1)))
        log_sum = query.new_empty(query.shape[:3], dtype=exact)
        with torch.autocast(query.device.type, enabled=False):
            for blocks in _blocks(query, key, settings):
                queries = blocks[0].queries if blocks else slice(0, 0)
                part = query[:, :, queries]
                highest = torch.full(part.shape[:3], -torch.inf, dtype=exact, device=query.device)
                total = torch.zeros_like(highest)
                summed = torch.zeros((*part.shape[:3], value.size(-1)), dtype=exact, device=query.device)
                for block in blocks:
                    score, _ = _score(part, key, bias, block, settings)
                    higher = torch.maximum(highest, score.amax(-1))
                    base = higher.clamp_min(torch.finfo(exact).min)  # a row without a key in reach
                    weight = torch.exp(score - base.unsqueeze(-1))
                    fade = torch.exp(highest - base)
                    total = total * fade + weight.sum(-1)
                    weight = _kept(weight, block, settings)
                    summed = summed * fade.unsqueeze(-1) + _weighed(weight, value[:, :, block.keys])
                    highest = higher
                together = highest + total.log()
                if sinks is not None:
                    together = torch.logaddexp(together, sinks.to(exact).view(1, -1, 1))
                base = highest.clamp_min(torch.finfo(exact).min)
                part_out = summed * torch.exp(base - together.clamp_min(torch.finfo(exact).min)).unsqueeze(-1)
                out[:, :, queries] = part_out.to(out.dtype)
                log_sum[:, :, queries] = together
        ctx.save_for_backward(query, key, value, bias, sinks, out, log_sum)
        ctx.settings = settings
        return out

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        query, key, value, bias, sinks, out, log_sum = ctx.saved_tensors
        settings: _Settings = ctx.settings
        exact = log_sum.dtype
        d_query, d_key, d_value = (torch.zeros_like(tensor, dtype=exact) for tensor in (query, key, value))
        d_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and ctx.needs_input_grad[3] else None
        with torch.autocast(query.device.type, enabled=False):
            # For each query, the part of the gradient that all weights share.
            shared = (gradient.to(exact) * out.to(exact)).sum(-1)
            for blocks in _blocks(query, key, settings):
                for block in blocks:
                    queries, keys = block.queries, block.keys
                    part, upper = query[:, :, queries], gradient[:, :, queries]
                    score, capped = _score(part, key, bias, block, settings)
                    base = log_sum[:, :, queries].clamp_min(torch.finfo(exact).min).unsqueeze(-1)
                    weight = torch.exp(score - base)
                    d_value[:, :, keys] += _to_keys(_kept(weight, block, settings), upper, value.size(1))
                    d_weight = _kept(_products(upper, value[:, :, keys]).to(exact), block, settings)
                    d_score = weight * (d_weight - shared[:, :, queries].unsqueeze(-1))
                    if d_bias is not None:
                        _add_reduced(d_bias, d_score, block)
                    if settings.cap is not None and capped is not None:
                        d_score = d_score * (1 - (capped / settings.cap).square())
                    d_score = d_score * settings.scale
                    d_query[:, :, queries] += _weighed(d_score, key[:, :, keys])
                    d_key[:, :, keys] += _to_keys(d_score, part, key.size(1))
            d_sinks = None
            if sinks is not None:
                weight = torch.exp(sinks.to(exact).view(1, -1, 1) - log_sum)
                d_sinks = -(weight * shared).sum((0, 2)).view_as(sinks).to(sinks.dtype)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        grads = [grad.to(query.dtype) for grad in (d_query, d_key, d_value)]
        return *grads, d_bias, d_sinks, None


def _score(
    query: Tensor, key: Tensor, bias: Tensor | None, block: _Block, settings: _Settings
) -> tuple[Tensor, Tensor | None]:
    """Scores [B, H, t, k] of a block, -inf where they are not seen; and, under a cap, those before bias and mask."""
    exact = torch.promote_types(query.dtype, torch.float32)
    score = _products(query, key[:, :, block.keys]).to(exact) * settings.scale
    capped = None
    if settings.cap is not None:
        score = capped = settings.cap * torch.tanh(score / settings.cap)
    if bias is not None:
        rows = block.queries if bias.size(-2) > 1 else slice(None)
        score = score + bias[..., rows, block.keys]
    if block.mask is not None:
        score = score.masked_fill(~block.mask, -torch.inf)
    return score, capped


def _products(query: Tensor, key: Tensor) -> Tensor:
    """[B, H, t, D] and [B, K, k, D] -> [B, H, t, k]."""
    rows, heads, count, width = query.shape
    groups = key.size(1)
    folded = query.reshape(rows, groups, heads // groups * count, width) @ key.transpose(-1, -2)
    return folded.view(rows, heads, count, key.size(2))


def _weighed(weight: Tensor, value: Tensor) -> Tensor:
    """[B, H, t, k] and [B, K, k, V] -> [B, H, t, V], in the type of the weights."""
    rows, heads, count, length = weight.shape
    groups = value.size(1)
    folded = weight.reshape(rows, groups, heads // groups * count, length).to(value.dtype) @ value
    return folded.to(weight.dtype).view(rows, heads, count, value.size(-1))


def _to_keys(weight: Tensor, given: Tensor, groups: int) -> Tensor:
    """[B, H, t, k] and [B, H, t, D] -> [B, K, k, D], summed over the queries and heads that see the key."""
    rows, heads, count, length = weight.shape
    weight = weight.reshape(rows, groups, heads // groups * count, length)
    folded = given.reshape(rows, groups, heads // groups * count, given.size(-1))
    return (weight.transpose(-1, -2).to(given.dtype) @ folded).to(weight.dtype)


def _kept(weight: Tensor, block: _Block, settings: _Settings) -> Tensor:
    """Weights of which some are dropped, the same ones in forward and backward."""
    if not settings.dropout:
        return weight
    generator = torch.Generator(weight.device).manual_seed(settings.seed + block.number)
    drawn = torch.rand(weight.shape, generator=generator, device=weight.device)
    return weight * (drawn >= settings.dropout) / (1 - settings.dropout)


def _add_reduced(total: Tensor, part: Tensor, block: _Block) -> None:
    """Add a block's [B, H, t, k] to a bias that is 1 wide in some dimensions."""
    rows = block.queries if total.size(-2) > 1 else slice(None)
    target = total[..., rows, block.keys]
    target += part.sum_to_size(target.shape)
