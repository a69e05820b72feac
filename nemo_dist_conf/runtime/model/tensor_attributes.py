"""Tensors that modules keep beside their parameters and buffers, under a policy that computes in another dtype."""

from __future__ import annotations

import logging
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from nemo_dist_conf.runtime.torch_inside import tree_iter

__all__ = ["cast_beside_attributes", "tensors_beside"]

log = logging.getLogger(__name__)

#: Modules that take inputs in the dtype of their weight only.
_STRICT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def cast_beside_attributes(model: nn.Module, dtype: torch.dtype) -> None:
    """Let layers that compute in ``dtype`` take inputs in another one, where the model keeps tensors in another one.

    FSDP2 casts parameters, and the inputs of its units. A table of slopes that is kept as an attribute stays in
    float32, what is computed with it is float32 again, and a layer inside the same unit would refuse that.
    """
    names = [name for name, _, _, t in tensors_beside(model) if t.is_floating_point() and t.dtype != dtype]
    if not names:
        return
    for module in model.modules():
        if isinstance(module, _STRICT):
            module.register_forward_pre_hook(_cast)
    kind, shown = type(model).__name__, ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    log.info("%s keeps tensors that are no parameters: they stay as they are (%s)", kind, shown)


def tensors_beside(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, Tensor]]:
    """Tensors that modules keep as attributes, or in lists and the like: (name, module, attribute, tensor)."""
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key[:1] == "_" and isinstance(value, dict):  # parameters, buffers, modules and hooks
                continue
            if value is None or isinstance(value, (bool, int, float, str, nn.Module)):
                continue
            for number, leaf in enumerate(tree_iter(value)):
                if isinstance(leaf, Tensor):
                    place = key if leaf is value else f"{key}/{number}"
                    yield f"{path}.{place}".removeprefix("."), module, key, leaf


def _cast(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = module.weight.dtype
    return tuple(
        arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != dtype else arg
        for arg in args
    )
