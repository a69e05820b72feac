"""Step time and peak memory of every kind of layout, and what pipeline and context parallelism cost by hand.

    python benchmarks/layouts.py --json benchmarks/results/layouts.json --markdown benchmarks/results/layouts.md

Four gloo ranks of this machine, fp32, one Llama and the same global batch for all:

step    seconds of forward, backward, clipping and optimizer step. Where there is a hand-written side, both models live
        in the same processes and take turns step by step, so a busy machine slows both; the ratio is the median of
        those of neighbouring steps.
memory  peak resident MB of the fullest rank after some steps, in processes of its own (both sides have composed the
        config). Least of the repeats.

By hand: torch.distributed.pipelining (1F1B) and fully_shard; keys and values gathered over cp for
scaled_dot_product_attention, and fully_shard. Both sides start from the same weights; the run fails if a loss differs.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import statistics
from pathlib import Path
from typing import Any, Callable

import report
from ranks import SIDES, joined, largest, on_ranks, pair_ratio, peak_mb, timed

WORLD_SIZE = 4
SEED = 0
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
SIZES: dict[str, dict[str, int]] = {
    "0.1M": {"hidden": 32, "layers": 4, "heads": 4, "vocab": 128, "rows": 8, "tokens": 16},
    "9M": {"hidden": 320, "layers": 8, "heads": 5, "vocab": 2048, "rows": 8, "tokens": 128},
}
MICROBATCHES = 4
#: layout -> overrides; those with a hand-written side first.
LAYOUTS: dict[str, tuple[str, ...]] = {
    "pp 2 x dp_shard 2": ("parallelism.pp_size=2", "pipeline=1f1b"),
    "dp_shard 2 x cp 2": ("parallelism.cp_size=2",),
    "ddp 4": ("strategy=ddp",),
    "dp_shard 4": (),
    "dp_replicate 2 x dp_shard 2": ("parallelism.dp_replicate_size=2",),
    "pp 2 x dp_shard 2, gpipe": ("parallelism.pp_size=2", "pipeline=gpipe"),
    "pp 2 x dp_shard 2, zbv_zero_bubble": ("parallelism.pp_size=2", "pipeline=zbv_zero_bubble"),
}
BY_HAND = ("pp 2 x dp_shard 2", "dp_shard 2 x cp 2")


def llama_fields(size: str) -> dict[str, Any]:
    shape = SIZES[size]
    return {
        "vocab_size": shape["vocab"],
        "hidden_size": shape["hidden"],
        "intermediate_size": 2 * shape["hidden"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["heads"],
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "use_cache": False,
    }


def data_ranks(layout: str) -> int:
    return 2 if "2 x" in layout and "replicate" not in layout else WORLD_SIZE


# --------------------------------------------------------------------------------------- ours


def compose_ours(layout: str, size: str) -> Any:
    from hydra import compose, initialize
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf, open_dict

    words = list(LAYOUTS[layout])
    words += [] if "strategy=ddp" in words else ["strategy.mp_policy=null"]
    if any("pp_size" in word for word in words):
        rows = SIZES[size]["rows"] // 2
        words += [f"pipeline.pp_batch_size={rows}", f"pipeline.pp_microbatch_size={rows // MICROBATCHES}"]
    GlobalHydra.instance().clear()
    with initialize(config_path=None, version_base="1.3"):
        cfg = compose("nemo_dist_conf", words)
    with open_dict(cfg):
        cfg.seed = SEED
        cfg.model = {"config": {"model_type": "llama", **llama_fields(size)}}
        cfg.optimizer = OmegaConf.create({"name": "adamw", **ADAMW, "betas": list(ADAMW["betas"])})
    return cfg


def build_ours(cfg: Any) -> tuple[Any, Callable[[Any, Any, int], float]]:
    """The wrapped model, and a step: (ids, labels of this data rank, tokens of the global batch) -> loss."""
    from nemo_dist_conf import instantiate
    from nemo_dist_conf.train.step import train_step

    setup, model, optimizer = instantiate(cfg)
    context = setup.mesh_context

    def step(ids: Any, labels: Any, tokens: int) -> float:
        ids, labels = context.split_sequence(ids, labels)
        done = train_step(model, optimizer, [(ids, labels)], context, global_tokens=tokens, max_grad_norm=1.0)
        return done.loss

    return model, step


# --------------------------------------------------------------------------------------- by hand


def shard_hand(model: Any, layers: Any, mesh: Any, last_reshards: bool) -> None:
    from torch.distributed.fsdp import fully_shard

    for index, layer in enumerate(layers):
        fully_shard(layer, mesh=mesh, reshard_after_forward=last_reshards and index < len(layers) - 1)
    fully_shard(model, mesh=mesh)


def clip_hand(parameters: list[Any], group: Any = None) -> None:
    import torch
    import torch.distributed as dist
    from torch.nn.utils import clip_grads_with_norm_, get_total_norm

    total = get_total_norm([p.grad for p in parameters]).full_tensor() ** 2  # type: ignore[attr-defined]
    if group is not None:
        dist.all_reduce(total, group=group)
    clip_grads_with_norm_(parameters, 1.0, torch.sqrt(total))


def build_hand_cp(size: str) -> tuple[Any, Callable[[Any, Any, int], float]]:
    """Chunks r and 3 - r of four on each of two ranks; keys and values of both gathered for every layer."""
    import torch
    import torch.distributed as dist
    import torch.distributed._functional_collectives as funcol
    import torch.nn.functional as F
    from torch.distributed.device_mesh import init_device_mesh
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "cp"))
    both, group, rank = mesh["dp", "cp"]._flatten("both"), mesh.get_group("cp"), mesh.get_local_rank("cp")
    gather = getattr(funcol, "all_gather_single_autograd", None) or funcol.all_gather_tensor_autograd

    def attention(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **_: Any) -> Any:
        chunk, outputs = query.size(2) // 2, []
        whole = []
        for part in (key, value):
            pieces = gather(part.contiguous(), 2, group).chunk(4, dim=2)
            whole.append(torch.cat([pieces[0], pieces[2], pieces[3], pieces[1]], dim=2))
        for index, part in zip((rank, 3 - rank), query.chunk(2, dim=2)):
            end = (index + 1) * chunk
            positions = torch.arange(end - chunk, end)[:, None]
            seen = torch.arange(end) <= positions
            out = F.scaled_dot_product_attention(
                part, whole[0][:, :, :end], whole[1][:, :, :end], attn_mask=seen, scale=scaling
            )
            outputs.append(out)
        return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None

    AttentionInterface.register("by_hand", attention)
    torch.manual_seed(SEED)
    model = LlamaForCausalLM(LlamaConfig(**llama_fields(size), attn_implementation="by_hand"))
    shard_hand(model, model.model.layers, both, True)
    parameters = list(model.parameters())
    optimizer = adamw(parameters)

    def step(ids: Any, labels: Any, tokens: int) -> float:
        chunk = ids.size(1) // 4
        positions = torch.cat([torch.arange(i * chunk, (i + 1) * chunk) for i in (rank, 3 - rank)])
        ids, labels = ids[:, positions], labels[:, positions]
        logits = model(input_ids=ids, position_ids=positions.expand(ids.size(0), -1)).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
        (loss * WORLD_SIZE / tokens).backward()
        total = loss.detach()
        dist.all_reduce(total)
        clip_hand(parameters)
        optimizer.step()
        optimizer.zero_grad()
        return float(total) / tokens

    return model, step


def build_hand_pp(size: str) -> tuple[Any, Callable[[Any, Any, int], float]]:
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B
    from transformers import LlamaConfig, LlamaForCausalLM

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("pp", "dp"))
    group, index = mesh.get_group("pp"), mesh.get_local_rank("pp")
    torch.manual_seed(SEED)
    whole = LlamaForCausalLM(LlamaConfig(**llama_fields(size)))
    half = SIZES[size]["layers"] // 2

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            if index == 0:
                self.embed = whole.model.embed_tokens
            self.layers = whole.model.layers[:half] if index == 0 else whole.model.layers[half:]
            if index == 1:
                self.norm, self.head = whole.model.norm, whole.lm_head
            self.rotary = whole.model.rotary_emb

        def forward(self, x: Any) -> Any:
            x = self.embed(x) if index == 0 else x
            places = torch.arange(x.size(1))[None]
            embeddings = self.rotary(x, position_ids=places)
            for layer in self.layers:
                x = layer(x, position_embeddings=embeddings, position_ids=places)
            return self.head(self.norm(x)) if index == 1 else x

    model = Stage()
    shard_hand(model, model.layers, mesh["dp"], False)
    parameters = list(model.parameters())
    optimizer = adamw(parameters)
    scale = [1.0]

    def loss_fn(logits: Any, labels: Any) -> Any:
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") * scale[0]

    stage = PipelineStage(model, index, 2, torch.device("cpu"), group=group)
    schedule = Schedule1F1B(stage, MICROBATCHES, loss_fn, scale_grads=False)

    def step(ids: Any, labels: Any, tokens: int) -> float:
        losses: list[Any] = []
        scale[0] = 2 / tokens
        if index == 0:
            schedule.step(ids, return_outputs=False)
        else:
            schedule.step(target=labels, losses=losses, return_outputs=False)
        total = torch.stack(losses).detach().sum() / 2 if losses else torch.zeros(())
        dist.all_reduce(total)
        clip_hand(parameters, group)
        optimizer.step()
        optimizer.zero_grad()
        return float(total)

    return model, step


def adamw(parameters: list[Any]) -> Any:
    import torch

    decayed, spared = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, **ADAMW)


def builder(side: str, layout: str, size: str) -> Callable[[], tuple[Any, Callable[[Any, Any, int], float]]]:
    cfg = compose_ours(layout, size)  # on both sides: a Hydra app is a Hydra app, however it wraps its model
    if side == "ours":
        return functools.partial(build_ours, cfg)
    return functools.partial(build_hand_pp if layout.startswith("pp") else build_hand_cp, size)


# --------------------------------------------------------------------------------------- in a rank


def batch(layout: str, size: str, number: int, rank: int) -> tuple[Any, Any, int]:
    """(ids, labels) of this rank's data rank and the tokens of the global batch."""
    import torch

    shape = SIZES[size]
    generator = torch.Generator().manual_seed(1000 + number)
    rows = torch.randint(shape["vocab"], (shape["rows"], shape["tokens"] + 1), generator=generator)
    # Of two data ranks, cp peers are neighbours (0 1 | 2 3) and pp peers are not (0 2 | 1 3).
    count = data_ranks(layout)
    place = rank if count == WORLD_SIZE else rank % 2 if layout.startswith("pp") else rank // 2
    own = rows.chunk(count)[place]
    return own[:, :-1].contiguous(), own[:, 1:].contiguous(), shape["rows"] * shape["tokens"]


def copy_weights(source: Any, target: Any) -> None:
    import torch

    pairs = zip(source.parameters(), target.parameters(), strict=True)
    with torch.no_grad():
        for value, parameter in pairs:
            ours, theirs = (getattr(p, "_local_tensor", p) for p in (value, parameter))
            theirs.copy_(ours)


def compare(rank: int, folder: str, layout: str, size: str, steps: int) -> None:
    """Step times of the sides that there are, in the same processes; rank 0 writes what it found."""
    with joined(rank, folder, WORLD_SIZE):
        sides = SIDES if layout in BY_HAND else ("ours",)
        built = {side: builder(side, layout, size)() for side in sides}
        if "hand" in built:
            copy_weights(built["ours"][0], built["hand"][0])
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        worst, warm_up = 0.0, 3
        gc.collect()
        gc.disable()
        for number in range(warm_up + steps):
            given, losses = batch(layout, size, number, rank), {}
            for side in sides if number % 2 else reversed(sides):
                took, losses[side] = timed(lambda: built[side][1](*given))
                if number >= warm_up:
                    seconds[side].append(took)
            if "hand" in losses:
                worst = max(worst, abs(losses["ours"] - losses["hand"]) / losses["hand"])
                if worst > 1e-4:
                    raise AssertionError(f"{layout}, step {number}: losses differ, {losses}")
        if rank == 0:
            Path(folder, "found.json").write_text(json.dumps({"step_s": seconds, "loss_difference": worst}))


def alone(rank: int, folder: str, side: str, layout: str, size: str) -> None:
    import transformers

    assert transformers.LlamaForCausalLM  # imported lazily; neither side's cost
    with joined(rank, folder, WORLD_SIZE):
        _, step = builder(side, layout, size)()
        for number in range(4):
            step(*batch(layout, size, number, rank))
        peak = largest(peak_mb())
        if rank == 0:
            Path(folder, "found.json").write_text(json.dumps({"peak_mb": peak}))


# --------------------------------------------------------------------------------------- in the parent


def measure(layout: str, size: str, options: argparse.Namespace) -> dict[str, Any]:
    found = on_ranks(WORLD_SIZE, compare, layout, size, options.steps)
    sides = list(found["step_s"])
    memory = {
        side: min(on_ranks(WORLD_SIZE, alone, side, layout, size)["peak_mb"] for _ in range(options.repeats))
        for side in (sides if options.repeats else ())
    }
    result: dict[str, Any] = {
        "layout": layout,
        "size": size,
        "step_ms": {side: 1e3 * statistics.median(found["step_s"][side]) for side in sides},
        **({"memory_mb": memory} if memory else {}),
        "loss_difference": found["loss_difference"],
    }
    if "hand" in sides:
        result["step_ratio"] = pair_ratio(found["step_s"])
        if memory:
            result["memory_ratio"] = memory["ours"] / memory["hand"]
    return result


COLUMNS = ("layout", "measure", "by hand", "ours", "ratio", "aim")


def table(results: list[dict[str, Any]]) -> str:
    rows = []
    for result in results:
        for name, key, digits in (("step [ms]", "step_ms", 1), ("memory [MB]", "memory_mb", 1)):
            if key not in result:
                continue
            values, ratio = result[key], result.get(key.split("_")[0] + "_ratio")
            hand = f"{values['hand']:.{digits}f}" if "hand" in values else ""
            shown = (f"{ratio:.3f}", "1.03") if ratio else ("", "")
            rows.append((result["layout"], name, hand, f"{values['ours']:.{digits}f}", *shown))
    return report.table(COLUMNS, rows)


def markdown(measured: dict[str, Any]) -> str:
    machine = measured["hardware"]
    worst = max(result["loss_difference"] for result in measured["results"])
    return f"""# Layouts on four ranks

{__doc__.splitlines()[0]} What each measure means stands at the top of [layouts.py](../layouts.py).

{table(measured["results"])}

Llama of {measured["size"]} parameters; largest relative difference of a loss between the sides {worst:.1e}.
Measured {measured["date"]} on {machine["cpu"]}, {machine["cores"]} cores, {machine["ram_gib"]} GiB;
{WORLD_SIZE} gloo ranks, 1 thread each, load before the run {machine["load_before"]}.
Versions: {report.used(measured)}.

    {measured["command"]}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="9M")
    parser.add_argument("--layout", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--steps", type=int, default=40, help="steps, or pairs of steps (default 40)")
    parser.add_argument("--repeats", type=int, default=2, help="groups for memory (default 2); 0: none")
    parser.add_argument("--quick", action="store_true", help="the smallest model and few of everything: a smoke test")
    report.add_files(parser)
    options = parser.parse_args()
    if options.quick:
        options.size, options.steps, options.repeats, options.layout = "0.1M", 3, 0, list(BY_HAND)
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # compiling modules in every rank would count as ours
    measured = report.new_report(__file__, size=options.size)
    for layout in options.layout:
        measured["results"].append(measure(layout, options.size, options))
    report.finish(measured, options, table(measured["results"]), markdown)


if __name__ == "__main__":
    main()
