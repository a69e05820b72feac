"""What people keep beside a model: averaged weights, further models and optimizers, under any layout."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_dist_conf.checkpoint import load, save
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.runtime.ema import EMA
from nemo_dist_conf.runtime.engines.base import engine_of, unwrapped
from nemo_dist_conf.runtime.engines.megatron_fsdp import MegatronFSDPEngine
from nemo_dist_conf.runtime.model.shard_boxes import local_values
from tests.checkpoint.exchange import CP, FSDP2, MEGATRON, PP, TP, Layout
from tests.dist.cuda_shim import cuda_shim
from tests.dist.layouts import LLAMA, composed

__all__ = ["BESIDE", "Ema", "LAYOUTS", "difference", "go_on", "save_beside"]

_MODEL: dict[str, Any] = {"config": {**LLAMA, "vocab_size": 98, "hidden_size": 48, "num_hidden_layers": 2}}
#: An odd vocabulary and rows that four ranks cannot share equally, but for a library that has to.
_ODD: dict[str, Any] = {"config": {**_MODEL["config"], "vocab_size": 97}}

LAYOUTS: dict[str, Layout] = {
    "1 rank": Layout(1, FSDP2, _ODD),
    "ddp 2": Layout(2, ("strategy=ddp",), _ODD),
    "fsdp2 2": Layout(2, (*FSDP2, "activation_checkpointing=true"), _ODD),
    "tp 2": Layout(2, (*FSDP2, TP), _ODD),
    "pp 2": Layout(2, (*FSDP2, PP, "pipeline.pp_batch_size=8"), _ODD),
    "megatron zero 3, 2 ranks": Layout(2, MEGATRON, _ODD),
    "fsdp2 4": Layout(4, FSDP2, _ODD),
    "tp 2 x dp 2": Layout(4, (*FSDP2, TP), _ODD),
    "pp 2 x dp 2": Layout(4, (*FSDP2, PP, "pipeline.pp_batch_size=8"), _ODD),
    "cp 2 x dp 2": Layout(4, (*FSDP2, CP), _ODD),
}


class Ema:
    """Averaged weights as people write them: copies of the parameters, by name."""

    def __init__(self, model: nn.Module, factor: float = 1.0) -> None:
        if MegatronFSDPEngine.owns(model):
            engine_of(model).show_shards(model)
        self.decay = 0.99
        self.copies: dict[str, Any] = {name: p.detach().clone() * factor for name, p in model.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        return {"decay": self.decay, "copies": self.copies}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["copies"].keys() == self.copies.keys()
        self.decay = state["decay"]
        for name, value in state["copies"].items():
            self.copies[name].copy_(value)


class List(Ema):
    """The same as a list, in the order of the parameters; of those of one shape, and as careless as people are."""

    def __init__(self, model: nn.Module, factor: float) -> None:
        super().__init__(model, factor)
        self.copies: dict[str, Any] = {
            name: copy for name, copy in self.copies.items() if name.endswith("layernorm.weight")
        }

    def state_dict(self) -> Any:
        return list(self.copies.values())

    def load_state_dict(self, state: Any) -> None:
        for mine, value in zip(self.copies.values(), state):
            mine.copy_(value)


def named_parameters(model: Any) -> Iterator[tuple[str, nn.Parameter]]:
    yield from (model if hasattr(model, "pp_mesh") else unwrapped(model)).named_parameters()


def made(layout: Layout, seed: int) -> tuple[Any, Any]:
    """(model, optimizer) of a layout, the optimizer after a step in which each gradient is half its parameter."""
    cfg = composed(*layout.words, model=layout.model, optimizer={"name": "adamw", "lr": 0.1}, seed=seed)
    _, model, updates = instantiate(cfg)
    if MegatronFSDPEngine.owns(model):
        engine_of(model).show_shards(model)
    for _, parameter in named_parameters(model):
        if not isinstance(parameter, DTensor) or parameter._local_tensor.numel():
            parameter.grad = parameter.detach() * 0.5
    updates.step()
    updates.zero_grad()
    return model, updates


@contextlib.contextmanager
def two(layout: Layout, seed: int) -> Iterator[tuple[Any, Any, Any, Any]]:
    """A model, its optimizer, and a second one of each."""
    with cuda_shim() if layout.is_megatron else contextlib.nullcontext():
        yield *made(layout, seed), *made(layout, seed + 1)


def _averages(model: nn.Module) -> EMA:
    """After an update with weights that are others."""
    ema = EMA(model, decay=None)
    with torch.no_grad():
        for _, parameter in named_parameters(model):
            local_values(parameter).mul_(0.5)
        ema.update()
        for _, parameter in named_parameters(model):
            local_values(parameter).mul_(2.0)
    return ema


#: name -> (model, optimizer, second model, its optimizer) -> objects
BESIDE: dict[str, Any] = {
    "averaged weights by name": lambda m, o, second, its: {"ema": Ema(m, 0.5)},
    "the package's EMA": lambda m, o, second, its: {"ema": _averages(m)},
    "averaged weights in a list": lambda m, o, second, its: {"ema": List(m, 0.5)},
    "a second model and its optimizer": lambda m, o, second, its: {"critic": second, "its optimizer": its},
    "a second optimizer alone": lambda m, o, second, its: {"its.optimizer": its},
}


def save_beside(layout: Layout, target: Path) -> dict[str, dict[str, Tensor] | Exception]:
    """Save every kind to a folder of its own in ``target``; what was in it, whole, or why it was not, on rank 0."""
    found: dict[str, dict[str, Tensor] | Exception] = {}
    with two(layout, 1) as (model, optimizer, second, its):
        for kind, make in BESIDE.items():
            objects = make(model, optimizer, second, its)
            try:
                save(target / kind, model, optimizer, objects=objects)
                found[kind] = whole(objects, second)
            except ConfigError as refusal:
                found[kind] = refusal
    return found


def go_on(layout: Layout, sources: list[tuple[Path, str]]) -> list[dict[str, Tensor] | Exception]:
    """Load checkpoints of a kind into a run that stands elsewhere; what its objects hold then, or why they do not."""
    found: list[dict[str, Tensor] | Exception] = []
    with two(layout, 3) as (model, optimizer, second, its):
        for source, kind in sources:
            objects = BESIDE[kind](model, optimizer, second, its)
            try:
                load(source / kind, model, optimizer, objects=objects)
                found.append(whole(objects, second))
            except ConfigError as refusal:
                found.append(refusal)
    return found


def whole(objects: dict[str, Any], second: Any) -> dict[str, Tensor]:
    """All numbers of objects in full, put together by torch's own means, not by what is tested; on rank 0."""
    found: dict[str, Tensor] = {}
    names = {_plain(name): parameter for name, parameter in named_parameters(second)}
    for name, value in objects.items():
        if isinstance(value, (Ema, EMA)):
            held = value.copies if isinstance(value, Ema) else value.state_dict()["averages"]
            copies = {_plain(key): copy for key, copy in held.items()}
            found |= {f"{name}: {key}": _full(copy, key, names) for key, copy in copies.items()}
        elif isinstance(value, nn.Module):
            found |= {f"{name}: {key}": _full(p, key, names) for key, p in names.items()}
        else:
            for key, parameter in names.items():
                for of_state in ("exp_avg", "exp_avg_sq"):
                    local = value.state.get(parameter, {}).get(of_state)
                    local = torch.zeros_like(parameter) if local is None else local
                    found[f"{name}: {key}/{of_state}"] = _full(local, key, names)
            found[f"{name}: lr"] = torch.tensor(value.param_groups[0]["lr"])
    if hasattr(second, "pp_mesh"):
        everywhere: list[Any] = [None] * second.pp_mesh.size()
        dist.all_gather_object(everywhere, found, group=second.pp_mesh.get_group())
        found = {name: tensor for rank in everywhere for name, tensor in rank.items()}
    return found if dist.get_rank() == 0 else {}


def _plain(name: str) -> str:
    return name.removeprefix("module.").replace("_checkpoint_wrapped_module.", "")


def _full(value: Tensor, name: str, parameters: dict[str, Any]) -> Tensor:
    if not isinstance(value, DTensor):
        return value.detach().clone()
    told = getattr(parameters[name]._local_tensor, "__create_chunk_list__", None)
    if told is None:
        return value.full_tensor().detach().clone()
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (tuple(told()[0].offsets), value._local_tensor.detach().clone()))
    full = torch.full(value.shape, torch.nan)
    for offsets, part in everywhere:
        full[tuple(slice(begin, begin + size) for begin, size in zip(offsets, part.shape))] = part
    return full


def difference(saved: dict[str, Tensor], loaded: dict[str, Tensor]) -> float:
    """The largest, over all numbers; infinite where something is missing."""
    if saved.keys() != loaded.keys() or not saved:
        return float("inf")
    return max(float((saved[name] - loaded[name]).abs().max()) for name in saved)
