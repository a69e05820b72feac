"""One rank of another side of bad_input.py: runs what asks for the same, then a step of training.

    python -m torch.distributed.run --nproc-per-node RANKS bad_rank.py SIDE CODE

Prints what was reached: ``asked`` before the code runs, ``wrapped`` after it, ``step`` after a step, with the part of
the parameters that this rank holds.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

# where hand and work are found
sys.path.insert(0, str(Path(__file__).parent / "peers"))
sys.path.insert(0, str(Path(__file__).parent / "peers" / "sides"))

import torch
import torch.distributed as dist
from hand import split
from work import Job, batches, held, loss_of, model_fields
from work import build as build_job

JOB = Job("fsdp2", "0.04M", "fp32", 1)


def build(**fields: Any) -> Any:
    """The model of the comparison, or one of transformers with these fields."""
    if not fields:
        return build_job(JOB)
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**model_fields(JOB.size), **fields))


#: side -> module -> what its code may use.
NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "hand": {
        "torch.distributed.device_mesh": ("init_device_mesh",),
        "torch.distributed.fsdp": ("CPUOffloadPolicy", "MixedPrecisionPolicy", "fully_shard"),
        "torch.distributed.tensor.parallel": ("ColwiseParallel", "parallelize_module"),
        "torch.nn.parallel": ("DistributedDataParallel",),
    },
    "accelerate": {
        "accelerate": (
            "Accelerator",
            "DistributedDataParallelKwargs",
            "FullyShardedDataParallelPlugin",
            "ParallelismConfig",
        ),
    },
    "fabric": {
        "lightning_fabric": ("Fabric",),
        "lightning_fabric.strategies": ("DDPStrategy", "ModelParallelStrategy"),
        "torch.distributed.fsdp": ("fully_shard",),
    },
}


def main() -> None:
    side, code = sys.argv[1:]
    space: dict[str, Any] = {"build": build, "split": split, "torch": torch}
    for module, names in NAMES[side].items():
        space |= {name: getattr(importlib.import_module(module), name) for name in names}
    if side == "hand":
        dist.init_process_group("gloo")
    print("asked", flush=True)
    exec(code, space)
    model = space["model"]
    print("wrapped", flush=True)
    loss = loss_of(model, next(batches(JOB, 0)))
    loss.backward()
    whole = sum(parameter.numel() for parameter in build().parameters())
    print(f"step {held(model) / whole:.2f}", flush=True)


if __name__ == "__main__":
    main()
