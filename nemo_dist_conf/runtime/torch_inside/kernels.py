"""What torch does not publish of its kernels and generators."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor

__all__ = [
    "ASKED_VALUE",
    "ATTENTION_IN_STEPS",
    "GROUPED_PRODUCT",
    "flash_backward_on_cpu",
    "flash_on_cpu",
    "generator_of",
    "replace_trunc_normal",
    "saved_by_selection",
]

#: torch 2.11 to 2.13: the kernel that scaled_dot_product_attention runs on a CPU, and its backward. The published
#: function does not give the log-sum-exp, without which attention over some of the keys cannot be added to that over
#: the others. Test: tests/runtime/techniques/test_whole_attention.py.
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FLASH_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


#: The operator by which Python asks a tensor for its value, and the one that multiplies rows with a matrix of their
#: group each, [rows, in] x [groups, in, out]; None in a build without it.
#: torch 2.11 to 2.13: what ``item`` and ``torch.nn.functional.grouped_mm`` run; on meta neither does for all dtypes.
#: Test: tests/plan/test_built.py, test_what_is_kept_is_what_torch_tracks.
ASKED_VALUE: Any = torch.ops.aten._local_scalar_dense.default
GROUPED_PRODUCT: Any = getattr(getattr(torch.ops.aten, "_grouped_mm", None), "default", None)
#: torch 2.11 to 2.13: what scaled_dot_product_attention runs where no fused kernel takes its arguments, as on a CPU
#: with dropout. Test: tests/plan/test_built.py, test_what_drops_out_is_kept_as_torch_tracks.
ATTENTION_IN_STEPS: Any = torch.ops.aten._scaled_dot_product_attention_math


def saved_by_selection() -> frozenset[Any]:
    """The operators of attention and of collectives whose results are dear to recompute; a build may lack some.

    torch 2.11 to 2.13: what scaled_dot_product_attention and functional collectives run; attention on a CPU has one of
    its own. Test: tests/dist/test_fields.py, test_checkpointing_recomputes_blocks_and_selective_keeps_their_matmuls.
    """
    packets = [
        *(
            getattr(torch.ops.aten, f"_scaled_dot_product_{name}", None)
            for name in (
                "efficient_attention",
                "flash_attention",
                "flash_attention_for_cpu",
                "cudnn_attention",
                "attention_math",
            )
        ),
        *(getattr(torch.ops._c10d_functional, name, None) for name in ("reduce_scatter_tensor", "all_to_all_single")),
    ]
    return frozenset(packet.default for packet in packets if packet is not None)


def flash_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor] | None:
    """(attention [B, H, L, D], log-sum-exp [B, H, L]), key heads a divisor of H; None where the kernel does not do it.

    causal: query i sees keys 0 to i. torch 2.11 to 2.13: scaled_dot_product_attention gives no log-sum-exp.
    Test: tests/runtime/techniques/test_whole_attention.py.
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
    """Gradients of query, key and value; out and log_sum are of all keys, also where these are some of them.

    torch 2.11 to 2.13: as ``flash_on_cpu``. Test: tests/runtime/techniques/test_whole_attention.py.
    """
    assert _FLASH_BACKWARD is not None, "flash_on_cpu gave something"
    return _FLASH_BACKWARD(gradient, query, key, value, out, log_sum, 0.0, causal, scale=scale)


def generator_of(device: torch.device) -> torch.Generator:
    """The device's default generator.

    torch 2.11 to 2.13: torch.manual_seed would also queue a seed, and a stack trace, for each kind of device to come.
    Test: tests/runtime/model/test_materialise.py, test_the_global_random_state_is_neither_read_nor_moved.
    """
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[device.index or 0]


def replace_trunc_normal(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What nn.init.trunc_normal_ calls, now; it becomes the function.

    torch 2.13 looks at what it drew and draws again, which takes values, and on meta it draws nothing.
    Test: tests/runtime/model/test_recorder.py, test_the_tape_is_what_the_constructor_did.
    """
    init: Any = torch.nn.init
    before, init._no_grad_trunc_normal_ = init._no_grad_trunc_normal_, function
    return before
