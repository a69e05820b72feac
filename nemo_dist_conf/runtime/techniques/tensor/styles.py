"""What each tensor-parallel style name does to a module, as torch ParallelStyle objects.

They differ from torch's own in what they take: a DTensor of any layout, because it says its own, and a plain tensor
as one that every rank has in full (``rowwise``: the rank's own part, as ``colwise`` gives it).
Tensors are [batch, seq, hidden].
"""

from __future__ import annotations

from typing import Any, Callable, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from nemo_dist_conf.families.styles import STYLES
from nemo_dist_conf.runtime.model.materialise import retie, tied_names
from nemo_dist_conf.runtime.techniques.tensor.layer_kinds import layer_kind
from nemo_dist_conf.runtime.techniques.tensor.local_parameters import LocalParameters, replicate_parameters
from nemo_dist_conf.runtime.techniques.tensor.partial_styles import (
    Experts,
    LatentProjection,
    OwnOutput,
    OwnPart,
    PackedLinear,
    Shared,
    SplitParameter,
    Summed,
)
from nemo_dist_conf.runtime.techniques.tensor.split_heads import SplitHeads
from nemo_dist_conf.runtime.torch_inside import (
    AsyncCollectiveTensor,
    is_view,
    local_tensor,
    own_parameters,
    tree_flatten,
    tree_map_only,
    tree_unflatten,
)
from nemo_dist_conf.runtime.torch_inside.styles import Style, laid_out_by, packed_shard

__all__ = ["SEQUENCE_DIM", "STYLE_OBJECTS", "apply_styles"]

#: [batch, seq, hidden]
SEQUENCE_DIM = 1


def _as_dtensor(x: torch.Tensor, mesh: DeviceMesh, placement: Placement) -> DTensor:
    """x laid out as asked; a plain tensor is one that every rank has in full."""
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, [Replicate()], run_check=False)
    if x.placements == (placement,):
        return x
    if not _GATHERS_VIEWS or torch.compiler.is_compiling():
        return x.redistribute(placements=[placement], async_op=True)
    return _contiguous(_ContiguousGradient.apply(x).redistribute(placements=[placement], async_op=True))


#: torch 2.11 gathers uneven shards into a view that its own linear cannot take, forward or backward.
_GATHERS_VIEWS = torch.__version__ < "2.13"


def _contiguous(x: DTensor) -> DTensor:
    contiguous: Any = x if local_tensor(x).is_contiguous() else x.clone(memory_format=torch.contiguous_format)
    return contiguous


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: DTensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: DTensor) -> DTensor:
        return _contiguous(gradient)


def _input_of_columns(layouts: Any, wanted: Any, module: Any, inputs: Any, mesh: DeviceMesh) -> DTensor:
    return _as_dtensor(inputs[0], mesh, wanted[0])


def _input_of_rows(layouts: Any, wanted: Any, module: Any, inputs: Any, mesh: DeviceMesh) -> DTensor:
    x = inputs[0]
    if not isinstance(x, DTensor):
        x = DTensor.from_local(x, mesh, layouts, run_check=False)
    return _as_dtensor(x, mesh, wanted[0])


def _output(layouts: Any, local: bool, module: Any, output: Any, mesh: DeviceMesh) -> torch.Tensor:
    found = _as_dtensor(output, mesh, layouts[0])
    return found.to_local() if local else found


_Colwise = laid_out_by(ColwiseParallel, _input_of_columns, _output)
_Rowwise = laid_out_by(RowwiseParallel, _input_of_rows, _output)


class _Transposed(Style):
    """A style of torch's for linear layers, for one whose weight is [input, output] (Conv1D)."""

    def __init__(self, style: ColwiseParallel | RowwiseParallel) -> None:
        self.style = style

    def parallelized(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        style, splits_rows = self.style, isinstance(self.style, RowwiseParallel)
        placements: dict[str, Placement] = {"weight": Shard(0), "bias": Replicate()}
        if not splits_rows:
            placements = {"weight": Shard(1), "bias": Shard(0)}
        for key, whole in list(module.named_parameters(recurse=False)):
            part = distribute_tensor(whole, device_mesh, [placements[key]], src_data_rank=None)
            module.register_parameter(key, nn.Parameter(part, requires_grad=whole.requires_grad))

        def enter(_: nn.Module, args: tuple) -> tuple:
            if splits_rows:
                return (_input_of_rows(style.input_layouts, (Shard(-1),), module, args, device_mesh),)
            return (_input_of_columns(style.input_layouts, (Replicate(),), module, args, device_mesh),)

        def leave(_: nn.Module, args: tuple, output: Any) -> torch.Tensor:
            return _output(style.output_layouts, style.use_local_output, module, output, device_mesh)

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return module


class _Input(Style):
    """The module's first tensor becomes a DTensor of this layout: one collective for all layers inside.

    In backward their partial gradients meet as one sum, in one reduction.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement

    def parallelized(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return _map_first(args, kwargs, lambda x: _as_dtensor(x, device_mesh, self.placement))

        module.register_forward_pre_hook(enter, with_kwargs=True)
        return module


class _SplitInputs(Style):
    """Of the module's arguments, those that are [batch, seq, ...] as its first tensor is, split over the sequence.

    So what a block is given beside the stream (embeddings of its own, the stream as it began) meets its part of that.
    """

    def parallelized(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def enter(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            return _map_alike(args, kwargs, lambda x: _as_dtensor(x, device_mesh, Shard(SEQUENCE_DIM)))

        module.register_forward_pre_hook(enter, with_kwargs=True)
        return module


class _SequenceParameters(Style):
    """Parameters of the module's own are replicated DTensors to its code as well, which meet the split stream there."""

    def parallelized(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        local = LocalParameters(device_mesh, replicate_parameters(module, device_mesh, inside=False), gradient=None)
        module.register_forward_pre_hook(lambda *_: local.put())
        module.register_forward_hook(lambda *_: local.take_back(), always_call=True)
        return module


class _Whole(Style):
    """Inside the module all tensors are plain and full, as without sequence parallelism.

    sequence: the first tensor of its output becomes a DTensor that is split over the sequence; one that it has made
    flat, [batch * seq, hidden], is put in shape before. Every rank computes all of it, so no gradient is summed.
    """

    def __init__(self, sequence: bool) -> None:
        self.sequence = sequence

    def parallelized(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        during: dict[str, Any] = {}  # one forward: the shape of the stream

        def enter(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            _map_first(args, kwargs, lambda x: during.update(shape=x.shape) or x)
            return tree_map_only(DTensor, full, (args, kwargs))

        def full(x: DTensor) -> torch.Tensor:
            return _OwnTensor.apply(_as_dtensor(x, device_mesh, Replicate()).to_local())

        def leave(_: nn.Module, args: tuple, output: Any) -> Any:
            leaves, form = tree_flatten(output)
            index = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor))
            shape, back = during.pop("shape"), leaves[index]
            back = back.view(shape) if back.dim() == 2 and back.numel() == shape.numel() else back
            leaves[index] = _as_dtensor(back, device_mesh, Shard(SEQUENCE_DIM))
            return tree_unflatten(leaves, form)

        module.register_forward_pre_hook(enter, with_kwargs=True, prepend=True)
        if self.sequence:
            module.register_forward_hook(leave)
        return module


class _Together(Style):
    """Several styles of one module, in this order."""

    def __init__(self, styles: Sequence[ParallelStyle]) -> None:
        self.styles = styles

    def parallelized(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for style in self.styles:
            parallelize_module(module, device_mesh, style, src_data_rank=None)
        return module


class _Replicated(Style):
    """Parameters are replicated DTensors that the module itself sees as plain tensors while it runs.

    gradient: Replicate() where all ranks compute the same; Partial() where each has its own part, summed in backward.
    sequence: the inputs are split over the sequence, the outputs are DTensors of that layout.
    """

    def __init__(self, gradient: Placement, sequence: bool = False) -> None:
        self.gradient = gradient
        self.sequence = sequence

    def parallelized(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        local = LocalParameters(device_mesh, replicate_parameters(module, device_mesh), self.gradient)
        during: dict[str, Any] = {}  # one forward: the shape of the input

        def enter(_: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            if self.sequence:
                args, kwargs = _map_alike(args, kwargs, split)
            local.put()
            return args, kwargs

        def split(x: torch.Tensor) -> torch.Tensor:
            x = _as_dtensor(x, device_mesh, Shard(SEQUENCE_DIM))
            during["shape"] = x.shape
            return x.to_local()

        def leave(_: nn.Module, args: tuple, output: Any) -> Any:
            local.take_back()
            if not self.sequence or "shape" not in during:
                return output
            leading = during.pop("shape")[: SEQUENCE_DIM + 1]
            return tree_map_only(torch.Tensor, lambda x: joined(x, leading), output)

        def joined(x: torch.Tensor, leading: torch.Size) -> DTensor:
            shape = torch.Size((*leading, *x.shape[SEQUENCE_DIM + 1 :]))
            stride = torch.empty(shape, device="meta").stride()
            placements = [Shard(SEQUENCE_DIM)]
            return DTensor.from_local(x, device_mesh, placements, run_check=False, shape=shape, stride=stride)

        module.register_forward_pre_hook(enter, with_kwargs=True)
        module.register_forward_hook(leave, always_call=True)
        return module


#: Style name -> torch's object, of those in families/styles.py for which nothing has to be known of the model.
STYLE_OBJECTS: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": _Colwise,
    "colwise_gather_output": lambda: _Colwise(output_layouts=Replicate()),
    "rowwise": _Rowwise,
    "rowwise_split_input": lambda: _Rowwise(input_layouts=Replicate()),
    "rowwise_scatter_output": lambda: _Rowwise(output_layouts=Shard(SEQUENCE_DIM), use_local_output=False),
    "embedding_rowwise": lambda: _Rowwise(input_layouts=Replicate()),
    "embedding_rowwise_scatter_output": lambda: _Rowwise(
        input_layouts=Replicate(), output_layouts=Shard(SEQUENCE_DIM), use_local_output=False
    ),
    "replicated": lambda: _Replicated(Replicate()),
    "replicated_with_grad_allreduce": lambda: _Replicated(Partial()),
    "sequence_parallel": lambda: _Replicated(Partial(), sequence=True),
    "split_heads": SplitHeads,
    "packed_colwise": lambda: PackedLinear(STYLES["packed_colwise"].packed),
    "packed_qkv_colwise": lambda: PackedLinear(STYLES["packed_qkv_colwise"].packed),
    "local_params": OwnPart,
    "moe_tp_experts": Experts,
    "moe_identity_expert": Shared,
    "all_reduce": Summed,
    "own_output": OwnOutput,
    "gather_input": lambda: _Input(Replicate()),
    "scatter_input": lambda: _Input(Shard(SEQUENCE_DIM)),
    "scatter_inputs": _SplitInputs,
    "sequence_parameters": _SequenceParameters,
    "whole_inputs": lambda: _Whole(sequence=False),
    "whole_sequence": lambda: _Whole(sequence=True),
}


def apply_styles(model: nn.Module, styles: Mapping[str, Any], mesh: DeviceMesh) -> dict[str, ParallelStyle]:
    """Split the named modules over ``mesh`` in place, each by its style (a name, an object or several); ties stay.

    Outputs of the model are then full, plain tensors. Returns the objects.
    """
    ties = tied_names(model)
    modules = dict(model.named_modules())
    objects = {name: _object(model, name, style) for name, style in styles.items()}
    # Innermost first, parameters before their modules: "replicated" takes what the styles inside leave.
    # src_data_rank=None: every rank has the same values, so none is sent.
    for name, style in sorted(objects.items(), key=lambda entry: -entry[0].count(".")):
        module = modules[name if name in modules else name.rpartition(".")[0]]
        parallelize_module(module, mesh, style, src_data_rank=None)
    retie(model, ties)
    model.register_forward_hook(_plain_outputs)
    return objects


def _object(model: nn.Module, name: str, style: Any) -> ParallelStyle:
    """What a style, by its name or itself, does to a module or a parameter of the model."""
    if isinstance(style, tuple):
        return _Together([_object(model, name, one) for one in style])
    if not isinstance(style, str):
        return style
    owner, _, key = name.rpartition(".")
    if own_parameters(model.get_submodule(owner)).get(key) is not None:
        dim = STYLES[style].split_dim("Linear", model.get_parameter(name).dim())
        return SplitParameter(key, Replicate() if dim is None else packed_shard(dim, STYLES[style].packed))
    if style == "mla_kv_a_proj":
        return LatentProjection(_rotary_width(model, owner))
    made = STYLE_OBJECTS[style]()
    if isinstance(made, (ColwiseParallel, RowwiseParallel)) and layer_kind(model.get_submodule(name)) == "Conv1D":
        return _Transposed(made)
    return made


def _rotary_width(model: nn.Module, attention: str) -> int:
    """Outputs of an attention's projection to a latent vector that are the rotary part of its key."""
    module: Any = model.get_submodule(attention)
    config: Any = getattr(module, "config", None) or getattr(model, "config", None)
    return int(getattr(module, "qk_rope_head_dim", None) or config.qk_rope_head_dim)


def _map_first(args: tuple, kwargs: dict, fn: Callable[[torch.Tensor], torch.Tensor]) -> tuple[tuple, dict]:
    """The arguments with fn applied to the first tensor, which keyword arguments call hidden_states if not first."""
    if args and isinstance(args[0], torch.Tensor):
        return (fn(args[0]), *args[1:]), kwargs
    tensors = [key for key, value in kwargs.items() if isinstance(value, torch.Tensor)]
    if not tensors:
        return args, kwargs
    key = "hidden_states" if "hidden_states" in tensors else tensors[0]
    return args, {**kwargs, key: fn(kwargs[key])}


def _map_alike(args: tuple, kwargs: dict, fn: Callable[[torch.Tensor], torch.Tensor]) -> tuple[tuple, dict]:
    """The arguments with fn applied to the first tensor, and to all others of its [batch, seq, ...]."""
    first: list[torch.Tensor] = []
    _map_first(args, kwargs, lambda x: first.append(x) or x)  # type: ignore[func-returns-value]
    if not first:
        return args, kwargs

    def change(value: Any) -> Any:
        if value is first[0]:
            return fn(value)
        is_alike = isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > SEQUENCE_DIM + 1
        return (
            fn(value) if is_alike and value.shape[: SEQUENCE_DIM + 1] == first[0].shape[: SEQUENCE_DIM + 1] else value
        )

    return tuple(map(change, args)), {key: change(value) for key, value in kwargs.items()}


class _OwnTensor(torch.autograd.Function):
    """The same memory as a torch.Tensor that is no view and that no collective is still writing.

    Layers give views of their DTensors, which code of a model may not change in place. fully_shard warns of a view as
    the model's output, because changing it so would drop its hook on backward.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return (x.wait() if isinstance(x, AsyncCollectiveTensor) else x).detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0]


def _plain_outputs(module: nn.Module, args: tuple, output: Any) -> Any:
    """Forward hook of the whole model: what leaves it is full, plain tensors (a new container where one changed)."""
    if isinstance(output, DTensor):
        output = output.full_tensor()
    if isinstance(output, torch.Tensor):
        return _OwnTensor.apply(output) if is_view(output) or type(output) is AsyncCollectiveTensor else output
    if isinstance(output, dict):
        for key, value in list(output.items()):
            plain = _plain_outputs(module, args, value)
            if plain is not value:
                output[key] = plain  # in place: transformers' outputs have attributes too
        return output
    if isinstance(output, (tuple, list)):
        parts = [_plain_outputs(module, args, value) for value in output]
        if any(new is not old for new, old in zip(parts, output)):
            return type(output)(*parts) if hasattr(output, "_fields") else type(output)(parts)
    return output
