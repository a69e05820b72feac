"""The group ``hardware``: what a kind of machine can do, and the figures of known ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from nemo_dist_conf.schema.option import option

__all__ = ["HardwareConf", "PROFILES", "profile_of_device"]


@dataclass
class HardwareConf:
    """One kind of machine: what a rank has, and what lies between ranks. Vendors' figures, without sparsity."""

    name: str = option(MISSING, "as it is shown")
    device: str = option("cuda", "cuda or cpu")
    memory_gib: float = option(MISSING, "memory of a rank [GiB]")
    reserved_gib: float = option(3.0, "of it, what the driver, NCCL and fragmentation take [GiB]")
    bf16_tflops: float = option(MISSING, "dense matrix products in bfloat16 [TFLOP/s]")
    fp32_tflops: float = option(MISSING, "the same in float32 [TFLOP/s]")
    memory_gb_s: float = option(MISSING, "bandwidth of a rank's memory [GB/s]")
    ranks_per_node: int = option(8, "ranks that share a node and its fast links")
    intra_node_gb_s: float = option(MISSING, "bandwidth of a rank to others of its node, one direction [GB/s]")
    inter_node_gb_s: float = option(MISSING, "bandwidth of a rank to other nodes, one direction [GB/s]")
    intra_node_latency_us: float = option(10.0, "time that a collective inside a node takes before its first byte [us]")
    inter_node_latency_us: float = option(25.0, "the same between nodes [us]")
    kernel_launch_us: float = option(4.5, "time that the host takes to start a kernel [us]")
    matmul_efficiency: float = option(0.7, "part of the peak that large matrix products reach")
    attention_efficiency: float = option(0.5, "part of the peak that attention kernels reach")
    bandwidth_efficiency: float = option(0.8, "part of memory and link bandwidth that is reached")
    source: str = option("", "where the figures come from")


_NVLINK4 = {"intra_node_gb_s": 450.0, "inter_node_gb_s": 50.0}

#: Option -> values that differ from HardwareConf's defaults. Peaks are those of data sheets for dense matrices; the
#: efficiencies are fitted to published runs (benchmarks/results/plan.md), those of b200 and mi300x are h100's.
PROFILES: dict[str, dict[str, Any]] = {
    "h100": {
        "name": "NVIDIA H100 SXM 80 GB",
        "memory_gib": 79.0,
        "bf16_tflops": 989.0,
        "fp32_tflops": 67.0,
        "memory_gb_s": 3350.0,
        **_NVLINK4,
        "matmul_efficiency": 0.66,
        "source": "NVIDIA H100 Tensor Core GPU data sheet; NVLink 900 GB/s both ways, one 400 Gb/s adapter a GPU",
    },
    "h200": {
        "name": "NVIDIA H200 SXM 141 GB",
        "memory_gib": 139.0,
        "bf16_tflops": 989.0,
        "fp32_tflops": 67.0,
        "memory_gb_s": 4800.0,
        **_NVLINK4,
        "matmul_efficiency": 0.66,
        "source": "NVIDIA H200 Tensor Core GPU data sheet; NVLink 900 GB/s both ways, one 400 Gb/s adapter a GPU",
    },
    "b200": {
        "name": "NVIDIA B200 180 GB",
        "memory_gib": 178.0,
        "bf16_tflops": 2250.0,
        "fp32_tflops": 75.0,
        "memory_gb_s": 7700.0,
        "intra_node_gb_s": 900.0,
        "inter_node_gb_s": 50.0,
        "matmul_efficiency": 0.66,
        "source": "NVIDIA HGX B200 data sheet, per GPU; NVLink 1.8 TB/s both ways, one 400 Gb/s adapter a GPU",
    },
    "a100": {
        "name": "NVIDIA A100 SXM 80 GB",
        "memory_gib": 79.0,
        "bf16_tflops": 312.0,
        "fp32_tflops": 19.5,
        "memory_gb_s": 2039.0,
        "intra_node_gb_s": 300.0,
        "inter_node_gb_s": 25.0,
        "matmul_efficiency": 0.72,
        "attention_efficiency": 0.6,
        "source": "NVIDIA A100 Tensor Core GPU data sheet; NVLink 600 GB/s both ways, one 200 Gb/s adapter a GPU",
    },
    "mi300x": {
        "name": "AMD Instinct MI300X 192 GB",
        "memory_gib": 191.0,
        "bf16_tflops": 1307.4,
        "fp32_tflops": 163.4,
        "memory_gb_s": 5300.0,
        "intra_node_gb_s": 448.0,
        "inter_node_gb_s": 50.0,
        "matmul_efficiency": 0.5,
        "source": "AMD Instinct MI300X data sheet; seven 128 GB/s links both ways, one 400 Gb/s adapter a GPU",
    },
    "cpu": {
        "name": "a CPU core",
        "device": "cpu",
        "memory_gib": 8.0,
        "reserved_gib": 0.5,
        "bf16_tflops": 0.05,
        "fp32_tflops": 0.1,
        "memory_gb_s": 10.0,
        "ranks_per_node": 2,
        "intra_node_gb_s": 1.0,
        "inter_node_gb_s": 1.0,
        "intra_node_latency_us": 300.0,
        "inter_node_latency_us": 500.0,
        "matmul_efficiency": 0.6,
        "source": "a server core with AVX-512, gloo; for trying things out, so give your own figures",
    },
}


def profile_of_device(name: str) -> str | None:
    """The profile of a device by the name that its driver gives it; None for an unknown one."""
    lower = name.lower()
    return next((profile for profile in PROFILES if profile != "cpu" and profile in lower), None)
