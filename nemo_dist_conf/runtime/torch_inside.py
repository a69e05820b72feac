"""What torch and transformers do not publish and cannot be done without: each with version, reason, and test."""

from __future__ import annotations

import copy
import datetime
import inspect
import os
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

__all__ = [
    "after_backward",
    "before_backward",
    "flash_backward_on_cpu",
    "flash_on_cpu",
    "flattened",
    "generator_of",
    "given_parameters",
    "gloo_threads",
    "group_timeout",
    "hide_sharding",
    "is_as_sharded",
    "is_gathered_for_forward",
    "is_plain",
    "maker_of_mask",
    "name_flattened",
    "number_of_backward",
    "replace_trunc_normal",
    "root_mesh",
    "run_as_forward",
    "schema_of",
    "send_from_rank0",
    "set_group_timeout",
    "storage_id",
    "what_is_not_reduced",
]

#: torch 2.11 to 2.13: the kernel that scaled_dot_product_attention runs on a CPU, and its backward. The published
#: function does not give the log-sum-exp, without which attention over some of the keys cannot be added to that over
#: the others. Test: tests/runtime/techniques/test_whole_attention.py.
_FLASH = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
_FLASH_BACKWARD = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


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


def flattened(mesh: DeviceMesh, axes: Sequence[str], name: str) -> DeviceMesh:
    """The axes of a root mesh as one of that name, on a group of its own that is made the first time.

    torch 2.11 to 2.13: there is no other way to one axis over the ranks of several.
    Test: tests/dist/test_setup.py, test_names_of_several_axes_answer_whatever_the_sizes.
    """
    return mesh[tuple(axes)]._flatten(name)


def name_flattened(root: DeviceMesh, axis: str, name: str) -> None:
    """Let ``root[name]`` be the ranks of an axis that the mesh has already, flattened or not, on that axis's group.

    A mesh that has the name already is left as it is.

    torch 2.11 to 2.13: ``_flatten`` makes a second group of the same ranks, or, of axes of one rank each, a group for
    every rank on every rank.
    Test: tests/dist/test_setup.py, test_names_of_several_axes_answer_whatever_the_sizes.
    """
    if name in root._flatten_mapping:
        return
    found = root._flatten_mapping.get(axis)
    named = copy.copy(found if found is not None else root[axis])
    named._mesh_dim_names, named._hash = (name,), None
    if hasattr(named._layout, "coalesce"):  # torch 2.11 has a plain number where a name can be taken out of its root
        named._layout = named._layout.coalesce()
    root._flatten_mapping[name] = named


def gloo_threads() -> list[Path]:
    """The threads of this process that run gloo's collectives, as folders of /proc; none where there is no /proc.

    torch 2.11 to 2.13 name them so (ProcessGroupGloo.cpp, runLoop) and give no other way to them: a process group
    lives on in meshes and models after ``destroy_process_group``, and gloo's has no ``shutdown``.
    Test: tests/runtime/test_interpreter_exit.py.
    """
    found = []
    try:
        for number in os.listdir("/proc/self/task"):
            folder = Path("/proc/self/task", number)
            if folder.joinpath("comm").read_text().strip() == "pt_gloo_runloop":
                found.append(folder)
    except OSError:  # no such system, or a thread that has just ended
        return found
    return found


def group_timeout(group: dist.ProcessGroup | None = None) -> datetime.timedelta | None:
    """How long a collective of a group, by default of all ranks, may wait; None where its backend has no such time.

    torch 2.11 to 2.13: what was given to init_process_group cannot be asked for otherwise, and groups that are made
    later, those of a mesh among them, do not take it over.
    Test: tests/dist/test_setup.py, test_every_group_of_the_meshes_has_the_timeout_of_the_process_group.
    """
    group = group or dist.group.WORLD
    if group is None or dist.get_backend(group) == "fake":
        return None
    for device in group._device_types:
        timeout = getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)
        if timeout is not None:
            return timeout
    return None


def set_group_timeout(group: dist.ProcessGroup, timeout: datetime.timedelta) -> None:
    """Let collectives of this group wait so long.

    torch 2.11 to 2.13: init_device_mesh takes a timeout only with options of a backend, and then makes a new group
    where all ranks have one already.
    Test: tests/dist/test_setup.py, test_every_group_of_the_meshes_has_the_timeout_of_the_process_group.
    """
    dist.distributed_c10d._set_pg_timeout(timeout, group)


#: What DDP sends at once when it makes models equal.
_BUCKET_BYTES = 250 * 2**20


def send_from_rank0(tensors: Iterable[Tensor]) -> None:
    """Give all ranks the values that rank 0 has of these tensors; those on meta stay as they are.

    In buckets, as DDP does it: one collective for each tensor would take longer than a small model's wrapping. torch
    2.11 to 2.13 publish nothing that sends many. Test: tests/dist/test_instantiate.py.
    """
    sent, world = [tensor.detach() for tensor in tensors if not tensor.is_meta], dist.group.WORLD
    if sent and world is not None and world.size() > 1:
        dist._broadcast_coalesced(world, sent, _BUCKET_BYTES, 0)


def storage_id(tensor: Tensor) -> int:
    """A number that all views of one storage share, and no other storage as long as this one lives.

    torch 2.11 to 2.13: storages without memory (meta) all have the data pointer 0, which is the published answer.
    Test: tests/runtime/model/test_recorder.py, test_views_and_aliases.
    """
    if is_lazy(tensor):
        with torch._C.DisableTorchFunctionSubclass():
            return tensor.untyped_storage()._cdata
    return tensor.untyped_storage()._cdata


def schema_of(operator: Any) -> Any:
    """What an operator takes, writes and returns.

    torch 2.11 to 2.13: a dispatch mode is given the operator, and nothing else that says this of it.
    Test: tests/runtime/model/test_recorder.py, test_the_tape_is_what_the_constructor_did.
    """
    return operator._schema


def generator_of(device: torch.device) -> torch.Generator:
    """The device's default generator.

    torch 2.11 to 2.13: torch.manual_seed would also queue a seed, and a stack trace, for each kind of device to come.
    Test: tests/runtime/model/test_materialise.py, test_the_global_random_state_is_neither_read_nor_moved.
    """
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[device.index or 0]


def is_plain(kind: type) -> bool:
    """Whether a class of tensors leaves operators to torch; one that has its own way with them has no storage.

    torch 2.11 to 2.13: nothing else tells DTensors and quantized tensors from classes that only have a name.
    Test: tests/runtime/model/test_recorder.py, test_what_cannot_be_recorded.
    """
    return kind.__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl  # type: ignore[attr-defined]


def replace_trunc_normal(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """What nn.init.trunc_normal_ calls, now; it becomes the function.

    torch 2.13 looks at what it drew and draws again, which takes values, and on meta it draws nothing.
    Test: tests/runtime/model/test_recorder.py, test_the_tape_is_what_the_constructor_did.
    """
    init: Any = torch.nn.init
    before, init._no_grad_trunc_normal_ = init._no_grad_trunc_normal_, function
    return before


def root_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that a mesh was cut out of or flattened from, with all axes; itself where there is none.

    torch 2.11 to 2.13: a flattened mesh (dp_shard_cp) does not tell how large the axes are that went into it.
    Test: tests/checkpoint/test_objects.py, test_a_ranks_own_state_needs_ranks_that_are_laid_out_alike.
    """
    return mesh._get_root_mesh()


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
    is not recognised is evaluated block by block, which is as right and slower.
    Test: tests/runtime/techniques/test_mask_rules.py.
    """
    if getattr(function, "__module__", None) != "transformers.masking_utils":
        return None
    name = getattr(function, "__qualname__", "").partition(".")[0]
    return name, dict(inspect.getclosurevars(function).nonlocals)
