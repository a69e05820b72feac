"""What shares memory with a parameter in a plain model, and would not once the parameter is sharded."""

from __future__ import annotations

from typing import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.names import MeshAxisName as A
from nemo_dist_conf.runtime.model.tensor_attributes import tensors_beside
from nemo_dist_conf.runtime.torch_inside import is_plain, own_parameters, storage_id

__all__ = ["refuse_shared_memory"]

#: Axes along which ranks hold the same model; ddp has these.
_DATA = (A.DP.value, A.DP_REPLICATE.value, A.DP_SHARD.value)


def refuse_shared_memory(model: nn.Module, mesh: DeviceMesh) -> None:
    """Raise ConfigError where a parameter's memory is also that of another parameter, a buffer, or a tensor kept as
    an attribute: each would go on by itself, and what the model computes with it would be of the first step.

    model: before anything is sharded, on meta or not. Parameters that are one object (ties) are fine.
    """
    places: dict[int, list[tuple[str, Tensor]]] = {}
    for name, parameter in model.named_parameters():
        if not is_plain(type(parameter)):
            continue
        same = places.setdefault(storage_id(parameter), [])
        for first, other in same:
            if _overlap(other, parameter):
                what = f"{first} and {name} are two parameters in the same memory"
                raise _refusal(what, first, name, f"one parameter ({name} = {first})", mesh)
        same.append((name, parameter))
    for name, tensor in _others(model):
        for first, other in places.get(storage_id(tensor), ()) if is_plain(type(tensor)) else ():
            if _overlap(other, tensor):
                what = f"{name} is kept beside the parameter {first} and is in its memory"
                raise _refusal(what, first, name, f"{first} where {name} is used", mesh)


def _refusal(what: str, first: str, second: str, instead: str, mesh: DeviceMesh) -> ConfigError:
    own = f"memory of its own for {second} (clone())"
    is_data = all(mesh.size(i) == 1 or name in _DATA for i, name in enumerate(mesh.mesh_dim_names or ()))
    allowed = f"{instead}, {own}" + (", or strategy=ddp" if is_data else "")
    what, asked = f"{what}, which sharding would take apart", f"a model with {first} and {second}"
    return ConfigError(Problem(what=what, asked=asked, allowed=allowed, instead="strategy=ddp" if is_data else own))


def _others(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_buffers()
    for path, module, key, tensor in tensors_beside(model):
        # torch's own: lists of an LSTM follow its parameters; what has an original is computed from it in each forward.
        if not isinstance(module, nn.RNNBase) and f"{key}_orig" not in own_parameters(module):
            yield path, tensor


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one storage have an element in common."""
    if not one.numel() or not other.numel():
        return False
    (begin, end), (its_begin, its_end) = _extent(one), _extent(other)
    if end <= its_begin or its_end <= begin:
        return False
    if one.element_size() != other.element_size() or one.is_contiguous() and other.is_contiguous():
        return True
    # Such as the columns of one large draw, left and right.
    first, size = min(begin, its_begin), one.element_size()
    met = torch.zeros((max(end, its_end) - first) // size, dtype=torch.bool)
    met.as_strided(one.shape, one.stride(), begin // size - first // size).fill_(True)
    return bool(met.as_strided(other.shape, other.stride(), its_begin // size - first // size).any())


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the one behind its last."""
    begin = int(tensor.storage_offset()) * tensor.element_size()
    last = sum((size - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride()))
    return begin, begin + (last + 1) * tensor.element_size()
