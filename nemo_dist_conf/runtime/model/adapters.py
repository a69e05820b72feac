"""Adapters of peft in a model's layers: where they go, how they start, and what the base's tensors are called then.

Layers are replaced inside of the model, which stays of its own class, with its own names, plans and blocks; no
PeftModel is put around it. Everything but the adapters, and modules that are trained in full, is frozen in its dtype.

    adapted(model, Adapter("lora", rank=8, alpha=16, targets=("q_proj", "v_proj")), seed)
"""

from __future__ import annotations

import hashlib
import re
import sys
import warnings
from dataclasses import dataclass
from typing import Any, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.families.styles import match_end
from nemo_dist_conf.names import nearest
from nemo_dist_conf.runtime.model.shard_boxes import local_part, local_values
from nemo_dist_conf.runtime.torch_inside import generator_of, why_not_adapted
from nemo_dist_conf.runtime.typed_values import lower_dtype
from nemo_dist_conf.schema.adapter import ALL_LINEAR, patterns_of
from nemo_dist_conf.wording import assigned

__all__ = [
    "Adapter",
    "adapted",
    "adapter_of",
    "base_name",
    "base_state",
    "is_adapted",
    "set_magnitudes",
]

#: What peft calls an adapter that has no name.
_NAME = "default"
#: Parts of names under which a layer of peft keeps what is its own.
_OWN = frozenset({"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"})
#: Parts of names that peft puts between a layer and what it was.
_AROUND = frozenset({"base_layer", "original_module"})


@dataclass(frozen=True)
class Adapter:
    """Which adapter, and where.

    kind: "lora", or "dora", which trains the length of each row of a weight as well. alpha: what an adapter adds is
    scaled by alpha / rank. dropout: of an adapter's input, in training. targets: patterns of the layers that get one; a
    pattern means every layer whose name ends in it, part by part, ``*`` within a part; "all-linear": every linear layer
    but the output head. full: patterns of modules that are trained as they are, in their dtype. dtype: of the
    adapter.
    """

    kind: str
    rank: int
    alpha: float
    targets: tuple[str, ...]
    dropout: float = 0.0
    full: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32


def adapter_of(values: Mapping[str, Any]) -> Adapter | None:
    """What the group ``adapter`` asks for, its checked values by field; None for none."""
    if values["kind"] == "none":
        return None
    dtype: Any = lower_dtype(values["dtype"])
    targets, full = patterns_of(values["targets"]), patterns_of(values["modules_to_save"])
    return Adapter(values["kind"], values["rank"], values["alpha"], targets, values["dropout"], full, dtype)


def adapted(model: nn.Module, adapter: Adapter, seed: int | None = None) -> nn.Module:
    """The model with the adapter in its layers; changed in place.

    What an adapter begins with depends on the seed and its name alone: A is drawn as peft draws it, B is zero, so that
    the model computes what it did. seed None: torch's generators are taken as they are, as while a model is recorded.
    Raises ConfigError for patterns that match nothing, and for what peft does not adapt.
    """
    import peft

    if is_adapted(model):
        raise _adapted_already(model)
    names, modules = _chosen(model, adapter), _in_full(model, adapter)
    config = peft.LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]  # a whole number in its type, any number in its code
        lora_dropout=adapter.dropout,
        use_dora=adapter.kind == "dora",
        target_modules=_expression(model, names),
        modules_to_save=modules or None,
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "fan_in_fan_out is set to False")  # it sets that right, for Conv1D
        try:
            peft.get_peft_model(model, config, adapter_name=_NAME, autocast_adapter_dtype=False)
        except (ValueError, NotImplementedError) as error:
            raise _not_adapted(adapter, error) from error
    _check_chosen(model, adapter, names)
    for name, parameter in model.named_parameters():
        if base_name(name) is None and parameter.dtype != adapter.dtype:
            parameter.data = parameter.data.to(adapter.dtype)
    _reset(model, seed)
    set_magnitudes(model)
    return model


def _reset(model: nn.Module, seed: int | None) -> None:
    """The start of every adapter; as it is played back for a model that was recorded (recording/playback.py)."""
    devices = [torch.cuda.current_device()] if seed is not None and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices, enabled=seed is not None):
        for name, layer in _layers(model):
            if seed is not None:
                drawn = _drawn(name, layer)
                digest = hashlib.sha256(f"{seed}/{drawn}/0".encode()).digest()
                device = layer.get_base_layer().weight.device
                generator_of(device).manual_seed(int.from_bytes(digest[:7], "big"))
            layer.reset_lora_parameters(_NAME, True)


def _drawn(name: str, layer: Any) -> str:
    """The name of the matrix of a layer's adapter that is not zero at the start."""
    return f"{name}.lora_A.{_NAME}.weight" if _NAME in layer.lora_A else f"{name}.lora_embedding_B.{_NAME}"


def set_magnitudes(model: nn.Module) -> None:
    """Let DoRA's magnitudes be the lengths of the rows of the weights as they are now, sharded or not.

    Computed as its forward computes them, so that their quotient is 1 and the model computes what its base does. A
    weight that lies in parts is gathered, one after the other; every rank of the model, or of a stage, calls it.
    """
    with torch.no_grad():
        for _, layer in _layers(model):
            for name in layer.lora_magnitude_vector:
                magnitude = layer.lora_magnitude_vector[name]
                base = layer.get_base_layer()
                target = magnitude.weight
                weight = _whole(base.weight).to(target.dtype)
                rows = weight.shape if not magnitude.fan_in_fan_out else weight.shape[::-1]
                nothing = torch.zeros(rows[1], rows[0], dtype=weight.dtype, device=weight.device).T
                length = magnitude.get_weight_norm(weight, nothing, layer.scaling[name])
                if isinstance(target, DTensor):
                    local_values(target).copy_(local_part(length, target))
                else:
                    target.copy_(length)


def _whole(weight: Tensor) -> Tensor:
    if not isinstance(weight, DTensor):
        return weight
    moved: Any = weight.detach().to(weight.device_mesh.device_type)  # offloaded, it rests on the CPU
    return moved.full_tensor()


# Which layers.


def is_adapted(model: nn.Module) -> bool:
    """Whether layers of a model are those of peft."""
    return next(_layers(model), None) is not None


def _layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, layer) of those of peft's LoRA and DoRA; peft is not imported where nobody has."""
    known: Any = sys.modules.get("peft.tuners.lora")
    if known is not None:
        yield from ((name, module) for name, module in model.named_modules() if isinstance(module, known.LoraLayer))


def _chosen(model: nn.Module, adapter: Adapter) -> list[str]:
    """Names of the layers that get an adapter."""
    modules = {name: module for name, module in model.named_modules() if name}
    linear = _linear(model)
    found: dict[str, None] = {}
    problems = []
    for pattern in adapter.targets:
        names = linear if pattern == ALL_LINEAR else [name for name in modules if match_end(pattern, name)]
        if not names:
            near = nearest(pattern, sorted({name.rpartition(".")[2] for name in linear})) or [ALL_LINEAR]
            what = f"adapter.targets: no module of {type(model).__name__} has a name that ends in {pattern}"
            asked = assigned("adapter.targets", [pattern])
            allowed = ", ".join(dict.fromkeys([*near, ALL_LINEAR]))
            problems.append(
                Problem(what=what, asked=asked, allowed=allowed, instead=assigned("adapter.targets", near[:1]))
            )
        found |= dict.fromkeys(names)
    for name in found:
        why = why_not_adapted(model, name)
        if why:
            rest = sorted({other.rpartition(".")[2] for other in linear})
            problems.append(
                Problem(
                    what=f"adapter.targets: {name} takes no adapter: {why}",
                    asked=assigned("adapter.targets", list(adapter.targets)),
                    allowed=", ".join(rest) or "layers that peft adapts",
                    instead=assigned("adapter.targets", rest[:1] or [ALL_LINEAR]),
                )
            )
            break
    ConfigError.raise_if(problems)
    return list(found)


def _linear(model: nn.Module) -> list[str]:
    """Names of all linear layers but the output head, and but those that peft refuses in this family."""
    from transformers.pytorch_utils import Conv1D

    head = None
    if hasattr(model, "get_output_embeddings"):
        try:
            head = model.get_output_embeddings()  # type: ignore[operator]
        except (AttributeError, NotImplementedError):
            head = None
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head and not why_not_adapted(model, name)
    ]


def _check_chosen(model: nn.Module, adapter: Adapter, names: list[str]) -> None:
    """That peft has replaced these layers and no others: it takes a name for the end of a longer one."""
    others = sorted({name for name, _ in _layers(model)} ^ set(names))
    if others:
        what = f"peft does not tell {others[0]} from what adapter.targets means"
        asked = assigned("adapter.targets", list(adapter.targets))
        raise ConfigError(
            Problem(
                what=what,
                asked=asked,
                allowed=f"{ALL_LINEAR}, or patterns that mean {others[0]} as well",
                instead=assigned("adapter.targets", [ALL_LINEAR]),
            )
        )


def _in_full(model: nn.Module, adapter: Adapter) -> list[str]:
    """Names of the modules that are trained as they are."""
    names = [name for name, _ in model.named_modules() if name]
    found: dict[str, None] = {}
    for pattern in adapter.full:
        matched = [name for name in names if match_end(pattern, name)]
        if not matched:
            near = nearest(pattern, sorted({name.rpartition(".")[2] for name in names}))
            what = f"adapter.modules_to_save: no module of {type(model).__name__} has a name that ends in {pattern}"
            asked, instead = (assigned("adapter.modules_to_save", words) for words in ([pattern], near[:1]))
            allowed = ", ".join(near) or "names from model.named_modules()"
            raise ConfigError(Problem(what=what, asked=asked, allowed=allowed, instead=instead))
        found |= dict.fromkeys(matched)
    return list(found)


def _expression(model: nn.Module, names: list[str]) -> str | list[str]:
    """These names and none of the others, as peft reads it: an expression with any number for one, or a list.

    Of a model whose experts are one parameter peft turns an expression into the last parts of names.
    """
    if any(parameter.dim() == 3 for parameter in model.parameters()):
        return names
    short = "|".join(dict.fromkeys(_in_all_layers(name) for name in names))
    if {name for name, _ in model.named_modules() if re.fullmatch(short, name)} == set(names):
        return short
    return "|".join(map(re.escape, names))


def _in_all_layers(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


def _adapted_already(model: nn.Module) -> ConfigError:
    return ConfigError(
        Problem(
            what=f"the given {type(model).__name__} has adapters of peft in its layers already",
            asked="adapter=lora or dora",
            allowed="adapter=none, which trains those that it has; or a model without",
            instead="adapter=none",
        )
    )


def _not_adapted(adapter: Adapter, error: Exception) -> ConfigError:
    said = (str(error).strip() or type(error).__name__).splitlines()[0]
    return ConfigError(
        Problem(
            what=f"peft does not adapt these layers: {said}",
            asked=assigned("adapter.targets", list(adapter.targets)),
            allowed=f"{ALL_LINEAR}, names of linear layers, embeddings and convolutions",
            instead=assigned("adapter.targets", [ALL_LINEAR]),
        )
    )


# What the base's tensors are called.


def base_name(name: str) -> str | None:
    """What a tensor of an adapted model is called in its base; None for one of an adapter."""
    parts: list[str] = []
    held = iter(name.split("."))
    for part in held:
        if part in _OWN:
            return None
        if part == "modules_to_save":
            next(held, None)  # the adapter's name
        elif part not in _AROUND:
            parts.append(part)
    return ".".join(parts)


def base_state(model: nn.Module, state: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The tensors of a model's state by their names in its base, of one that is trained in full the copy as well.

    Those of adapters are left out. state: by name in the model, which may be a stage.
    """
    if not is_adapted(model):
        return {name: [value] for name, value in state.items()}
    found: dict[str, list[Any]] = {}
    for name, value in state.items():
        base = base_name(name)
        if base is not None:
            found.setdefault(base, []).append(value)
    return found
