"""What torch does not publish and cannot be done without: each with version, reason, and the test that breaks."""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "after_backward",
    "hide_sharding",
    "is_gathered_for_forward",
    "number_of_backward",
    "run_as_forward",
    "what_is_not_reduced",
]


def after_backward(call: Callable[[], None]) -> None:
    """Call something when the backward that runs now has ended; to be asked for from inside of one.

    torch 2.11 to 2.13: hooks are called for a tensor or a node, none for the end; DDP and FSDP2 use the same.
    Test: tests/dist/test_entries.py.
    """
    torch.autograd.Variable._execution_engine.queue_callback(call)


def hide_sharding(module: nn.Module) -> None:
    """Let a module's own code not see that fully_shard manages it.

    torch 2.11 to 2.13 mark modules for their compiler so, and forwards of transformers 5.23 (wav2vec2 and those like
    it) look at the mark and then run layers that they mean to skip.
    Test: tests/conformance/of_kinds.py, wav2vec2_with_layerdrop.
    """
    if getattr(module, "_is_fsdp_managed_module", False):
        module._is_fsdp_managed_module = False  # type: ignore[assignment]


def number_of_backward() -> int:
    """Of the backward that runs now; -1 outside of one.

    torch 2.11 to 2.13: nothing else tells one from the next.
    Test: tests/dist/test_entries.py.
    """
    return torch._C._current_graph_task_id()


def what_is_not_reduced(model: DistributedDataParallel) -> str | None:
    """What torch will say in the next forward where the last backward left gradients not reduced; else None.

    torch 2.11 to 2.13: by then the optimizer has made a step with them.
    Test: tests/dist/test_unused.py.
    """
    try:
        model._check_reducer_finalized()
    except RuntimeError as error:
        return str(error)
    return None


def is_gathered_for_forward(root: nn.Module) -> bool:
    """Whether what FSDP2 does before a root's forward has been done, and what it does after it has not.

    torch 2.11 to 2.13: a forward cannot tell otherwise whether it was called by the module or by itself.
    Test: tests/dist/test_entries.py.
    """
    return root._get_fsdp_state()._training_state.name == "FORWARD"  # type: ignore[operator]


def run_as_forward(root: nn.Module, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Call something between what FSDP2 does before and after a root's forward.

    torch 2.11 to 2.13: register_fsdp_forward_method does this for a method of the root alone, and gathers and frees
    again where that is called from inside of forward.
    Test: tests/dist/test_entries.py.
    """
    state: Any = root._get_fsdp_state()  # type: ignore[operator]
    args, kwargs = state._pre_forward(root, args, kwargs)
    return state._post_forward(root, args, call(*args, **kwargs))
