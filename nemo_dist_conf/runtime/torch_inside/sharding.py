"""What torch does not publish of its wrappers, FSDP2 and DDP, and of what it warns of."""

from __future__ import annotations

import warnings
from typing import Any, Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.utils import _to_kwargs
from torch.nn.parallel import DistributedDataParallel

__all__ = [
    "before_backward",
    "expect_views",
    "given_parameters",
    "is_as_sharded",
    "is_gathered_for_forward",
    "no_word_of_one_process",
    "on_device",
    "replaced_parameter",
    "run_as_forward",
    "send_in_buckets",
    "what_is_not_reduced",
    "written_parameters",
]


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


def on_device(args: tuple[Any, ...], kwargs: dict[str, Any], device: torch.device) -> tuple[Any, dict[str, Any]]:
    """Arguments with their tensors on a device, moved as DDP moves them.

    torch 2.11 to 2.13: the published scatter_kwargs takes GPUs only, and splits.
    Test: tests/gpu/test_cuda.py.
    """
    (args, *_), (kwargs, *_) = _to_kwargs(args, kwargs, device, False)
    return args, kwargs


def send_in_buckets(tensors: Iterable[Tensor], group: dist.ProcessGroup, bucket_bytes: int) -> None:
    """Give every rank of a group the first one's values, in place: one collective for each bucket.

    torch 2.11 to 2.13: the published broadcast takes one tensor; DDP sends so what it starts with.
    Test: tests/dist/test_instantiate.py, test_a_given_module_is_wrapped_itself_with_rank_0s_values.
    """
    dist._broadcast_coalesced(group, list(tensors), bucket_bytes, 0)


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


def before_backward(unit: nn.Module, call: Callable[[], None]) -> None:
    """Call something before FSDP2 gathers a unit for backward; in place.

    torch 2.11 to 2.13: it is the only hook at every output of every unit, and one more would cost each forward.
    Test: tests/dist/test_entries.py, test_what_cannot_be_under_fsdp2_is_refused.
    """
    state: Any = unit._get_fsdp_state()  # type: ignore[operator]
    gather = state._pre_backward

    def first(gradient: Tensor) -> Tensor:
        call()
        return gather(gradient)

    state._pre_backward = first


def given_parameters(unit: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """(module, name, what FSDP2 knows of it) of each parameter of a unit.

    torch 2.11 to 2.13: what is known has ``sharded_param`` and, gathered once, ``_unsharded_param``; anything else that
    stands in the module is taken out of it without a word when the unit is gathered.
    Test: tests/dist/test_entries.py, test_what_cannot_be_under_fsdp2_is_refused.
    """
    state: Any = unit._get_fsdp_state()  # type: ignore[operator]
    groups = getattr(state, "_fsdp_param_groups", None)  # torch 2.11 has one
    if groups is None:
        groups = [state._fsdp_param_group] if state._fsdp_param_group is not None else []
    held = [parameter for group in groups for parameter in group.fsdp_params]
    return [(p._module_info.module, p._module_info.param_name, p) for p in held]


def replaced_parameter(given: Sequence[tuple[nn.Module, str, Any]]) -> tuple[nn.Module, str] | None:
    """(module, name) of the first of ``given_parameters`` in whose place another object stands; None: there is none.

    torch 2.11 to 2.13: FSDP2 takes it out without a word. Before a unit is first gathered, one that was assigned counts
    as its own: a checkpoint may be. Test: tests/dist/test_entries.py, test_what_cannot_be_under_fsdp2_is_refused.
    """
    for module, name, known in given:
        held, gathered = module._parameters.get(name), getattr(known, "_unsharded_param", None)
        if held is not known.sharded_param and held is not gathered:
            if gathered is not None or not isinstance(held, nn.Parameter):
                return module, name
    return None


def written_parameters(given: Sequence[tuple[nn.Module, str, Any]]) -> list[int]:
    """Numbers of those of ``given_parameters`` that were written into since they were gathered.

    torch 2.11 to 2.13: what FSDP2 gathers starts with no write, and what is written there is lost.
    Test: tests/dist/test_entries.py, test_a_parameter_that_is_set_to_itself_is_not_changed.
    """
    gathered = [getattr(known, "_unsharded_param", None) for _, _, known in given]
    return [number for number, parameter in enumerate(gathered) if parameter is not None and parameter._version]


def is_as_sharded(known: Any) -> bool:
    """Whether a gathered parameter, by what FSDP2 knows of it, has the numbers that this rank's shard has.

    torch 2.11 to 2.13: the next time it is gathered from the shards. True where it is not gathered now.
    Test: tests/dist/test_entries.py, test_what_cannot_be_under_fsdp2_is_refused.
    """
    whole, shard = (getattr(t, "_local_tensor", t).detach() for t in (known._unsharded_param, known.sharded_param))
    if not whole.untyped_storage().nbytes():
        return True
    parts = whole.chunk(known.mesh_info.shard_mesh_size, known.fsdp_placement.dim)
    rank = known.mesh_info.shard_mesh_rank
    return rank >= len(parts) or torch.equal(parts[rank], shard.to(whole.device, whole.dtype))


def expect_views(units: Sequence[nn.Module]) -> None:
    """No warning of fully_shard, from here on, of views that modules of these classes return.

    torch 2.11 to 2.13 warn by the class's name as they change it, with no switch.
    Test: tests/dist/test_fsdp_units.py, test_parts_that_are_views_are_no_reason_to_warn.
    """
    names = ", ".join(f"FSDP{type(module).__name__}" for module in units)
    warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \({names}\) returned a view tensor")


def no_word_of_one_process() -> None:
    """No warning of torch.distributed.checkpoint, from here on, that one process saves or loads by itself.

    torch 2.11 to 2.13 warn by this text, also where no_dist says so. To be called inside warnings.catch_warnings().
    Test: tests/checkpoint/test_save_and_load.py.
    """
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
