"""What torch does not publish of its parallel styles, and of how parameters are split."""

from __future__ import annotations

from typing import Any, Callable

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Shard
from torch.distributed.tensor.parallel import ParallelStyle
from torch.distributed.tensor.placement_types import _StridedShard

__all__ = ["Style", "laid_out_by", "packed_shard"]


class Style(ParallelStyle):
    """A parallel style of our own: ``parallelize_module`` calls ``parallelized(module, mesh)``.

    torch 2.11 to 2.13: styles are published, and made by overriding a method with an underscore.
    Test: tests/dist/test_tensor_parallel.py, test_training_equals_one_process.
    """

    def parallelized(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        """The module, changed in place."""
        raise NotImplementedError

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        return self.parallelized(module, device_mesh)


def laid_out_by(
    style: type[ParallelStyle], prepare_input: Callable[..., Any], prepare_output: Callable[..., Any]
) -> Callable[..., ParallelStyle]:
    """ColwiseParallel or RowwiseParallel with other functions around forward.

    prepare_input: of (layouts of the input, layouts that are wanted, module, inputs, mesh); prepare_output: of (layouts
    of the output, whether it is to be local, module, output, mesh).
    torch 2.11 to 2.13: the styles' own redistribute what is laid out already, and gather into views.
    Test: tests/dist/test_tensor_parallel.py, test_training_equals_one_process.
    """
    around = {"_prepare_input_fn": staticmethod(prepare_input), "_prepare_output_fn": staticmethod(prepare_output)}
    return type(style.__name__, (style,), around)


def packed_shard(dim: int, packed: int) -> Placement:
    """Shard(dim) of each of so many weights of one size that lie in a row along the dimension.

    torch 2.11 to 2.13: fully_shard lays out so what tensor parallelism has split already; nothing published does.
    Test: tests/dist/test_tensor_styles.py.
    """
    return _StridedShard(dim, split_factor=packed) if packed > 1 else Shard(dim)
