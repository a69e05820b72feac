"""What torch does not publish of modules: their own dictionaries and what lies in them."""

from __future__ import annotations

import copy
from typing import Any, Callable

from torch import Tensor, nn

__all__ = [
    "hide_sharding",
    "is_hooked",
    "is_made",
    "own_buffers",
    "own_children",
    "own_parameters",
    "replace_tensors",
    "with_own_places",
]


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """A module's own parameters by name, None among them: the dictionary that its forward reads, to change.

    torch 2.11 to 2.13: ``register_parameter`` and setattr take nothing but an nn.Parameter where one was, ask the
    module's own ``__setattr__``, and cost several times as much in every forward; ``named_parameters`` leaves out None.
    Test: tests/dist/test_tensor_parallel.py, test_training_equals_one_process.
    """
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Any]:
    """A module's own buffers by name, None among them: the dictionary that its forward reads, to change.

    torch 2.11 to 2.13: as parameters. Test: tests/runtime/model/test_recorder.py, test_a_table_of_others_stays_theirs.
    """
    return module._buffers


def own_children(module: nn.Module) -> dict[str, Any]:
    """A module's children by name, None among them: the dictionary that its forward reads, to change.

    torch 2.11 to 2.13: ``named_children`` leaves out None, and a child under two names the second time; an attribute of
    a wrapper (``model.module`` of DDP) may be asked for by somebody who watches.
    Test: tests/runtime/techniques/pipeline/test_stages.py, test_stages_in_a_row_compute_what_the_model_does.
    """
    return module._modules


def is_made(module: nn.Module) -> bool:
    """Whether nn.Module's own constructor has run for a module; before, every attribute is asked for in vain.

    torch 2.11 to 2.13: a wrapper's ``__getattr__`` is asked before, by its own constructor and by copy and pickle.
    Test: tests/dist/test_unused.py.
    """
    return "_modules" in vars(module)


def with_own_places(module: nn.Module) -> nn.Module:
    """A copy of a module that shares parameters, buffers, children and hooks, and where each can be replaced.

    torch 2.11 to 2.13: copy.copy shares the dictionaries as well, copy.deepcopy nothing.
    Test: tests/runtime/techniques/pipeline/test_stages.py, test_a_hook_of_one_stage_is_not_one_of_another.
    """
    copied = copy.copy(module)
    for key, value in list(vars(copied).items()):
        if key.startswith("_") and isinstance(value, dict):
            copied.__dict__[key] = copy.copy(value)
    return copied


def is_hooked(module: nn.Module) -> bool:
    """Whether a hook runs before or after a module's forward.

    torch 2.11 to 2.13: hooks are added and taken away, nothing tells of them.
    Test: tests/dist/test_context_parallel.py,
    test_an_attention_of_the_user_s_own_in_a_known_model_is_not_replaced_by_another.
    """
    return bool(module._forward_hooks or module._forward_pre_hooks)


def replace_tensors(model: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    """Put what a function gives for each parameter and buffer in its place, as ``Module.to`` does.

    torch 2.11 to 2.13: ``to``, ``to_empty`` and ``cuda`` have functions of their own.
    Test: tests/runtime/model/test_materialise.py, test_shards_may_be_uneven_or_empty.
    """
    model._apply(function)


def hide_sharding(module: nn.Module) -> None:
    """Let a module's own code not see that fully_shard manages it.

    torch 2.11 to 2.13 mark modules for their compiler so, and forwards of transformers 5.23 (wav2vec2 and those like
    it) look at the mark and then run layers that they mean to skip.
    Test: tests/conformance/of_kinds.py, wav2vec2_with_layerdrop.
    """
    if getattr(module, "_is_fsdp_managed_module", False):
        module._is_fsdp_managed_module = False  # type: ignore[assignment]
