"""Precision and offload policies as typed nodes; dtypes by name, so that no string reaches torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from nemo_dist_conf.names import DType
from nemo_dist_conf.schema.option import option

__all__ = ["MixedPrecisionConf", "OffloadConf"]


@dataclass
class MixedPrecisionConf:
    """torch.distributed.fsdp.MixedPrecisionPolicy, typed by name."""

    enabled: bool = option(True, "false (or null for the whole node): no policy, everything in the parameters' dtype")
    param_dtype: Optional[DType] = option(
        DType.bfloat16, "dtype of the gathered parameters, so of the compute; null: the stored dtype"
    )
    reduce_dtype: Optional[DType] = option(DType.float32, "dtype in which gradients are reduced; null: as param_dtype")
    output_dtype: Optional[DType] = option(
        DType.bfloat16, "dtype to which the model's floating point outputs are cast; null: not cast"
    )
    cast_forward_inputs: bool = option(True, "cast floating point inputs of forward to param_dtype")


@dataclass
class OffloadConf:
    """torch.distributed.fsdp.CPUOffloadPolicy, typed."""

    enabled: bool = option(False, "keep parameters, gradients and optimizer state in host memory")
    pin_memory: bool = option(True, "page-lock the host copies (faster copies to the GPU; off on a CPU-only machine)")
