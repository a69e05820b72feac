"""What torch does not publish of tensors, of the operators on them, and of what is nested around them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed._functional_collectives as _functional_collectives
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.utils import _python_dispatch, _pytree

__all__ = [
    "AsyncCollectiveTensor",
    "COLLECTIVE_NAMESPACES",
    "QuickDispatchMode",
    "chunks_told",
    "collectives",
    "has_hooks",
    "is_plain",
    "is_view",
    "local_tensor",
    "move_all_towards",
    "norms_of",
    "of_same_class",
    "scale_all",
    "schema_of",
    "storage_id",
    "tree_flatten",
    "tree_iter",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
    "with_local_tensor",
    "writes_into",
]

#: All-gathers and the like whose results are waited for when they are read, and that have a backward.
#: torch 2.11 to 2.13: torch.distributed has none.
#: Test: tests/dist/test_context_parallel.py, test_equals_one_process.
collectives = _functional_collectives

#: What such a collective gives until it is read.
#: torch 2.11 to 2.13: as those. Test: tests/dist/test_tensor_parallel.py, test_all_that_forward_takes_and_gives.
AsyncCollectiveTensor = _functional_collectives.AsyncCollectiveTensor

#: Tensors in dictionaries, tuples and outputs of transformers, which registers its classes there.
#: torch 2.11 to 2.13: torch.utils has no other address for them. Test: tests/runtime/model/test_trial.py.
tree_flatten = _pytree.tree_flatten
tree_iter = _pytree.tree_iter
tree_leaves = _pytree.tree_leaves
tree_map_only = _pytree.tree_map_only
tree_unflatten = _pytree.tree_unflatten

#: ``scale_all(tensors, factor)``: multiply tensors of one device by a number, in place.
#: torch 2.11 to 2.13: one kernel for all of them; the published clip_grads_with_norm_ takes parameters and no factor.
#: Test: tests/runtime/test_gradients.py.
scale_all = torch._foreach_mul_

#: ``norms_of(tensors, order, dtype=...)``: the norm of each tensor. torch 2.11 to 2.13: as ``scale_all``; the published
#: get_total_norm computes in the gradients' own dtype. Test: tests/runtime/test_gradients.py.
norms_of = torch._foreach_norm

#: ``move_all_towards(tensors, others, weight)``: tensors + weight * (others - tensors), in place.
#: torch 2.11 to 2.13: as ``scale_all``. Test: tests/dist/test_ema.py, test_averages_are_those_of_torch.
move_all_towards = torch._foreach_lerp_

#: Namespaces of operators that are collectives, of the functional ones and DTensor's among them.
#: torch 2.11 to 2.13: operators do not say so themselves.
#: Test: tests/runtime/model/test_recorder.py, test_what_cannot_be_recorded.
COLLECTIVE_NAMESPACES = ("c10d", "_c10d_functional", "_dtensor", "symm_mem")


class QuickDispatchMode(_python_dispatch.TorchDispatchMode):
    """A TorchDispatchMode that torch may not compile.

    torch 2.13 would import its compiler for the first operator, which takes longer than most constructors.
    Test: tests/runtime/model/test_recorder.py, test_the_tape_is_what_the_constructor_did.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def local_tensor(tensor: DTensor) -> Tensor:
    """What this rank holds of a DTensor: the tensor itself, in no graph and not waited for.

    torch 2.11 to 2.13: the published ``to_local`` gives another one where gradients are computed, without what a
    library has noted on it. Test: tests/checkpoint/test_objects.py.
    """
    return tensor._local_tensor


def chunks_told(tensor: DTensor) -> Any:
    """The function by which a DTensor that was cut in a way of its own says how; None for one that torch cut.

    torch 2.11 to 2.13 ask it of the local tensor when they write checkpoints (torch/distributed/_checkpointable.py),
    and megatron-fsdp 0.6 puts it there. Test: tests/dist/test_megatron_fsdp.py, test_what_each_stage_shards.
    """
    return getattr(tensor._local_tensor, "__create_chunk_list__", None)


def with_local_tensor(like: DTensor, local: Tensor) -> DTensor:
    """A DTensor that is sharded as another one, of which this rank holds ``local``.

    torch 2.11 to 2.13: the published ``DTensor.from_local`` goes through autograd, and holds a view.
    Test: tests/runtime/model/test_materialise.py, test_shards_may_be_uneven_or_empty.
    """
    return DTensor(local, like._spec, requires_grad=False)


def of_same_class(tensor: Tensor, values: Tensor, requires_grad: bool) -> Tensor:
    """Values as a tensor of the class that another one has, with its hooks.

    torch 2.11 to 2.13: classes of tensors have constructors of their own; hooks are added, nothing tells of them.
    Test: tests/runtime/model/test_recorder.py, test_a_parameter_stays_the_object_that_it_is.
    """
    other = Tensor._make_subclass(type(tensor), values, requires_grad)
    for hook in (tensor._backward_hooks or {}).values() if tensor.is_leaf else ():
        other.register_hook(hook)
    for hook in (tensor._post_accumulate_grad_hooks or {}).values():
        other.register_post_accumulate_grad_hook(hook)
    return other


def has_hooks(parameter: nn.Parameter) -> bool:
    """Whether a hook runs when a parameter has its gradient.

    torch 2.11 to 2.13: hooks are added, nothing tells of them.
    Test: tests/dist/test_kinds.py, test_what_would_be_another_model_is_refused.
    """
    return bool(parameter._backward_hooks or parameter._post_accumulate_grad_hooks)


def is_view(tensor: Tensor) -> bool:
    """Whether a tensor is a view of another one in autograd's books.

    torch 2.11 to 2.13: torch refuses to detach or to write into such a one, and says it of none before.
    Test: tests/dist/test_tensor_parallel.py, test_all_that_forward_takes_and_gives.
    """
    return tensor._is_view()


def writes_into(tensor: Tensor) -> int:
    """How many times a tensor, or what shares its memory, has been written into.

    torch 2.11 to 2.13: autograd's own count, in the documentation of saved tensors and with no other address.
    Test: tests/runtime/techniques/pipeline/test_stages.py, test_a_model_that_is_no_chain_is_refused.
    """
    return tensor._version


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


def is_plain(kind: type) -> bool:
    """Whether a class of tensors leaves operators to torch; one that has its own way with them has no storage.

    torch 2.11 to 2.13: nothing else tells DTensors and quantized tensors from classes that only have a name.
    Test: tests/runtime/model/test_recorder.py, test_what_cannot_be_recorded.
    """
    return kind.__torch_dispatch__ is torch._C._disabled_torch_dispatch_impl  # type: ignore[attr-defined]
