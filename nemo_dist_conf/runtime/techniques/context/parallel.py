"""Context parallelism: each rank holds a part of every sequence, and attention sees the keys and values of all.

Shapes: B rows, S tokens of a whole sequence, L = S / cp tokens of a rank, H heads, K key/value heads, D head width.

A sequence is cut into 2 * cp chunks; rank r holds chunks r and 2 * cp - 1 - r. Under a causal mask every rank then has
the same work (Llama 3, arXiv:2407.21783, section 3.3.2). Keys and values are gathered over the cp ranks and their
gradients scattered back, which runs on NCCL and gloo alike; torch's own ring attention runs on CUDA only.

Attention and masks come in through the two registries of transformers. Modules that mix tokens otherwise are run on
whole rows (whole_rows.py). Which those are is known of a model's family, or tried (trial.py).
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import logging
from dataclasses import dataclass, field
from typing import Any, Callable, Collection, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.techniques.context.exchange import (
    Exchange,
    Row,
    chunks_of,
    exchanged_attention,
    exchanged_mask,
)
from nemo_dist_conf.runtime.techniques.context.mask_rules import Documents
from nemo_dist_conf.runtime.techniques.context.position_counts import CountsPositions, Site
from nemo_dist_conf.runtime.techniques.context.whole_rows import OnWholeRows, TokenDims
from nemo_dist_conf.runtime.torch_inside import attention_of, name_attention, names_attention, tree_map_only
from nemo_dist_conf.topology.sequence_chunks import chunk_problem

__all__ = [
    "Ways",
    "apply_context_parallel",
    "exchange_tokens",
    "local_positions",
    "own_configs",
    "set_attention",
    "split_sequence",
    "takes_tokens",
    "with_positions",
]

#: Groups over which sequences were split, and how long a rank's parts were: a model that gets whole rows would take
#: them for parts of longer ones.
_split_over: dict[str, set[int]] = {}

#: An exchange knows the rows of one model, so each has one of its own.
_numbers = itertools.count()

log = logging.getLogger(__name__)

#: Arguments of a forward that are split like the tokens themselves.
_SPLIT = frozenset({"input_ids", "inputs_embeds", "position_ids", "token_type_ids"})
#: Arguments that say something of a whole row, and what to give instead.
_WHOLE = {
    "attention_mask": "rows padded at their end with label -100, where a causal attention never looks",
    "labels": "the loss of model(input_ids).logits and of labels from mesh_context.split_sequence(input_ids, labels)",
    "past_key_values": "forward without a cache",
}

_NO_CP = "parallelism.cp_size=1"


@dataclass(frozen=True)
class Ways:
    """What is done to the modules of a model, beside the attention that it asks transformers' registry for.

    counts: classes of modules that count tokens by themselves, and where in their code. whole_rows: classes of those
    that are run on whole rows. fills_positions: the model takes positions from 0 where it is given none.
    """

    counts: Mapping[type, set[Site]] = field(default_factory=dict)
    whole_rows: Mapping[type, TokenDims] = field(default_factory=dict)
    fills_positions: bool = True


def split_sequence(tensor: Tensor, mesh: DeviceMesh, dim: int = 1) -> Tensor:
    """This rank's chunks of a whole sequence along ``dim``. mesh: the axis cp. [B, S] -> [B, L].

    Raises ConfigError where the tokens do not split into 2 * cp equal chunks.
    """
    length = tensor.size(dim)
    uneven = chunk_problem(length, mesh.size())
    if uneven is not None:
        raise ConfigError(uneven)
    _split_over.setdefault(mesh.get_group().group_name, set()).add(length // mesh.size())
    positions = local_positions(length // mesh.size(), mesh, tensor.device)
    return tensor.index_select(dim, positions)


def local_positions(length: int, mesh: DeviceMesh, device: torch.device) -> Tensor:
    """Positions in the whole sequence of this rank's ``length`` tokens, [L] int64."""
    chunk = length // 2
    first, last = chunks_of(mesh.get_local_rank(), mesh.size())
    steps = torch.arange(chunk, device=device)
    return torch.cat([first * chunk + steps, last * chunk + steps])


def apply_context_parallel(
    model: nn.Module, mesh: DeviceMesh, ways: Ways | None = None, method: str = "auto"
) -> Exchange:
    """Let a model attend over the sequence parts of all ranks of ``mesh``, the axis cp; in place.

    Its forward then takes this rank's tokens [B, L]; position ids that are not given are filled in.
    ways: what ``try_context_parallel`` found before anything was wrapped; None: the model is tried here.
    method: how attention sees the tokens of other ranks, as ``context.method`` says.
    Raises ConfigError for a model that mixes tokens by anything that is not exchanged.
    """
    if ways is None:
        from nemo_dist_conf.runtime.techniques.context.trial import try_context_parallel

        ways = try_context_parallel(model, mesh, method=method)
    exchange = exchange_tokens(model, mesh, ways, method)
    _split_over.pop(mesh.get_group().group_name, None)
    log.info("context parallel over %d ranks (context.method=%s)", mesh.size(), method)
    return exchange


def exchange_tokens(model: nn.Module, mesh: DeviceMesh, ways: Ways, method: str = "auto", tp: int = 1) -> Exchange:
    """``apply_context_parallel`` without asking whether it is right for the model. tp: as in ``Exchange``."""
    exchange = Exchange(mesh, method, tp, runs_whole_rows=bool(ways.whole_rows))
    _register(model, exchange, ways.whole_rows)
    positions = functools.partial(local_positions, mesh=mesh, device=exchange.device)
    for name, module in model.named_modules():
        if name == "" or takes_tokens(module):
            enter = functools.partial(_enter, exchange, ways.fills_positions)
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(functools.partial(_leave, exchange), always_call=True)
        if type(module) in ways.counts:
            module.forward = CountsPositions(module.forward, ways.counts[type(module)], exchange, positions)
        if _depends_on_length(module):
            module.forward = _OverWholeRow(module.forward, exchange)
        if type(module) in ways.whole_rows:
            module.forward = OnWholeRows(module, exchange, ways.whole_rows[type(module)])
    return exchange


def _register(model: nn.Module, exchange: Exchange, whole_rows: Collection[type]) -> None:
    """Let every config of the model name the exchange as the attention that is run, but on whole rows."""
    configs = own_configs(model, whole_rows)
    if not configs:
        return
    from transformers import AttentionInterface, AttentionMaskInterface

    name = f"nemo_dist_conf_context_{next(_numbers)}"
    for kind in ("eager", "other"):
        AttentionInterface.register(f"{name}_{kind}", functools.partial(exchanged_attention, exchange))
        AttentionMaskInterface.register(f"{name}_{kind}", functools.partial(exchanged_mask, exchange, kind == "other"))
    # What computes its scores itself always brings a mask.
    set_attention(configs, {None: f"{name}_eager", "eager": f"{name}_eager"}, f"{name}_other")


def own_configs(model: nn.Module, but: Collection[type] = ()) -> list[Any]:
    """Copies, which the model now has, of all its objects that name an implementation of attention.

    Another model that was built from the same object keeps its attention, and so do modules of the classes ``but``,
    with what is in them.
    """
    memo: dict[int, Any] = {}
    found: dict[int, Any] = {}
    kept = {id(inner) for module in model.modules() if type(module) in but for inner in module.modules()}
    for module in model.modules():
        if id(module) in kept:
            continue
        for key, value in list(vars(module).items()):
            if not isinstance(value, (nn.Module, Tensor, type)) and names_attention(value):
                copied = copy.deepcopy(value, memo)
                found[id(copied)] = module.__dict__[key] = copied
    return list(found.values())


def set_attention(configs: list[Any], names: Mapping[str | None, str], default: str) -> None:
    """Let each config name another implementation of attention in place of the one that it names."""
    name_attention([(config, names.get(attention_of(config), default)) for config in configs])


def takes_tokens(module: nn.Module) -> bool:
    """Whether this is a model, or the part of one, whose forward is given tokens and their positions."""
    names = _parameters(module)
    return "position_ids" in names and ("input_ids" in names or "inputs_embeds" in names)


def _parameters(module: nn.Module) -> tuple[str, ...]:
    """Names of what the forward of the module's class takes, in order."""
    return _parameters_of(type(module).forward)


@functools.cache
def _parameters_of(forward: Callable[..., Any]) -> tuple[str, ...]:
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    own = list(inspect.signature(forward).parameters.values())[1:]
    return tuple(parameter.name for parameter in own if parameter.kind not in several)


def _enter(exchange: Exchange, fills: bool, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Before a forward: note its rows, and fill in positions, which the model would count from 0 on every rank."""
    exchange.depth += 1
    if exchange.on_whole_rows:
        return args, kwargs
    names = _parameters(module)
    given = {**dict(zip(names, args)), **kwargs}
    tokens = next((given[name] for name in ("input_ids", "inputs_embeds") if given.get(name) is not None), None)
    if tokens is None:
        tokens = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if exchange.depth == 1:
        exchange.row = None
    if exchange.row is None and tokens is not None and tokens.dim() > 1:
        _refuse_whole(exchange, module, given)
        exchange.row = _row(exchange, tokens, given.get("position_ids"))
        exchange.lengths.add(exchange.row.length)
    if fills and exchange.row is not None and tokens is not None and given.get("position_ids") is None:
        positions = local_positions(exchange.row.length, exchange.mesh, tokens.device)
        return with_positions(module, args, kwargs, positions.expand(tokens.size(0), -1))
    return args, kwargs


def with_positions(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], positions_BL: Tensor) -> Any:
    """What a forward is given, with position ids, where it takes them; they were not given yet, or as None."""
    names = _parameters(module)
    if "position_ids" not in names:
        return args, kwargs
    place = names.index("position_ids")
    if place < len(args):
        return (*args[:place], positions_BL, *args[place + 1 :]), kwargs
    return args, {**kwargs, "position_ids": positions_BL}


def _leave(exchange: Exchange, module: nn.Module, args: Any, output: Any) -> None:
    exchange.depth -= 1


def _refuse_whole(exchange: Exchange, module: nn.Module, given: Mapping[str, Any]) -> None:
    """What a forward was given beside tokens that is of the whole row, or of something else than the row."""
    asked = f"parallelism.cp_size={exchange.size}"
    for name, instead in _WHOLE.items():
        if given.get(name) is not None:
            article = "an" if name[0] in "aeiou" else ""
            shown = f"{article} {name.replace('_', ' ')}".strip()
            what, way_out = f"{shown} cannot be split over the sequence", f"{name}=None"
            if name == "attention_mask" and _sees_behind(module):
                instead, way_out = "rows without padding: this model's tokens see those after them", _NO_CP
            raise ConfigError(Problem(what=what, asked=f"{name} with {asked}", allowed=instead, instead=way_out))
    if not hasattr(getattr(module, "config", None), "model_type"):
        return
    for name, value in given.items():
        part_of_row = name in ("logits_to_keep", "num_logits_to_keep") and value
        if isinstance(value, Tensor) and name not in _SPLIT or part_of_row:
            what = f"{type(module).__name__} was given {name}, of which nobody says how to split it over the sequence"
            allowed = f"{', '.join(sorted(_SPLIT))}: this rank's part of each"
            raise ConfigError(Problem(what=what, asked=f"{name} with {asked}", allowed=allowed, instead=_NO_CP))


def _sees_behind(model: nn.Module) -> bool:
    return any(getattr(module, "is_causal", True) is False for module in model.modules())


def _row(exchange: Exchange, tokens: Tensor, positions: Tensor | None) -> Row:
    length = tokens.size(1)
    if positions is None:
        if length not in _split_over.get(exchange.mesh.get_group().group_name, ()):
            raise ConfigError(
                Problem(
                    what="the model was given rows that were not split over the cp ranks",
                    asked=f"model(input_ids) with parallelism.cp_size={exchange.size}",
                    allowed="this rank's part of each row: mesh_context.split_sequence(input_ids, labels)",
                    instead=_NO_CP,
                )
            )
        return Row(length, length * exchange.size - 1)
    if positions.dim() == 1:
        positions = positions.unsqueeze(0)
    if positions.dim() != 2 or positions.size(1) != length:
        what = f"position_ids of shape {tuple(positions.shape)} are not one for each of a rank's {length} tokens"
        raise exchange.refuse(what, f"position_ids of shape [rows, {length}], split like the tokens")
    whole_BS = exchange.whole(positions.expand(tokens.size(0), -1), 1)
    return Row(length, int(whole_BS.max()), Documents.of(whole_BS))


def _depends_on_length(module: nn.Module) -> bool:
    """Whether this is a rotary embedding of transformers whose frequencies depend on how long the rows are."""
    kinds = getattr(module, "rope_type", None)
    names: Iterable[Any] = kinds.values() if isinstance(kinds, Mapping) else [kinds]
    return any(isinstance(name, str) and ("dynamic" in name or name == "longrope") for name in names)


class _OverWholeRow:
    """The forward of such an embedding: it is shown the row's last position beside those of this rank's tokens."""

    def __init__(self, forward: Callable[..., Any], exchange: Exchange) -> None:
        self.forward, self.exchange = forward, exchange

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        row = self.exchange.row
        if self.exchange.on_whole_rows:
            return self.forward(x, position_ids, *args, **kwargs)
        if row is None:
            raise self.exchange.refuse("positions were computed outside of the model's forward", "model(input_ids)")
        last = torch.full_like(position_ids[..., :1], row.last)
        turned = self.forward(x, torch.cat([position_ids, last], -1), *args, **kwargs)
        return tree_map_only(Tensor, lambda angles: angles.narrow(-2, 0, angles.size(-2) - 1), turned)
