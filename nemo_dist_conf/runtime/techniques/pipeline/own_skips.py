"""Stages of a model that is written to be split: its forward skips modules that are None, and takes hidden states in
place of ids.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any, Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.model.trial import first_line
from nemo_dist_conf.runtime.techniques.pipeline.flow import Flow, Placed
from nemo_dist_conf.runtime.techniques.pipeline.parts import copied
from nemo_dist_conf.runtime.torch_inside import is_view

__all__ = ["OwnSkips", "check_own_skips", "cut_as_it_skips"]


class OwnSkips:
    """A stage's forward: the model's own, given ids or what the stage before handed on; returns a tensor."""

    def __init__(self, stage: nn.Module, first: bool, inner: str) -> None:
        """inner: name of the decoder inside, which runs in the model's place on stages that do not hold the head."""
        self.stage, self.first, self.inner = stage, first, inner
        #: dtype of what is handed on, which the strategy casts.
        self.sent: torch.dtype | None = None

    def __call__(self, ids: Tensor, received: tuple[Tensor, ...] = (), **kwargs: Any) -> Any:
        output = _run(self.stage, ids if self.first else received[0], self.first, self.inner, **kwargs)
        return output.clone() if is_view(output) else output

    def watch(self, is_compiled: bool = False) -> None:
        """Nothing is to be noted of what parts return."""


def check_own_skips(
    model: nn.Module,
    parts: Mapping[str, nn.Module],
    names: Collection[str],
    flow: Flow,
    others: Callable[[str, nn.Module], nn.Module],
    pipeline: Mapping[str, Any],
) -> None:
    """That a forward left as it is skips the modules that are None.

    names: modules that lie on one stage. others: what the rest are in the trial. Raises ConfigError where it does not.
    """
    substitute = _substitute(model, pipeline)
    hollow = copied(model, parts, lambda name, one: (substitute if name in names else others)(name, one), trial=True)
    shape = next(call.leaves[0] for call in flow.calls if call.depends)
    try:
        value = torch.zeros(shape.of(2, 8), dtype=shape.dtype)
        _run(hollow, value, False, _inner(model, pipeline))
    except Exception as error:
        raise _does_not(model, pipeline, first_line(error)) from error


def cut_as_it_skips(
    model: nn.Module, parts: Mapping[str, nn.Module], placed: Placed, stage: int, pipeline: Mapping[str, Any]
) -> tuple[nn.Module, OwnSkips]:
    """The stage, and its forward. Raises ConfigError where stages hand on more than one tensor."""
    if any(len(values) != 1 for values in placed.handed):
        raise _does_not(model, pipeline, "its stages hand on several tensors")
    substitute = _substitute(model, pipeline)
    homeless = {name for name in parts if not any(name in held for held in placed.parts)}

    def replaced(name: str, module: nn.Module) -> nn.Module | None:
        if name in homeless:
            return copy.deepcopy(module)
        return module if name in placed.parts[stage] else substitute(name, module)

    built = copied(model, parts, replaced)
    is_last = stage == len(placed.parts) - 1
    forward = OwnSkips(built, stage == 0, "" if is_last else _inner(model, pipeline))
    built.forward = forward
    return built, forward


class _PassesOn(nn.Module):
    """Stands where another stage's module is, and hands its first argument on."""

    def __init__(self, replaced: nn.Module) -> None:
        super().__init__()
        # A decoder may ask its layers what they are (a kind of attention) before it runs them.
        plain = (str, int, float, bool, type(None))
        own = {key: value for key, value in vars(replaced).items() if isinstance(value, plain) and key[0] != "_"}
        self.__dict__.update({key: value for key, value in own.items() if key != "training"})

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if args else next(iter(kwargs.values()))


def _run(module: nn.Module, value: Tensor, first: bool, inner: str = "", **kwargs: Any) -> Any:
    """The model's own forward on ids or, unless first, on what a stage handed on."""
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
    return lambda name, module: _PassesOn(module) if (inner if name.startswith(prefix) else outer) else None


def _does_not(model: nn.Module, pipeline: Mapping[str, Any], why: str) -> ConfigError:
    off = [f"pipeline.{key}" for key in ("patch_inner_model", "patch_causal_lm_model") if not pipeline[key]]
    what = f"the forward of {type(model).__name__} does not skip modules that are None ({why})"
    asked, true = (" ".join(f"{key}={value}" for key in off) for value in ("false", "true"))
    return ConfigError(Problem(what=what, asked=asked, allowed="true: stand-ins take their place", instead=true))
