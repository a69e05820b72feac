"""The attention and the mask that transformers runs in a model whose rows are split over the ranks of an axis.

Both are registered with transformers under one name. The mask is a rule over positions of the whole row instead of a
tensor over a rank's own tokens; attention gathers keys and values, or exchanges tokens for heads, and runs it.

Shapes: B rows, S tokens of a whole sequence, L = S / cp tokens of a rank, H heads, K key/value heads, D head width.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any, Callable, ContextManager, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.techniques.context.heads import heads_to_tokens, own_heads, tokens_to_heads
from nemo_dist_conf.runtime.techniques.context.mask_rules import (
    Both,
    Causal,
    Documents,
    Everything,
    Packed,
    Rule,
    Unpadded,
    read_rule,
    simplified,
)
from nemo_dist_conf.runtime.techniques.context.whole_attention import Scores, attend
from nemo_dist_conf.runtime.torch_inside import collectives
from nemo_dist_conf.topology.head_exchange import chosen_method, sent_kv_heads

__all__ = ["Exchange", "Row", "RowMask", "chunks_of", "exchanged_attention", "exchanged_mask"]

#: torch 2.13 renamed them; the old names warn there, the new ones are unknown to torch 2.11.
_all_gather = getattr(collectives, "all_gather_single_autograd", None) or collectives.all_gather_tensor_autograd
_all_gather_whole = getattr(collectives, "all_gather_single", None) or collectives.all_gather_tensor

#: What attention functions of transformers 5.23 are handed and none of those for a single process reads: it is there
#: for flash attention on packed rows without position ids of their own (which comes as cu_seq_lens), or passes by.
_IDLE = frozenset(
    {
        "cache_position",
        "deterministic",
        "logits_to_keep",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "token_type_ids",
        "use_cache",
    }
)
#: Why something that an attention function is handed cannot be done over the keys of other ranks.
_REASONS = {
    "block_indices": "which keys it sees is chosen from this rank's keys",
    "cu_seq_lens_k": "document boundaries have to be position_ids that start again",
    "cu_seq_lens_q": "document boundaries have to be position_ids that start again",
    "indices": "which keys it sees is chosen from this rank's keys",
    "output_attentions": "the weights are of keys that other ranks hold",
}


@dataclass(frozen=True)
class Row:
    """The rows of one forward. length: L. last: the highest position id. documents: None where rows are not packed."""

    length: int
    last: int
    documents: Documents | None = None


@dataclass(frozen=True, eq=False)
class RowMask:
    """A rule, and the mask for whole rows that transformers would have made of it, for what is run on whole rows.

    shape: [B, 1, S, S]. dtype: of a mask that is added to scores; bool: of one of what is seen. may_be_none: the model
    may be given None instead. converted: what the model has then converted it to.
    """

    rule: Rule
    shape: tuple[int, int, int, int]
    dtype: torch.dtype
    device: torch.device
    may_be_none: bool
    converted: torch.dtype | None = None

    def to(self, dtype: torch.dtype) -> RowMask:
        """For a model that asks for its mask as bool: what is added to scores is not 0 where nothing is seen."""
        return dataclasses.replace(self, converted=dtype)

    @functools.cached_property
    def tensor(self) -> Tensor:
        places = torch.arange(self.shape[-1], device=self.device)
        batch = torch.arange(self.shape[0], device=self.device).view(-1, 1, 1, 1)
        seen = self.rule.seen(batch, places.view(1, 1, -1, 1), places.view(1, 1, 1, -1)).expand(self.shape)
        if self.dtype != torch.bool:
            hidden = torch.finfo(self.dtype).min
            seen = torch.zeros(self.shape, dtype=self.dtype, device=self.device).masked_fill(~seen, hidden)
        return seen if self.converted is None else seen.to(self.converted)


@dataclass
class Exchange:
    """One model's exchange over a cp axis, and the rows that its forward is at. mesh: the axis cp.

    method: how attention sees the tokens of other ranks: auto, gather, ulysses (topology/head_exchange.py).
    tp: ranks over which heads will be split that are still whole, as in a trial.
    runs_whole_rows: some of its modules are run on whole rows. on_whole_rows: one of them is being run.
    """

    mesh: DeviceMesh
    method: str = "auto"
    tp: int = 1
    depth: int = 0
    row: Row | None = None
    lengths: set[int] = field(default_factory=set)
    runs_whole_rows: bool = False
    on_whole_rows: bool = False

    @property
    def size(self) -> int:
        return self.mesh.size()

    @property
    def device(self) -> torch.device:
        return torch.device(self.mesh.device_type)

    def again(self) -> Callable[[], ContextManager[None]]:
        """For what runs again in backward: it is at the rows of this moment then, whichever forwards came after."""
        return functools.partial(self._at, self.row)

    @contextlib.contextmanager
    def _at(self, row: Row | None) -> Iterator[None]:
        before, self.row = self.row, row
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            self.row = before

    @contextlib.contextmanager
    def whole_rows(self) -> Iterator[None]:
        """For a module that is run on whole rows: nothing inside of it is exchanged."""
        self.on_whole_rows = True
        try:
            yield
        finally:
            self.on_whole_rows = False

    def whole(self, part: Tensor, dim: int) -> Tensor:
        """This rank's part of a tensor -> all of it, in the order of the sequence; gradients are scattered back."""
        if part.is_complex():
            return torch.view_as_complex(self.whole(torch.view_as_real(part), dim % part.dim()))
        if part.dtype == torch.bool:
            return self.whole(part.to(torch.uint8), dim).to(torch.bool)
        if part.is_floating_point():
            gathered = _all_gather(part.contiguous(), dim, self.mesh.get_group())
        else:
            gathered = _all_gather_whole(part.contiguous(), dim, self.mesh.get_group())
        chunks = gathered.chunk(2 * self.size, dim=dim)
        # Rank r's two chunks stand at 2r and 2r + 1.
        held = [index for rank in range(self.size) for index in chunks_of(rank, self.size)]
        return torch.cat([chunks[held.index(index)] for index in range(len(held))], dim=dim)

    def own(self, whole: Tensor, dim: int) -> Tensor:
        """All of a tensor, in the order of the sequence -> this rank's part of it."""
        chunks = whole.chunk(2 * self.size, dim=dim)
        return torch.cat([chunks[index] for index in chunks_of(self.mesh.get_local_rank(), self.size)], dim=dim)

    def by_heads(self, kind: type, heads: int, kv_heads: int, has_bias: bool) -> bool:
        """Whether an attention of so many heads exchanges tokens for heads; else it gathers keys and values.

        has_bias: of a rank's queries for all keys, which auto does not send. Raises ConfigError where ulysses is asked
        for and impossible.
        """
        if heads % self.tp == kv_heads % self.tp == 0:
            heads, kv_heads = heads // self.tp, kv_heads // self.tp
        if self.method == "ulysses":
            self._refuse_heads(kind.__name__, heads, kv_heads)
        method = "gather" if has_bias and self.method == "auto" else self.method
        return chosen_method(method, heads, kv_heads, self.size) == "ulysses"

    def _refuse_heads(self, name: str, heads: int, kv_heads: int) -> None:
        """Raise ConfigError where ulysses cannot be had by an attention of so many heads on one rank along tp."""
        if heads % self.size == 0 and heads % kv_heads == 0:
            return
        held = f"{heads} head{'' if heads == 1 else 's'} on a rank"
        what = f"context.method=ulysses: {name} has {held}, which cp_size={self.size} does not divide"
        asked = f"context.method=ulysses parallelism.cp_size={self.size}"
        allowed = "a cp_size that divides the heads of a rank along tp, or context.method=gather"
        raise ConfigError(Problem(what=what, asked=asked, allowed=allowed, instead="context.method=gather"))

    def refuse(self, what: str, allowed: str) -> ConfigError:
        asked = f"parallelism.cp_size={self.size}"
        return ConfigError(
            Problem(what=f"cp_size={self.size}: {what}", asked=asked, allowed=allowed, instead="parallelism.cp_size=1")
        )


def chunks_of(rank: int, size: int) -> tuple[int, int]:
    """Which two of a sequence's 2 * size chunks a rank holds."""
    return rank, 2 * size - 1 - rank


def exchanged_mask(
    exchange: Exchange,
    may_be_none: bool,
    *,
    q_length: int | None = None,
    kv_length: int | None = None,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    **others: Any,
) -> Rule | RowMask | None:
    """The mask function of transformers' registry: the rule, over the whole row, that a mask would have been made of.

    may_be_none: the model knows that it may be given None instead of a causal mask or of one that hides nothing, as
    where it runs scaled_dot_product_attention.
    Raises ConfigError for what says nothing of other ranks' tokens.
    """
    row = exchange.row if exchange.depth else None
    if row is None:
        raise exchange.refuse("a mask was made outside of the model's forward", "model(input_ids)")
    if "cache_position" in others and q_length is None:  # transformers before 5.3
        q_length = others["cache_position"].size(0)
    known = {"batch_size", "cache_position", "config", "device", "dtype", "local_size", "use_vmap"}
    unknown = sorted(name for name, value in others.items() if name not in known and value is not None)
    if unknown or mask_function is None or q_length is None:
        import transformers

        what = f"transformers {transformers.__version__} describes a mask by {', '.join(unknown) or 'other arguments'}"
        raise exchange.refuse(f"{what}, which this version does not know", "transformers 5.23")
    offset = any(isinstance(value, Tensor) or value for value in (q_offset, kv_offset))
    if offset or not q_length == kv_length == row.length:
        what = f"attention of {q_length} tokens to {kv_length} keys, where this rank holds {row.length} of a row"
        raise exchange.refuse(what, "self-attention over the row, without past_key_values")
    try:
        rule, packed = read_rule(mask_function, row.length, functools.partial(_on_any_rank, exchange))
    except NotImplementedError as error:
        raise exchange.refuse(f"its mask cannot be made over the whole row: {error}", "cp_size=1") from None
    if attention_mask is not None:  # the model's own: a user's is refused before
        rule = _with_padding(exchange, rule, attention_mask, row.length)
    # transformers looks for documents in a rank's own positions. Where the rank's two parts follow on one another it
    # sees none; with a cache it never looks.
    if row.documents is not None and _on_any_rank(exchange, packed):
        rule = Packed(rule, row.documents)
    rule = simplified(rule, row.length * exchange.size)
    # Positions jump between a rank's two parts, which transformers takes for two documents.
    skips = may_be_none and (allow_is_causal_skip or packed)
    is_idle = rule == Causal() and skips or rule == Everything() and may_be_none and allow_is_bidirectional_skip
    if exchange.runs_whole_rows:
        whole, dtype = row.length * exchange.size, torch.bool if may_be_none else others.get("dtype", torch.float32)
        shape = (int(others.get("batch_size", 1)), 1, whole, whole)
        return RowMask(rule, shape, dtype, exchange.device, is_idle)
    return None if is_idle else rule


def _on_any_rank(exchange: Exchange, said: bool) -> bool:
    word = torch.tensor(said, dtype=torch.uint8, device=exchange.device)
    dist.all_reduce(word, dist.ReduceOp.MAX, group=exchange.mesh.get_group())
    return bool(word)


def _with_padding(exchange: Exchange, rule: Rule, mask: Tensor, length: int) -> Rule:
    """The rule for rows of which some tokens are seen by none. mask: [B, L]."""
    if mask.dim() != 2 or mask.size(1) != length:
        raise exchange.refuse(f"a mask of shape {tuple(mask.shape)} says nothing of other ranks' tokens", "cp_size=1")
    seen_BS = exchange.whole(mask != 0, 1)
    return rule if bool(seen_BS.all()) else Both((rule, Unpadded(seen_BS)))


def exchanged_attention(
    exchange: Exchange,
    module: nn.Module,
    query_BHLD: Tensor,
    key_BKLD: Tensor,
    value_BKLD: Tensor,
    attention_mask: Rule | RowMask | Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sinks: Tensor | None = None,
    position_bias: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' registry, over the whole sequence. [B, L, H, D].

    attention_mask: what ``exchanged_mask`` gave; a tensor of the model's own is one that says something of all keys.
    Without, attention is causal, or as ``is_causal`` of the call or of the module says.
    Raises ConfigError for every argument that cannot be done over the keys of other ranks.
    """
    _refuse_unknown(exchange, module, others)
    length = query_BHLD.size(2)
    if key_BKLD.size(2) != length or length not in exchange.lengths:
        what = f"{type(module).__name__} attends from {length} to {key_BKLD.size(2)} tokens, not over this rank's row"
        raise exchange.refuse(what, "self-attention over the row")
    if sinks is not None and s_aux is not None:
        raise exchange.refuse(f"{type(module).__name__} has two kinds of sinks", "one of sinks and s_aux")
    rule, bias = _rule_and_bias(exchange, module, attention_mask, is_causal, length)
    if attention_mask is None and sliding_window is not None and sliding_window < length * exchange.size:
        what = f"{type(module).__name__} asks for a window of {sliding_window} keys without a mask"
        raise exchange.refuse(what, "a mask of create_sliding_window_causal_mask")
    if position_bias is not None:
        added = _over_all_keys(exchange, module, position_bias, length, "position_bias")
        bias = added if bias is None else bias + added
    dtype = query_BHLD.dtype
    if torch.is_autocast_enabled(query_BHLD.device.type):  # as scaled_dot_product_attention does
        dtype = torch.get_autocast_dtype(query_BHLD.device.type)
    query_BHLD, key_BKLD, value_BKLD = (part.to(dtype) for part in (query_BHLD, key_BKLD, value_BKLD))
    sinks = sinks if s_aux is None else s_aux
    scores = Scores(scaling, softcap, bias, sinks, dropout if module.training else 0.0)
    has_bias = bias is not None and bias.size(-2) > 1
    if exchange.by_heads(type(module), query_BHLD.size(1), key_BKLD.size(1), has_bias):
        return _of_own_heads(exchange, query_BHLD, key_BKLD, value_BKLD, rule, scores), None
    key_BKSD, value_BKSD = exchange.whole(key_BKLD, 2), exchange.whole(value_BKLD, 2)
    chunk, outputs = length // 2, []
    for half, index in enumerate(chunks_of(exchange.mesh.get_local_rank(), exchange.size)):
        own = slice(half * chunk, (half + 1) * chunk)
        part = dataclasses.replace(scores, bias=bias[..., own, :]) if bias is not None and has_bias else scores
        outputs.append(attend(query_BHLD[:, :, own], key_BKSD, value_BKSD, index * chunk, rule, part))
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


def _of_own_heads(
    exchange: Exchange, query_BHLD: Tensor, key_BKLD: Tensor, value_BKLD: Tensor, rule: Rule, scores: Scores
) -> Tensor:
    """[B, L, H, D]: what this rank's tokens come to, each rank attending over whole rows with H / cp of the heads."""
    mesh, heads, kv_heads = exchange.mesh, query_BHLD.size(1), key_BKLD.size(1)
    copies = sent_kv_heads(kv_heads, exchange.size) // kv_heads
    if copies > 1:
        key_BKLD, value_BKLD = (part.repeat_interleave(copies, 1) for part in (key_BKLD, value_BKLD))
    bias, sinks = scores.bias, scores.sinks
    if bias is not None and bias.size(-2) > 1:
        by_head = bias.size(1) == heads
        bias = tokens_to_heads([bias], mesh)[0] if by_head else exchange.whole(bias, 2)
    elif bias is not None and bias.size(1) == heads:
        bias = own_heads(bias, 1, mesh)
    scores = dataclasses.replace(scores, bias=bias, sinks=None if sinks is None else own_heads(sinks, 0, mesh))
    query, key, value = tokens_to_heads([query_BHLD, key_BKLD, value_BKLD], mesh)
    return heads_to_tokens(attend(query, key, value, 0, rule, scores), mesh)


def _refuse_unknown(exchange: Exchange, module: nn.Module, others: dict[str, Any]) -> None:
    """Nothing that an attention function is handed is dropped, unless no attention function reads it."""
    for name, value in others.items():
        if name in _IDLE or value is None or value is False:
            continue
        reason = f" ({_REASONS[name]})" if name in _REASONS else ""
        what = f"{type(module).__name__} hands {name} to its attention, which cannot be exchanged{reason}"
        raise exchange.refuse(what, f"attention without {name}")


def _rule_and_bias(
    exchange: Exchange, module: nn.Module, mask: Rule | RowMask | Tensor | None, is_causal: bool | None, length: int
) -> tuple[Rule, Tensor | None]:
    if isinstance(mask, RowMask):
        return mask.rule, None
    if isinstance(mask, Rule):
        return mask, None
    if mask is None:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        return (Causal() if causal else Everything()), None
    if not isinstance(mask, Tensor):
        raise exchange.refuse(f"{type(module).__name__} brings a mask that is a {type(mask).__name__}", "no such mask")
    mask = _over_all_keys(exchange, module, mask, length, "a mask")
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -torch.inf)
    return Everything(), mask


def _over_all_keys(exchange: Exchange, module: nn.Module, tensor: Tensor, length: int, name: str) -> Tensor:
    """Something added to scores, of all S keys: [.., .., L or 1, S] as it is, [.., .., 1, L] gathered."""
    whole = length * exchange.size
    if tensor.dim() == 4 and tensor.size(-2) in (1, length) and tensor.size(-1) == whole:
        return tensor
    if tensor.dim() == 4 and tensor.size(-2) == 1 and tensor.size(-1) == length:
        return exchange.whole(tensor, 3)
    what = f"{name} of {type(module).__name__} has the shape {tuple(tensor.shape)}: it says nothing of the {whole} keys"
    raise exchange.refuse(f"{what} of the whole row", f"[.., .., {length}, {whole}], or [.., .., 1, {length}]")
