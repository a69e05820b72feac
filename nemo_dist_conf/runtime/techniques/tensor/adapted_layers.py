"""Layers with an adapter of peft's under tensor parallelism: what a style of a layer means for all that is in it.

A layer's adapter is split with it. Beside a layer whose outputs are split, B is split alike and A is whole; beside one
whose inputs are split, A is and B is whole. What lies between A and B is as narrow as the adapter, and every rank has
all of it, so no gradient of a whole matrix has to be summed but under sequence parallelism, where B meets a part of the
sequence. Tensors are [batch, seq, hidden].
"""

from __future__ import annotations

from typing import Any, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.families.styles import STYLES
from nemo_dist_conf.runtime.model.shard_boxes import cut_boxes
from nemo_dist_conf.runtime.techniques.tensor.local_parameters import split_parameter
from nemo_dist_conf.runtime.torch_inside import own_parameters
from nemo_dist_conf.runtime.torch_inside.styles import Style, packed_shard

__all__ = ["styles_inside"]


def styles_inside(model: nn.Module, named: Mapping[str, Any], sequence: bool) -> dict[str, Any]:
    """Styles by name, those of layers with an adapter given to the modules inside of them.

    sequence: the residual stream is split over the sequence.
    Raises ConfigError for an adapter in a layer that this does not know how to split.
    """
    modules = dict(model.named_modules())
    found: dict[str, Any] = {}
    for name, style in named.items():
        layer: Any = modules.get(name)
        if not isinstance(style, str) or layer is None:
            found[name] = style
        elif hasattr(layer, "modules_to_save") and hasattr(layer, "original_module"):
            found |= {f"{name}.original_module": style}
            found |= {f"{name}.modules_to_save.{key}": style for key in layer.modules_to_save}
        elif not isinstance(getattr(layer, "base_layer", None), nn.Module) or not STYLES[style].splits:
            found[name] = style
        else:
            found |= _of_layer(name, layer, style, sequence)
    return found


def _of_layer(name: str, layer: Any, style: str, sequence: bool) -> dict[str, Any]:
    known = STYLES[style]
    found: dict[str, Any] = {f"{name}.base_layer": style}
    if isinstance(layer.base_layer, nn.Embedding):
        if sequence or any(layer.use_dora.values()):
            raise _of_embedding(name, sequence)
        return found  # its adapter is whole on every rank, which looks up all tokens
    if known.splits == "output":
        a: Any = ("whole_inputs", "replicated")  # some plans gather the input for all layers inside of a module
        b = style
    else:
        a, b = style, "sequence_parallel" if known.splits_sequence else "replicated"
    for key in layer.lora_A:
        found |= {f"{name}.lora_A.{key}": a, f"{name}.lora_B.{key}": b}
        if key in layer.lora_magnitude_vector:
            found[f"{name}.lora_magnitude_vector.{key}"] = _SplitMagnitude(style)
    return found


def _of_embedding(name: str, sequence: bool) -> ConfigError:
    by = "strategy.sequence_parallel=true" if sequence else "adapter=dora"
    return ConfigError(
        Problem(
            what=f"{name} is an embedding with an adapter, which is not split over ranks with {by}",
            asked=f"{by} adapter.targets with {name}",
            allowed="adapter.targets without it; strategy.sequence_parallel=false with adapter=lora",
            instead="adapter.targets=all-linear",
        )
    )


class _SplitMagnitude(Style):
    """DoRA's magnitude beside a layer that is split, and its forward on parts of the layer's weights.

    The length of a row is that of all of it: where a rank has a part of each row, squares are summed over the ranks.
    """

    def __init__(self, style: str) -> None:
        self.style = STYLES[style]

    def parallelized(self, module: Any, device_mesh: DeviceMesh) -> nn.Module:
        known = self.style
        # Of several in one a rank would have parts of a vector, which fully_shard cannot cut once more: it is whole.
        is_split = known.splits == "output" and known.keeps_part and known.packed == 1
        split_parameter(module, "weight", device_mesh, Shard(0) if is_split else Replicate())
        module.forward = _SplitForward(module, device_mesh, known)
        return module


class _SplitForward:
    """What DoRA adds to a layer's output, of which this rank has what the layer gives it."""

    def __init__(self, module: Any, mesh: DeviceMesh, style: Any) -> None:
        self.module, self.mesh, self.style = module, mesh, style

    def __call__(
        self,
        x: Tensor,
        *,
        lora_A: Any,
        lora_B: Any,
        scaling: float,
        base_layer: Any,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        added = lora_B(lora_A(x))
        assert base_result is not None, "an input that drops out is refused"
        bias = base_layer.bias
        if bias is not None:
            base_result = base_result - self._of_output(bias, base_result)
        scale = self._magnitude(base_result) / self._length(base_layer, lora_A, lora_B, scaling, base_result)
        scale = scale.view(1, -1)
        return (scale - 1) * base_result + scale * added * scaling

    @property
    def _keeps_part(self) -> bool:
        return self.style.splits == "output" and self.style.keeps_part

    def _length(self, base: Any, lora_A: Any, lora_B: Any, scaling: float, like: Tensor) -> Tensor:
        """Of the rows of the adapted weight that this rank's output has; a constant in backward."""
        with torch.no_grad():
            weight, a, b = (_local(one.weight) for one in (base, lora_A, lora_B))
            weight = weight.T if self.module.fan_in_fan_out else weight
            changed = weight.to(a.dtype) + scaling * (b @ a)
            if self.style.splits == "output":
                length = torch.linalg.norm(changed, dim=1).to(changed.dtype)
                if not self._keeps_part:
                    shard = DTensor.from_local(
                        length, self.mesh, [Shard(0)], run_check=False, shape=self._rows, stride=(1,)
                    )
                    length = shard.full_tensor()
            else:
                squares = changed.square().sum(dim=1)
                dist.all_reduce(squares, group=self.mesh.get_group())
                length = squares.sqrt()
            return self._meeting(length, like)

    @property
    def _rows(self) -> torch.Size:
        return own_parameters(self.module)["weight"].shape

    def _magnitude(self, like: Tensor) -> Tensor:
        weight = own_parameters(self.module)["weight"]
        if not isinstance(weight, DTensor):
            return weight
        if isinstance(like, DTensor):
            return weight.redistribute(placements=[Replicate()])  # in backward parts of its gradient are summed
        if self._keeps_part and self.style.packed > 1:
            return self._part(weight.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()]))
        return weight.to_local()

    def _of_output(self, bias: Any, like: Tensor) -> Tensor:
        """A layer's bias as its output on this rank has it."""
        if isinstance(bias, DTensor) and isinstance(like, DTensor):
            return bias.redistribute(placements=[Replicate()])
        if not isinstance(bias, DTensor):
            return bias
        if self._keeps_part and self.style.packed > 1:  # whole on every rank
            return self._part(_local(bias))
        return bias.to_local() if self._keeps_part else bias.full_tensor()

    def _part(self, whole: Tensor) -> Tensor:
        """The rank's part of a vector of several in one."""
        boxes = cut_boxes(whole.shape, self.mesh, [packed_shard(0, self.style.packed)])
        return torch.cat([one.box.of(whole) for one in boxes])

    def _meeting(self, plain: Tensor, like: Tensor) -> Tensor:
        if not isinstance(like, DTensor):
            return plain
        return DTensor.from_local(plain, self.mesh, [Replicate()], run_check=False)


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
