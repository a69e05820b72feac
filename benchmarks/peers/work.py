"""The work that every side does: one model, the same weights and batches, and what is measured of it in a rank."""

from __future__ import annotations

import dataclasses
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Iterator

__all__ = [
    "ADAMW",
    "MAX_GRAD_NORM",
    "SIZES",
    "TOLERANCE",
    "Job",
    "batches",
    "build",
    "fill",
    "flops_per_token",
    "held",
    "loss_of",
    "model_fields",
    "peak_mb",
    "synchronize",
]

ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MAX_GRAD_NORM = 1.0

#: Fields of transformers' LlamaConfig; rows and tokens of a data rank's batch stand beside them.
SIZES: dict[str, dict[str, int]] = {
    "0.04M": {"hidden": 32, "mlp": 64, "layers": 2, "heads": 2, "vocab": 256, "rows": 2, "tokens": 16},
    "0.4M": {"hidden": 96, "mlp": 256, "layers": 3, "heads": 4, "vocab": 256, "rows": 4, "tokens": 64},
    "12M": {"hidden": 384, "mlp": 1024, "layers": 5, "heads": 6, "vocab": 4096, "rows": 2, "tokens": 64},
    "1.2B": {"hidden": 2048, "mlp": 8192, "layers": 16, "heads": 32, "vocab": 32000, "rows": 4, "tokens": 2048},
}
#: How far losses may be from those of the hand-written side, relative.
TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}
#: What wrappers put before a parameter's name, and into it.
_PREFIXES = ("_forward_module.", "module.")
_INFIXES = ("_orig_mod.", "_checkpoint_wrapped_module.")


@dataclass(frozen=True)
class Job:
    """One cell of the comparison. strategy: ddp, fsdp2, or tp (tp over 2 ranks, fully_shard over the others).

    compile, checkpointing: of every decoder layer (full checkpointing).
    """

    strategy: str
    size: str
    dtype: str
    world: int
    device: str = "cpu"
    compile: bool = False
    checkpointing: bool = False

    @property
    def tp(self) -> int:
        return 2 if self.strategy == "tp" else 1

    @property
    def adamw(self) -> dict[str, Any]:
        """The optimizer's settings: on a GPU every side asks for the fused kernel, as scripts for GPUs do."""
        return {**ADAMW, "fused": True} if self.device == "cuda" else ADAMW

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        added = [name for name in ("compile", "checkpointing") if getattr(self, name)]
        return " ".join([self.strategy, self.size, self.dtype, f"x{self.world}", *(f"+ {name}" for name in added)])


def model_fields(size: str) -> dict[str, Any]:
    shape = SIZES[size]
    return {
        "vocab_size": shape["vocab"],
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["mlp"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["heads"],
        "max_position_embeddings": max(1024, shape["tokens"]),
        "tie_word_embeddings": False,
        "use_cache": False,
    }


def build(job: Job) -> Any:
    """As a script without a framework builds it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(job.device):
        return LlamaForCausalLM(LlamaConfig(**model_fields(job.size)))


def fill(model: Any) -> None:
    """Weights that depend on a parameter's name only, into whatever part of it this rank holds."""
    import torch
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for infix in _INFIXES:
                name = name.replace(infix, "")
            while name.startswith(_PREFIXES):
                name = name.split(".", 1)[1]
            generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
            full = torch.ones(parameter.shape, device=parameter.device)
            if parameter.dim() > 1:
                full.normal_(0.0, 0.02, generator=generator)
            local = parameter
            if hasattr(parameter, "placements"):
                shape, offset = compute_local_shape_and_global_offset(
                    parameter.shape, parameter.device_mesh, parameter.placements
                )
                full = full[tuple(slice(start, start + size) for start, size in zip(offset, shape))]
                local = parameter.to_local()
            local.copy_(full)


def flops_per_token(size: str) -> float:
    """Of forward and backward, without what checkpointing repeats: 6 for each weight that is multiplied by, and
    attention's two products over the whole sequence (PaLM, appendix B: https://arxiv.org/abs/2204.02311).
    """
    shape = SIZES[size]
    layer = 4 * shape["hidden"] ** 2 + 3 * shape["hidden"] * shape["mlp"]
    weights = shape["layers"] * layer + shape["vocab"] * shape["hidden"]
    return 6 * weights + 12 * shape["layers"] * shape["hidden"] * shape["tokens"]


def held(model: Any) -> int:
    """Elements of parameters on this rank."""
    return sum(getattr(parameter, "_local_tensor", parameter).numel() for parameter in model.parameters())


def batches(job: Job, data_rank: int) -> Iterator[Any]:
    """[rows, tokens + 1] of one data rank, for ever."""
    import torch

    shape = SIZES[job.size]
    generator = torch.Generator().manual_seed(1000 + data_rank)
    while True:
        yield torch.randint(shape["vocab"], (shape["rows"], shape["tokens"] + 1), generator=generator).to(job.device)


def loss_of(model: Any, batch: Any) -> Any:
    """Mean cross entropy of the next token, in fp32."""
    from torch.nn.functional import cross_entropy

    logits = model(input_ids=batch[:, :-1]).logits
    return cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


def peak_mb(device: str) -> float:
    """Peak of this rank: resident memory, or what was allocated on the GPU."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**20
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def synchronize(device: str) -> float:
    """Wait for the GPU; the time then."""
    if device == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()
