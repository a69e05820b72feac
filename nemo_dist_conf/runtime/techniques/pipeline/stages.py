"""A model cut into pipeline stages: which module runs on which stage, and the module that one stage is.

A stage is the whole model in which the modules of other stages are stand-ins that hand their input on, so the model's
own forward runs in every stage, and every parameter keeps its name. That is right only for a model whose forward is
one chain: modules before the blocks, the blocks one after the other, modules after them. A trial without weights makes
sure of it before anything is built: a stage that holds no module at all has to hand its input on untouched.

Shapes: B rows, S tokens, H the width of what stages hand on, V ids of the vocabulary.
"""

from __future__ import annotations

import copy
import inspect
import logging
from dataclasses import dataclass
from typing import Any, Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.model.blocks import Blocks
from nemo_dist_conf.runtime.model.forward_state import generators_kept
from nemo_dist_conf.runtime.model.materialise import tied_names
from nemo_dist_conf.runtime.torch_inside import (
    TorchDispatchMode,
    is_view,
    own_buffers,
    own_children,
    share_parameters,
    storage_id,
    tree_leaves,
    tree_map_only,
    with_own_places,
    writes_into,
)
from nemo_dist_conf.topology.schedule_rules import stage_count
from nemo_dist_conf.topology.stage_layers import spread_layers
from nemo_dist_conf.wording import unknown_name

__all__ = ["Chain", "chain_of", "cut", "plan_stages"]

log = logging.getLogger(__name__)

_ROWS, _TOKENS = 2, 8


@dataclass(frozen=True)
class Chain:
    """A model's modules in the order of its forward, by name.

    width: H. outputs: V, or whatever the model's last dimension is. dtype: of what the first block is given.
    """

    before: tuple[str, ...]
    blocks: tuple[str, ...]
    after: tuple[str, ...]
    width: int
    outputs: int
    dtype: torch.dtype

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.before, *self.blocks, *self.after)


def chain_of(model: nn.Module, blocks: Blocks, pipeline: Mapping[str, Any]) -> Chain:
    """The model's chain, found by running it once on a few tokens, its blocks left out and its other modules on meta.

    Call it before the model is wrapped in any way. Raises ConfigError for a model that is no such chain: blocks used
    twice, or in another order; a module used between them; parameters outside of the modules of the chain; one
    parameter in two modules that may come to lie on different stages. Also where patch_inner_model or
    patch_causal_lm_model of ``pipeline`` is off and the model's forward does not skip modules that are None.
    """
    if not blocks:
        raise _no_chain(model, "it has no repeated layers to split", "blocks= in the model's config, or pp_size=1")
    with generators_kept():
        return _chain_of(_apart(model), blocks, pipeline)


def _apart(model: nn.Module) -> nn.Module:
    """The model with attributes of its own, so that a trial cannot change them, and with the same tensors.

    Parts that have values run as copies on meta, and containers have buffers of their own in a trial (``_copy``).
    """
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, tensors)
    except Exception as error:  # an attribute that cannot be copied: a lock, a process group
        log.info("%s is tried as it is, because it cannot be copied (%s)", type(model).__name__, _first_line(error))
        return model


def _chain_of(model: nn.Module, blocks: Blocks, pipeline: Mapping[str, Any]) -> Chain:
    parts = _parts(model, blocks)
    calls: list[tuple[str, Tensor]] = []

    def observed(name: str, module: nn.Module) -> nn.Module:
        return _Trial(None if name in blocks else module, name, calls)

    whole = _copy(model, parts, observed, trial=True)
    try:
        output = _run(whole, torch.zeros(_ROWS, _TOKENS, dtype=torch.int64), first=True)
    except Exception as error:  # the model's own code, in a way its author never ran it
        raise _no_chain(model, f"its forward does not run without its layers ({_first_line(error)})") from error
    order = [name for name, _ in calls if name in parts]
    run = [name for name in order if name in blocks]
    if run != list(blocks):
        raise _no_chain(model, f"its forward runs the blocks {_short(run)}, not {_short(list(blocks))} once each")
    start, end = order.index(run[0]), order.index(run[-1]) + 1
    if order[start:end] != run:
        between = next(name for name in order[start:end] if name not in blocks)
        raise _no_chain(model, f"{between} runs between its blocks")
    # What handed nothing on that depends on the weights before it (rotary embeddings) is needed by every stage.
    chained = {name for name, out in calls if name in blocks or out.requires_grad}
    before = tuple(name for name in order[:start] if name in chained)
    after = tuple(name for name in order[end:] if name in chained)
    idle = [name for name in parts if name not in order and next(parts[name].parameters(), None) is not None]
    twice = [name for name in (*before, *after, *idle) if order.count(name) != 1]
    if twice:
        raise _no_chain(model, f"its forward runs {twice[0]} {order.count(twice[0])} times")
    if not isinstance(output, Tensor):
        raise _no_chain(model, f"its forward returns {type(output).__name__}, not a tensor or an output with logits")
    handed = dict(calls)[run[0]]
    chain = Chain(before, tuple(run), after, handed.size(-1), output.size(-1), handed.dtype)
    _check_ties(model, chain)
    if pipeline["patch_inner_model"] and pipeline["patch_causal_lm_model"]:
        _check_empty_stage(model, parts, chain, handed, _inner(model, pipeline))
    else:
        _check_own_skips(model, parts, chain, pipeline)
    return chain


def plan_stages(chain: Chain, pipeline: Mapping[str, Any], pp_size: int) -> list[tuple[str, ...]]:
    """The modules of every stage, in order, as ``module_fqns_per_model_part`` or the number of layers say.

    Raises ConfigError where the parts do not hold each module of the chain once, in its order.
    """
    parts = pipeline["module_fqns_per_model_part"]
    if parts is not None:
        return _given(chain, parts)
    stages = stage_count(pipeline, pp_size, len(chain.blocks))
    assert stages is not None
    if stages > len(chain.blocks):
        what = f"{len(chain.blocks)} layers are too few for {stages} pipeline stages"
        asked, fewer = f"parallelism.pp_size={pp_size}", max(1, pp_size * len(chain.blocks) // stages)
        raise ConfigError(
            Problem(what=what, asked=asked, allowed="one layer a stage or more", instead=f"parallelism.pp_size={fewer}")
        )
    weighted = pipeline["layers_per_stage"] is None
    planned, start = [], 0
    for count in spread_layers(len(chain.blocks), stages, weighted):
        planned.append(chain.blocks[start : start + count])
        start += count
    planned[0] = (*chain.before, *planned[0])
    planned[-1] = (*planned[-1], *chain.after)
    return planned


def cut(model: nn.Module, chain: Chain, held: Sequence[str], pipeline: Mapping[str, Any]) -> nn.Module:
    """The stage that holds these modules of the model, the same objects; what is outside of the chain is copied.

    Its forward takes ids [B, S] on the first stage, what the stage before handed on [B, S, H] on any other, and
    returns a tensor. patch_inner_model and patch_causal_lm_model of ``pipeline`` say whether modules of other stages
    are stand-ins, or None for a forward that skips those by itself.
    """
    parts = {name: model.get_submodule(name) for name in chain.names}
    substitute = _substitute(model, pipeline)

    def replaced(name: str, module: nn.Module) -> nn.Module | None:
        return module if name in held else substitute(name, module)

    stage = _copy(model, parts, replaced)
    inner = "" if chain.names[-1] in held else _inner(model, pipeline)
    stage.forward = _Forward(stage, chain.names[0] in held, inner)
    return stage


class _StandIn(nn.Module):
    """Stands where another stage's module is, and hands its first argument on."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        # A decoder may ask its layers what they are (a kind of attention) before it runs them.
        plain = (str, int, float, bool, type(None))
        own = {key: value for key, value in vars(replaced).items() if isinstance(value, plain) and key[0] != "_"}
        self.__dict__.update({key: value for key, value in own.items() if key != "training"})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else next(iter(kwargs.values()))


class _Trial(nn.Module):
    """A module in a trial: notes each call and returns zeros of the shape that the module would return.

    The module itself runs on the meta device; what is around it, masks and positions, on the CPU with real numbers.
    module None: a stand-in.
    """

    def __init__(self, module: nn.Module | None, name: str = "", calls: list[tuple[str, Tensor]] | None = None) -> None:
        super().__init__()
        self.__dict__["trial"] = (module, name, [] if calls is None else calls)
        if module is not None:
            share_parameters(self, module)  # a model may look at the dtype of a weight

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        module, name, calls = self.__dict__["trial"]
        if module is None:
            out = args[0] if args else next(iter(kwargs.values()))
        else:
            twin = module if _on_meta(module) else copy.deepcopy(module).to("meta")
            args, kwargs = tree_map_only(Tensor, _on_meta_like, (args, kwargs))
            with _TensorsElsewhere():
                out = tree_map_only(Tensor, _zeros, twin(*args, **kwargs))
        tensors = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        calls.append((name, tensors[0] if tensors else torch.empty(0)))
        return out


class _TensorsElsewhere(TorchDispatchMode):
    """Lets operators on meta take tensors that are neither parameters nor buffers, and have values, wherever kept."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if len({tensor.is_meta for tensor in given}) > 1:
            args, kwargs = tree_map_only(Tensor, _on_meta_like, (args, kwargs))
        return func(*args, **(kwargs or {}))


def _on_meta_like(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta").requires_grad_(tensor.requires_grad)


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros(like.shape, dtype=like.dtype).requires_grad_(like.requires_grad)


class _Forward:
    """A stage's forward: the model's own, given ids or what the stage before handed on; returns a tensor."""

    def __init__(self, stage: nn.Module, first: bool, inner: str) -> None:
        self.stage, self.first, self.inner = stage, first, inner

    def __call__(self, value: Tensor, **kwargs: Any) -> Tensor:
        output = _run(self.stage, value, self.first, self.inner, **kwargs)
        # torch frees a stage's graph by detaching its output in place, which a view does not allow.
        return output.clone() if is_view(output) else output


def _run(module: nn.Module, value: Tensor, first: bool, inner: str = "", **kwargs: Any) -> Any:
    """The model's own forward on ids or, unless first, on what a stage handed on.

    inner: name of the decoder inside, which is run in the model's place on stages that do not hold the head.
    """
    forward: Callable[..., Any] = type(module).forward.__get__(module)
    if inner:
        forward = module.get_submodule(inner)
    names = inspect.signature(getattr(forward, "forward", forward)).parameters
    if "inputs_embeds" in names:  # transformers
        kwargs["input_ids" if first else "inputs_embeds"] = value
        if "use_cache" in names:
            kwargs["use_cache"] = False
        output = forward(**kwargs)
    else:
        output = forward(value, **kwargs)
    for name in ("logits", "last_hidden_state"):
        output = getattr(output, name, output)
    return output


def _inner(model: nn.Module, pipeline: Mapping[str, Any]) -> str:
    """Name of the decoder that runs in the model's place on stages without the head; "" where the model itself runs."""
    base = getattr(model, "base_model_prefix", "")
    return base if base and hasattr(model, base) and pipeline["patch_causal_lm_model"] else ""


def _parts(model: nn.Module, blocks: Blocks) -> dict[str, nn.Module]:
    """The outermost modules that hold no block, and the blocks, by name. Refuses parameters outside of them."""
    found: dict[str, nn.Module] = {}

    def walk(module: nn.Module, prefix: str) -> None:
        own = [name for name, _ in module.named_parameters(recurse=False)]
        if own:
            raise _no_chain(model, f"the parameter {prefix}{own[0]} stands outside of its layers")
        for name, child in module.named_children():
            path = f"{prefix}{name}"
            if path not in blocks and any(block.startswith(f"{path}.") for block in blocks):
                walk(child, f"{path}.")
            else:
                found[path] = child

    walk(model, "")
    return found


def _copy(
    module: nn.Module,
    parts: Mapping[str, nn.Module],
    replace: Callable[[str, nn.Module], nn.Module | None],
    prefix: str = "",
    trial: bool = False,
) -> nn.Module:
    """The module with each of its parts replaced; containers of parts are copied, hooks and all, helpers whole.

    trial: buffers of the containers are zeros on the CPU.
    """
    copied = with_own_places(module)
    children = own_children(copied)
    if trial:
        buffers = own_buffers(copied)
        buffers.update({key: _zeros(buffer) for key, buffer in buffers.items() if buffer is not None})
    for name, child in children.items():
        path = f"{prefix}{name}"
        if child is None:
            continue
        if path in parts:
            children[name] = replace(path, child)
        elif any(part.startswith(f"{path}.") for part in parts):
            children[name] = _copy(child, parts, replace, f"{path}.", trial)
        else:
            children[name] = copy.deepcopy(child)
    return copied


def _check_ties(model: nn.Module, chain: Chain) -> None:
    owner = {name: part for part in chain.names for name, _ in model.get_submodule(part).named_parameters(part)}
    for group in tied_names(model):
        parts = dict.fromkeys(part for name in group for part in chain.names if name.startswith(f"{part}."))
        if len(parts) > 1 and owner:
            raise ConfigError(
                Problem(
                    what=f"{' and '.join(group)} are one parameter, and a pipeline may hold them on different stages",
                    asked="parallelism.pp_size above 1",
                    allowed="pp_size=1, or a parameter for each",
                    instead="parallelism.pp_size=1",
                )
            )


def _check_empty_stage(
    model: nn.Module, parts: Mapping[str, nn.Module], chain: Chain, handed: Tensor, inner: str
) -> None:
    """That a stage without modules hands its input on: then the model's forward does nothing outside of the chain."""
    extra: list[str] = []

    class Watcher(_StandIn):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            others = tree_leaves((args[1:], kwargs) if args else list(kwargs.values())[1:])
            if any(isinstance(other, Tensor) and other.requires_grad for other in others):
                extra.append(type(model).__name__)
            return super().forward(*args, **kwargs)

    names = set(chain.names)
    empty = _copy(model, parts, lambda name, module: (Watcher if name in names else _Trial)(module), trial=True)
    x_BSH = torch.zeros_like(handed).detach().requires_grad_()
    before = writes_into(x_BSH)
    try:
        output = _run(empty, x_BSH, False, inner)
    except Exception as error:
        raise _no_chain(model, f"its forward does not take what a stage hands on ({_first_line(error)})") from error
    same = isinstance(output, Tensor) and output.shape == x_BSH.shape and writes_into(output) == before
    if not same or storage_id(output) != storage_id(x_BSH):
        raise _no_chain(model, "its forward computes with what the layers hand on outside of them")
    if extra:
        raise _no_chain(model, "its layers are given more of what was computed before than their input")


def _substitute(model: nn.Module, pipeline: Mapping[str, Any]) -> Callable[[str, nn.Module], nn.Module | None]:
    """What stands in place of a module of another stage, by the two switches of ``pipeline``."""
    inner, outer = pipeline["patch_inner_model"], pipeline["patch_causal_lm_model"]
    base = getattr(model, "base_model_prefix", None)
    prefix = f"{base}." if base and hasattr(model, base) else ""
    if not outer and not prefix:
        key = "pipeline.patch_causal_lm_model"
        what = f"{type(model).__name__} has no model inside it, so patch_causal_lm_model means nothing for it"
        raise ConfigError(
            Problem(
                what=what, asked=f"{key}=false", allowed="true; patch_inner_model is its switch", instead=f"{key}=true"
            )
        )
    return lambda name, module: _StandIn(module) if (inner if name.startswith(prefix) else outer) else None


def _check_own_skips(
    model: nn.Module, parts: Mapping[str, nn.Module], chain: Chain, pipeline: Mapping[str, Any]
) -> None:
    """That a forward left as it is skips the modules that are None."""
    substitute = _substitute(model, pipeline)
    names = set(chain.names)
    hollow = _copy(model, parts, lambda n, module: substitute(n, module) if n in names else _Trial(module), trial=True)
    try:
        _run(hollow, torch.zeros(_ROWS, _TOKENS, chain.width, dtype=chain.dtype), False, _inner(model, pipeline))
    except Exception as error:
        off = [f"pipeline.{key}" for key in ("patch_inner_model", "patch_causal_lm_model") if not pipeline[key]]
        what = f"the forward of {type(model).__name__} does not skip modules that are None ({_first_line(error)})"
        asked, true = (" ".join(f"{key}={value}" for key in off) for value in ("false", "true"))
        raise ConfigError(
            Problem(what=what, asked=asked, allowed="true: stand-ins take their place", instead=true)
        ) from error


def _given(chain: Chain, parts: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    key = "pipeline.module_fqns_per_model_part"
    listed = [name for part in parts for name in part]
    problems = []
    unknown = [name for name in listed if name not in chain.names]
    missing = [name for name in chain.names if name not in listed]
    if unknown:
        problems.append(
            unknown_name(
                unknown[0],
                chain.names,
                what=f"{key} names {unknown[0]}, which is not a module of the chain",
                asked=f"{key} with {unknown[0]}",
                allowed=_short(list(chain.names), 12),
                offer=str,
            )
        )
    if missing:
        what = f"{key} leaves out {_short(missing)}"
        problems.append(
            Problem(what=what, asked=f"{key} without {missing[0]}", allowed="every module once", instead=f"{key}=null")
        )
    if not problems and listed != list(chain.names):
        what = f"{key} does not follow the order of the model's forward"
        problems.append(
            Problem(what=what, asked=_short(listed, 12), allowed=_short(list(chain.names), 12), instead=f"{key}=null")
        )
    ConfigError.raise_if(problems)
    return [tuple(part) for part in parts]


def _on_meta(module: nn.Module) -> bool:
    return all(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))


def _no_chain(model: nn.Module, why: str, allowed: str = "") -> ConfigError:
    return ConfigError(
        Problem(
            what=f"{type(model).__name__} cannot be split into pipeline stages: {why}",
            asked="parallelism.pp_size above 1",
            allowed=allowed
            or "a forward of one chain: embedding, blocks, norm and head, each given what the last returned",
            instead="parallelism.pp_size=1",
        )
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '...').splitlines()[0]}"


def _short(names: list[str], count: int = 3) -> str:
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
