"""The only module that touches what torch and transformers do not publish: each touch with version, reason and test."""

from __future__ import annotations

import inspect
from typing import Any, Callable

import torch
from torch import Tensor

__all__ = ["flash_backward_on_cpu", "flash_on_cpu", "maker_of_mask"]

#: torch 2.11 to 2.13: the kernel that scaled_dot_product_attention runs on a CPU, and its backward. The published
#: function does not give the log-sum-exp, without which attention over some of the keys cannot be added to that over
#: the others. Test: tests/runtime/test_whole_attention.py.
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FLASH_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def flash_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor] | None:
    """(attention [B, H, L, D], log-sum-exp [B, H, L]), key heads a divisor of H; None where the kernel does not do it.

    causal: query i sees keys 0 to i.
    """
    if _FLASH is None or _FLASH_BACKWARD is None or not query.size(-1) == key.size(-1) == value.size(-1):
        return None
    return _FLASH(query, key, value, 0.0, causal, scale=scale)


def flash_backward_on_cpu(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    log_sum: Tensor,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value; out and log_sum are of all keys, also where these are some of them."""
    assert _FLASH_BACKWARD is not None, "flash_on_cpu gave something"
    return _FLASH_BACKWARD(gradient, query, key, value, out, log_sum, 0.0, causal, scale=scale)


def maker_of_mask(function: Callable[..., Any]) -> tuple[str, dict[str, Any]] | None:
    """(name, values) of the function of transformers that made a mask function, and what it made it of; None: another.

    transformers 5.23 hands mask functions of (batch, head, query, key) to the registered mask interface; what they are
    (causal, a window of so many keys) is in the closure that masking_utils makes them with, and nowhere else. One that
    is not recognised is evaluated block by block, which is as right and slower. Test: tests/runtime/test_mask_rules.py.
    """
    if getattr(function, "__module__", None) != "transformers.masking_utils":
        return None
    name = getattr(function, "__qualname__", "").partition(".")[0]
    return name, dict(inspect.getclosurevars(function).nonlocals)
