"""Tensors that modules keep beside their parameters and buffers, under a policy that computes in another dtype."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

__all__ = ["cast_beside_attributes"]

log = logging.getLogger(__name__)

#: Modules that take inputs in the dtype of their weight only.
_STRICT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def cast_beside_attributes(model: nn.Module, dtype: torch.dtype) -> None:
    """Let layers that compute in ``dtype`` take inputs in another one, where the model keeps tensors in another one.

    FSDP2 casts parameters, and the inputs of its units. A table of slopes that is kept as an attribute stays in
    float32, what is computed with it is float32 again, and a layer inside the same unit would refuse that.
    """
    names = [name for name, module in model.named_modules() if _keeps_floats(module, dtype)]
    if not names:
        return
    for module in model.modules():
        if isinstance(module, _STRICT):
            module.register_forward_pre_hook(_cast)
    kind, shown = type(model).__name__, ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    log.info("%s keeps tensors that are no parameters: they stay as they are (%s)", kind, shown.strip() or kind)


def _keeps_floats(module: nn.Module, dtype: torch.dtype) -> bool:
    own = [value for key, value in vars(module).items() if key[:1] != "_"]  # what torch keeps itself begins with one
    tensors = [leaf for leaf in tree_iter(own) if isinstance(leaf, Tensor)]
    return any(tensor.is_floating_point() and tensor.dtype != dtype for tensor in tensors)


def _cast(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    dtype = module.weight.dtype
    return tuple(
        arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() and arg.dtype != dtype else arg
        for arg in args
    )
