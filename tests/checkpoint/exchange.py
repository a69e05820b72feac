"""Every layout's checkpoint loaded under every layout: ``python -m tests.checkpoint.exchange`` writes docs/exchange.md.

A run of each layout saves after two steps and goes on; every layout then loads that checkpoint, must hold the saver's
weights and optimizer state bit for bit, and goes on as the saver did.
"""

from __future__ import annotations

import contextlib
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import Tensor
from torch.distributed.tensor import DTensor

from nemo_dist_conf.checkpoint import load, save
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.recipe.yaml_folder import config_folder
from nemo_dist_conf.runtime.engines.base import engine_of, unwrapped
from nemo_dist_conf.runtime.engines.megatron_fsdp import MegatronFSDPEngine
from nemo_dist_conf.train.step import settle, train_step
from tests.dist.cuda_shim import cuda_shim
from tests.dist.layouts import ADAMW, LLAMA, batch, composed
from tests.dist.pool import run_ranks

__all__ = ["DENSE", "EXPERTS", "ODD", "TABLE", "Layout", "Run", "exchange", "some_sources", "worst"]

TABLE = Path(__file__).parents[2] / "docs" / "exchange.md"
TOLERANCE = 1e-5
LENGTH = 16
#: The recipe's rate; see tests/dist/matrix.py.
OPTIMIZER = {**ADAMW, "lr": 0.003}
BEFORE, AFTER = 2, 2

#: Two layers, one for each pipeline rank; megatron-fsdp needs an even vocabulary.
_EVEN = {**LLAMA, "vocab_size": 98, "num_hidden_layers": 2}


@dataclass(frozen=True)
class Layout:
    """ranks: to start. words: on the command line. model: its node."""

    ranks: int
    words: tuple[str, ...]
    model: dict[str, Any] = field(default_factory=lambda: {"config": _EVEN}, hash=False)

    @property
    def is_megatron(self) -> bool:
        return "strategy=megatron_fsdp" in self.words


FSDP2 = ("strategy=fsdp2", "strategy.mp_policy=null")
MEGATRON = ("strategy=megatron_fsdp",)
TP, CP, PP, EP = (f"parallelism.{axis}_size=2" for axis in ("tp", "cp", "pp", "ep"))
REPLICAS = "parallelism.dp_replicate_size=2"

#: Four ranks each.
DENSE: dict[str, Layout] = {
    "ddp 4": Layout(4, ("strategy=ddp",)),
    "fsdp2 4": Layout(4, FSDP2),
    "hsdp 2x2": Layout(4, (*FSDP2, REPLICAS)),
    "tp 2 x dp 2, sp": Layout(4, (*FSDP2, TP, "strategy.sequence_parallel=true")),
    "cp 2 x dp 2": Layout(4, (*FSDP2, CP)),
    "pp 2 x dp 2": Layout(4, (*FSDP2, PP, "pipeline.pp_batch_size=8")),
    "megatron zero 3": Layout(4, MEGATRON),
    "megatron zero 1, tp 2": Layout(4, (*MEGATRON, TP, "strategy.zero_dp_strategy=1")),
}
_MIXTRAL: Any = OmegaConf.to_container(OmegaConf.load(config_folder() / "model" / "mixtral_tiny.yaml"))
_MIXTRAL["config"]["output_router_logits"] = False  # its loss is not there under pipelines
_MIXTRAL["config"]["num_hidden_layers"] = 2
EXPERTS: dict[str, Layout] = {
    "ddp 4": Layout(4, ("strategy=ddp",), _MIXTRAL),
    "fsdp2 4": Layout(4, FSDP2, _MIXTRAL),
    "ep 2 x dp 4": Layout(4, (*FSDP2, EP), _MIXTRAL),
    "ep 2 x pp 2": Layout(4, (*FSDP2, EP, PP, "pipeline.pp_batch_size=8"), _MIXTRAL),
    "tp 2 x dp 2": Layout(4, (*FSDP2, TP), _MIXTRAL),
    "tp 2 x ep 2 x dp 2": Layout(4, (*FSDP2, TP, EP), _MIXTRAL),
}
#: Other numbers of ranks, and sizes that nothing divides.
_ODD: dict[str, Any] = {"config": {**LLAMA, "vocab_size": 97, "num_hidden_layers": 2}}
ODD: dict[str, Layout] = {
    "1 rank": Layout(1, FSDP2, _ODD),
    "ddp 2": Layout(2, ("strategy=ddp",), _ODD),
    "fsdp2 4, sp": Layout(4, (*FSDP2, TP, "strategy.sequence_parallel=true"), _ODD),
    "tp 2 x dp 2": Layout(4, (*FSDP2, TP), _ODD),
}


@dataclass
class Run:
    """What one rank saw. weights, state: whole tensors by name, after the steps before the checkpoint, on rank 0."""

    losses: list[float] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def run(layout: Layout, target: Path | None, sources: list[Path]) -> list[Run]:
    """Save to ``target`` after some steps and go on; or go on from each of ``sources`` in turn."""
    with cuda_shim() if layout.is_megatron else contextlib.nullcontext():
        cfg = composed(*layout.words, model=layout.model, optimizer=OPTIMIZER, seed=1)
        setup, model, optimizer = instantiate(cfg)
        if target is None:
            settle(model, optimizer, [_part(setup)[0]], setup.mesh_context)
            return [_go_on(setup, model, optimizer, source) for source in sources]
        for _ in range(BEFORE):
            _step(setup, model, optimizer)
        save(target, model, optimizer, step=BEFORE, config=cfg)
        return [_go_on(setup, model, optimizer, None)]


def _go_on(setup: Any, model: Any, optimizer: Any, source: Path | None) -> Run:
    if source is not None:
        assert load(source, model, optimizer).step == BEFORE
    tensors = _whole_state(model, optimizer)
    losses = [_step(setup, model, optimizer) for _ in range(AFTER)]
    return Run(losses, tensors if dist.get_rank() == 0 else {})


def _step(setup: Any, model: Any, optimizer: Any) -> float:
    part, tokens = _part(setup)
    return train_step(model, optimizer, [part], setup.mesh_context, global_tokens=tokens, max_grad_norm=1.0).loss


def _part(setup: Any) -> tuple[Any, int]:
    """This rank's part of the batch, and the tokens that count in all of it."""
    context, everything = setup.mesh_context, batch(LENGTH)
    part = context.split_sequence(*(t.chunk(context.data_size)[context.data_rank] for t in everything))
    return part, int((everything[1] != -100).sum())


def _whole_state(model: Any, optimizer: Any) -> dict[str, Tensor]:
    """Weights and optimizer state in full, put together by torch's own means, not by what is tested."""
    if MegatronFSDPEngine.owns(model):
        engine_of(model).show_shards(model)
    found: dict[str, Tensor] = {}
    parameters = dict(model.named_parameters() if hasattr(model, "pp_mesh") else unwrapped(model).named_parameters())
    for name, parameter in parameters.items():
        found[name] = _whole(parameter, parameter)
        state = optimizer.state.get(parameter, {})
        for key in ("exp_avg", "exp_avg_sq"):
            local = state.get(key)
            if (
                MegatronFSDPEngine.owns(model) and local is None
            ):  # the library keeps none for what this rank has nothing of
                local = torch.zeros_like(parameter)
            found[f"{name}/{key}"] = _whole(local, parameter)
        if "step" in state:
            found[f"{name}/step"] = torch.Tensor.detach(state["step"]).clone()
    if not hasattr(model, "pp_mesh"):
        return found
    everywhere: list[Any] = [None] * model.pp_mesh.size()
    dist.all_gather_object(everywhere, found, group=model.pp_mesh.get_group())
    return {name: value for rank in everywhere for name, value in rank.items()}


def _whole(value: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(value, DTensor):
        return value.detach().clone()
    told = getattr(parameter._local_tensor, "__create_chunk_list__", None)  # type: ignore[attr-defined]
    if told is None:
        return value.full_tensor().detach().clone()
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, (tuple(told()[0].offsets), value._local_tensor.detach().clone()))
    whole = torch.full(value.shape, torch.nan)
    for offsets, part in everywhere:
        whole[tuple(slice(begin, begin + size) for begin, size in zip(offsets, part.shape))] = part
    return whole


def some_sources(layouts: dict[str, Layout], name: str) -> list[str]:
    """Enough for every layout to be a source and a target several times: itself, and the two before it."""
    names = list(layouts)
    at = names.index(name)
    return [name, names[at - 1], names[at - 2]]


def exchange(layouts: dict[str, Layout], all_pairs: bool = True) -> dict[tuple[str, str], tuple[bool, float]]:
    """(saved under, loaded under) -> whether all tensors are the same bits, worst relative difference of the losses.

    all_pairs false: each layout loads ``some_sources`` only.
    """
    folder = Path(tempfile.mkdtemp())
    try:
        saved = {name: run_ranks(of.ranks, run, of, folder / name, [])[0][0] for name, of in layouts.items()}
        found = {}
        for name, of in layouts.items():
            sources = list(layouts) if all_pairs else some_sources(layouts, name)
            loaded = run_ranks(of.ranks, run, of, None, [folder / source for source in sources], timeout_s=300)[0]
            for source, went_on in zip(sources, loaded, strict=True):
                found[source, name] = _compare(saved[source], went_on)
        return found
    finally:
        shutil.rmtree(folder)


def _compare(saved: Run, loaded: Run) -> tuple[bool, float]:
    names = {name for name in saved.tensors if not name.endswith("/step")}
    same = names == {name for name in loaded.tensors if not name.endswith("/step")}
    same = same and all(torch.equal(saved.tensors[name], loaded.tensors[name]) for name in names)
    steps = {float(value) for name, value in loaded.tensors.items() if name.endswith("/step")}
    pairs = zip(saved.losses, loaded.losses, strict=True)
    return same and steps == {float(BEFORE)}, max(abs(mine - theirs) / abs(theirs) for theirs, mine in pairs)


def worst(found: dict[tuple[str, str], tuple[bool, float]]) -> list[str]:
    """Pairs that are not as they have to be: other bits, or losses that differ (within a layout, at all)."""
    return [
        f"{source} -> {target}: {'' if same else 'other bits, '}losses differ by {difference:.1e}"
        for (source, target), (same, difference) in found.items()
        if not same or difference > (0.0 if source == target else TOLERANCE)
    ]


def _table(title: str, layouts: dict[str, Layout], found: dict[tuple[str, str], tuple[bool, float]]) -> str:
    lines = [f"## {title}", "", "| saved under \\ loaded under | " + " | ".join(layouts) + " |"]
    lines.append("|---" * (len(layouts) + 1) + "|")
    for source in layouts:
        cells = [f"{found[source, target][1]:.0e}" if found[source, target][0] else "other bits" for target in layouts]
        lines.append(f"| {source} | " + " | ".join("0" if cell == "0e+00" else cell for cell in cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parts, wrong = [], []
    for title, layouts in (("Dense, 4 ranks", DENSE), ("Experts, 4 ranks", EXPERTS), ("1 to 4 ranks, 97 ids", ODD)):
        found = exchange(layouts)
        wrong += worst(found)
        parts.append(_table(title, layouts, found))
    text = f"""# Checkpoints, from every layout to every layout

Each cell: the worst relative difference of the next two losses from those of the run that saved (fp32, AdamW). In every
cell the weights and the optimizer's state are the same bits as the saver's, and 0 stands for the same losses, bit for
bit. {date.today()}, torch {torch.__version__}, gloo, {platform.machine()}. megatron-fsdp ran with the test-only
stand-in for torch.cuda (tests/dist/cuda_shim.py).

    python -m tests.checkpoint.exchange

"""
    TABLE.write_text(text + "\n\n".join(parts) + "\n")
    print(*wrong, sep="\n")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(main())
