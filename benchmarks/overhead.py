"""What a model that `instantiate` wrapped costs beside the same model wrapped by hand.

    python benchmarks/overhead.py --json benchmarks/results/overhead.json --markdown benchmarks/results/overhead.md

For DDP and for per-block fully_shard, on gloo ranks of this machine, in fp32:

wrap    seconds from plain values (ours: the composed config) to the wrapped model and its optimizer. The process
        group exists and the modules are imported on both sides. Median of pairs, built one after the other.
first   the same for the first model of a fresh process, with whatever is imported only then.
step    seconds of forward, backward, clipping and optimizer step. Both models live in the same processes and take
        turns step by step, so a busy machine slows both. Median of the ratios of neighbouring steps.
memory  peak resident MB of the fullest rank after some steps, each side in processes of its own (both have composed
        the config). Least of the repeats.

Both sides start from the same weights and see the same batches; the run fails if a loss differs.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Iterator

import report
from ranks import SIDES, joined, largest, on_ranks, pair_ratio, peak_mb, timed

if TYPE_CHECKING:
    import torch

WORLD_SIZE = 2
SEED = 0
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
MAX_GRAD_NORM = 1.0
STRATEGIES = ("ddp", "fsdp2")

#: Fields of transformers' LlamaConfig; rows and tokens of a rank's batch stand beside them.
SIZES: dict[str, dict[str, Any]] = {
    "0.04M": {"hidden": 32, "mlp": 64, "layers": 2, "heads": 2, "vocab": 256, "rows": 2, "tokens": 16},
    "0.4M": {"hidden": 96, "mlp": 256, "layers": 3, "heads": 4, "vocab": 256, "rows": 4, "tokens": 64},
    "12M": {"hidden": 384, "mlp": 1024, "layers": 5, "heads": 6, "vocab": 4096, "rows": 2, "tokens": 64},
}


def llama_fields(size: str) -> dict[str, Any]:
    shape = SIZES[size]
    return {
        "vocab_size": shape["vocab"],
        "hidden_size": shape["hidden"],
        "intermediate_size": shape["mlp"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["heads"],
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "use_cache": False,
    }


# --------------------------------------------------------------------------------------- the two sides


def build_llama(size: str) -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    return LlamaForCausalLM(LlamaConfig(**llama_fields(size)))


def adamw(model: Any) -> torch.optim.Optimizer:
    """As most people write it: norms do not decay."""
    import torch

    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.dim() > 1]
    spared = [p for p in parameters if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, **ADAMW)


def wrap_hand_ddp(size: str) -> tuple[Any, torch.optim.Optimizer]:
    from torch.nn.parallel import DistributedDataParallel

    model = DistributedDataParallel(build_llama(size))
    return model, adamw(model)


def wrap_hand_fsdp2(size: str) -> tuple[Any, torch.optim.Optimizer]:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    # On the CPU the sharded parameters of a model on meta would be drawn alike on every rank: so built in full.
    model = build_llama(size)
    layers = model.model.layers
    for index, layer in enumerate(layers):
        fully_shard(layer, mesh=mesh, reshard_after_forward=index < len(layers) - 1)
    fully_shard(model, mesh=mesh)
    return model, adamw(model)


def compose_ours(strategy: str, size: str) -> Any:
    from hydra import compose, initialize
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf, open_dict

    overrides = [f"strategy={strategy}"] + (["strategy.mp_policy=null"] if strategy == "fsdp2" else [])
    GlobalHydra.instance().clear()
    with initialize(config_path=None, version_base="1.3"):
        cfg = compose("nemo_dist_conf", overrides)
    with open_dict(cfg):
        cfg.seed = SEED
        cfg.model = {"config": {"model_type": "llama", **llama_fields(size)}}
        cfg.optimizer = OmegaConf.create({"name": "adamw", **ADAMW, "betas": list(ADAMW["betas"])})
    return cfg


def wrap_ours(cfg: Any) -> tuple[Any, torch.optim.Optimizer]:
    from nemo_dist_conf import instantiate

    _, model, optimizer = instantiate(cfg)
    return model, optimizer


def step_hand(model: Any, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> float:
    import torch

    loss = cross_entropy(model, batch)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def step_ours(model: Any, optimizer: torch.optim.Optimizer, batch: torch.Tensor) -> float:
    from nemo_dist_conf.gradients import accumulate, clip_grad_norm_

    with accumulate(model, last=True):
        loss = cross_entropy(model, batch)
        loss.backward()
    clip_grad_norm_(model, MAX_GRAD_NORM)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def cross_entropy(model: Any, batch: torch.Tensor) -> torch.Tensor:
    from torch.nn.functional import cross_entropy as loss

    return loss(model(input_ids=batch[:, :-1]).logits.flatten(0, 1), batch[:, 1:].flatten())


STEP: dict[str, Callable[..., float]] = {"hand": step_hand, "ours": step_ours}


def wrapper(side: str, strategy: str, size: str) -> Callable[[], tuple[Any, torch.optim.Optimizer]]:
    cfg = compose_ours(strategy, size)  # on both sides: a Hydra app is a Hydra app, however it wraps its model
    if side == "ours":
        return lambda: wrap_ours(cfg)
    hand = wrap_hand_ddp if strategy == "ddp" else wrap_hand_fsdp2
    return lambda: hand(size)


# --------------------------------------------------------------------------------------- in a rank


def batches(size: str, rank: int) -> Iterator[torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(1000 + rank)
    shape = SIZES[size]
    while True:
        yield torch.randint(shape["vocab"], (shape["rows"], shape["tokens"] + 1), generator=generator)


def copy_weights(source: Any, target: Any) -> None:
    import torch

    pairs = list(zip(source.named_parameters(), target.named_parameters(), strict=True))
    with torch.no_grad():
        for (name, value), (other, parameter) in pairs:
            if name != other or getattr(value, "placements", None) != getattr(parameter, "placements", None):
                raise AssertionError(f"the sides differ in their parameters: {name} and {other}")
            local = [getattr(p, "_local_tensor", p) for p in (value, parameter)]
            local[1].copy_(local[0])


def compare(rank: int, folder: str, strategy: str, size: str, wraps: int, rounds: int, steps: int) -> None:
    """Wrap times and step times of both sides in the same processes; rank 0 writes what it found."""
    with joined(rank, folder, WORLD_SIZE):
        wrap = {side: wrapper(side, strategy, size) for side in SIDES}
        wrap_s: dict[str, list[float]] = {side: [] for side in SIDES}
        for number in range(wraps + 2):
            for side in SIDES if number % 2 else reversed(SIDES):
                gc.collect()
                seconds, built = timed(wrap[side])
                del built
                if number >= 2:  # imports and caches
                    wrap_s[side].append(seconds)
        both = {side: wrap[side]() for side in SIDES}
        copy_weights(both["hand"][0], both["ours"][0])
        step_s: dict[str, list[float]] = {side: [] for side in SIDES}
        worst = 0.0
        stream = batches(size, rank)
        warm_up = max(3, steps // 4)
        gc.collect()
        gc.disable()
        for number in range(warm_up + rounds * steps):
            batch, losses = next(stream), {}
            for side in SIDES if number % 2 else reversed(SIDES):
                seconds, losses[side] = timed(lambda: STEP[side](*both[side], batch))
                if number >= warm_up:
                    step_s[side].append(seconds)
            worst = max(worst, abs(losses["ours"] - losses["hand"]) / losses["hand"])
            if worst > 1e-5:
                raise AssertionError(f"{strategy}, step {number}: losses differ, {losses}")
        gc.enable()
        if rank == 0:
            parameters = sum(p.numel() for p in both["hand"][0].parameters())
            found = {"wrap_s": wrap_s, "step_s": step_s, "loss_difference": worst, "parameters": parameters}
            Path(folder, "found.json").write_text(json.dumps(found))


def alone(rank: int, folder: str, side: str, strategy: str, size: str, steps: int) -> None:
    """One side in processes of its own: its first wrap, and the peak memory after some steps."""
    import transformers

    assert transformers.LlamaForCausalLM  # imported lazily; neither side's cost
    with joined(rank, folder, WORLD_SIZE):
        wrap = wrapper(side, strategy, size)
        seconds, (model, optimizer) = timed(wrap)
        stream = batches(size, rank)
        for _ in range(steps):
            STEP[side](model, optimizer, next(stream))
        peak = largest(peak_mb())
        if rank == 0:
            Path(folder, "found.json").write_text(json.dumps({"first_s": seconds, "peak_mb": peak}))


# --------------------------------------------------------------------------------------- in the parent


def measure(strategy: str, size: str, options: argparse.Namespace) -> dict[str, Any]:
    found = on_ranks(WORLD_SIZE, compare, strategy, size, options.wraps, options.rounds, options.steps)
    memory: dict[str, list[float]] = {side: [] for side in SIDES}
    first: dict[str, list[float]] = {side: [] for side in SIDES}
    for number in range(options.repeats):
        for side in SIDES if number % 2 else reversed(SIDES):
            one = on_ranks(WORLD_SIZE, alone, side, strategy, size, 5)
            memory[side].append(one["peak_mb"])
            first[side].append(one["first_s"])
    steps = options.steps
    rounds = [
        pair_ratio({side: found["step_s"][side][i : i + steps] for side in SIDES})
        for i in range(0, options.rounds * steps, steps)
    ]
    least = {side: min(memory[side]) for side in SIDES}
    return {
        "strategy": strategy,
        "size": size,
        "parameters": found["parameters"],
        "loss_difference": found["loss_difference"],
        "wrap_ms": {side: 1e3 * statistics.median(found["wrap_s"][side]) for side in SIDES},
        "wrap_ratio": pair_ratio(found["wrap_s"]),
        "first_ms": {side: 1e3 * min(first[side]) for side in SIDES},
        "first_ratio": min(first["ours"]) / min(first["hand"]),
        "step_ms": {side: 1e3 * statistics.median(found["step_s"][side]) for side in SIDES},
        "step_ratio": pair_ratio(found["step_s"]),
        "step_ratio_of_rounds": rounds,
        "memory_mb": least,
        "memory_ratio": least["ours"] / least["hand"],
    }


COLUMNS = ("strategy", "model", "measure", "by hand", "ours", "ratio", "aim")
AIMS = {"wrap": "1.05", "first": "", "step": "1.01", "memory": "1.01"}


def rows(results: list[dict[str, Any]]) -> Iterator[tuple[str, ...]]:
    for result in results:
        for measure, unit, digits in (("wrap", "ms", 1), ("first", "ms", 1), ("step", "ms", 2), ("memory", "mb", 1)):
            hand, ours = (f"{result[f'{measure}_{unit}'][side]:.{digits}f}" for side in SIDES)
            name = f"{measure} [{unit.replace('mb', 'MB')}]"
            ratio = f"{result[f'{measure}_ratio']:.3f}"
            yield result["strategy"], result["size"], name, hand, ours, ratio, AIMS[measure]


def table(results: list[dict[str, Any]]) -> str:
    return report.table(COLUMNS, rows(results))


def markdown(measured: dict[str, Any]) -> str:
    machine, spread = measured["hardware"], []
    for result in measured["results"]:
        low, high = min(result["step_ratio_of_rounds"]), max(result["step_ratio_of_rounds"])
        spread.append(
            f"- {result['strategy']} {result['size']} ({result['parameters'] / 1e6:.2f} M parameters): step ratio by "
            f"round {low:.3f} to {high:.3f}; largest relative difference of a loss {result['loss_difference']:.1e}"
        )
    return f"""# Overhead beside hand-written torch

{__doc__.split("For DDP", 1)[0].splitlines()[0]}
What each measure means stands at the top of [overhead.py](../overhead.py).

{table(measured["results"])}

{chr(10).join(spread)}

Measured {measured["date"]} on {machine["cpu"]}, {machine["cores"]} cores, {machine["ram_gib"]} GiB;
{WORLD_SIZE} gloo ranks, 1 thread each, load before the run {machine["load_before"]}.
Versions: {report.used(measured)}.

    {measured["command"]}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["0.4M", "12M"])
    parser.add_argument("--strategy", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--wraps", type=int, default=21, help="pairs of models built (default 21)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of steps (default 5)")
    parser.add_argument("--steps", type=int, default=30, help="pairs of steps in a round (default 30)")
    parser.add_argument("--repeats", type=int, default=3, help="fresh process groups per side (default 3)")
    parser.add_argument("--quick", action="store_true", help="FSDP2, the smallest model, few repeats: a smoke test")
    report.add_files(parser)
    options = parser.parse_args()
    if options.quick:
        options.size, options.wraps, options.rounds, options.steps, options.repeats = ["0.04M"], 2, 1, 3, 1
        options.strategy = ["fsdp2"]
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # compiling modules in every rank would count as ours
    measured = report.new_report(__file__)
    for size in options.size:
        for strategy in options.strategy:
            measured["results"].append(measure(strategy, size, options))
    report.finish(measured, options, table(measured["results"]), markdown)


if __name__ == "__main__":
    main()
