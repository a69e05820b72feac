"""Hundreds of configs that cannot work, and somebody who types what each refusal offers until nothing is refused.

    python -m tests.typed_answers          all of them, and what is wrong with the offers
    python -m tests.typed_answers tp_plan  those whose words hold one of these, and every step of theirs

Typed as a person would: the words that were asked go where none of them is offered with another value, those that are
offered come, the rest of the line stays. Right is
an offer after which its problem is gone, and a chain of offers that ends in a run and never comes back to a line.
"""

from __future__ import annotations

import functools
import random
import re
import shlex
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Iterable

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from nemo_dist_conf.composition.check import check
from nemo_dist_conf.composition.sections import SECTIONS
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.topology.launched_ranks import Start, about_to_start
from nemo_dist_conf.topology.solve import LAUNCH
from tests.command_lines import outcome

__all__ = ["Line", "bad_lines", "findings", "typed"]

#: Enough for several problems, each with an answer of its own.
_ROUNDS = 10
_WITHOUT = "the same without "


#: Own apps: name -> their config. The recipe is not one of them.
APPS = {
    "app": "defaults: [nemo_dist_conf, _self_]\n",
    "app, below a package": "defaults: [nemo_dist_conf@dist, _self_]\n",
    "app without our groups": "defaults: [_self_]\nlr: 0.1\n",
}


@dataclass(frozen=True)
class Line:
    """A command line on so many ranks. program: the recipe, or an app of APPS."""

    ranks: int
    words: tuple[str, ...]
    program: str = "recipe"

    @classmethod
    def of(cls, ranks: int, line: str) -> Line:
        return cls(ranks, tuple(shlex.split(line)))

    def __str__(self) -> str:
        return f"{self.program} [{self.ranks}] {shlex.join(self.words)}"

    def outcome(self) -> tuple[str, ConfigError | None]:
        """What it comes to; a traceback, which nothing that is typed may end in, as a text that starts so."""
        try:
            return outcome(self.ranks, shlex.join(self.words)) if self.program == "recipe" else _outcome_of_app(self)
        except Exception as died:
            return f"Traceback: {type(died).__name__}: {died}", None


@functools.cache
def _outcome_of_app(line: Line) -> tuple[str, ConfigError | None]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.yaml").write_text(APPS[line.program], encoding="utf-8")
        GlobalHydra.instance().clear()
        try:
            with initialize_config_dir(folder, version_base="1.3"), about_to_start(Start(line.ranks, LAUNCH)):
                cfg = compose("config", overrides=list(line.words), return_hydra_config=True)
                HydraConfig.instance().set_config(cfg)
                checked = check(cfg, line.ranks)
            return f"runs: {checked.strategy.name}, {checked.mesh.describe()}", None
        except ConfigError as error:
            return str(error), error
        except (HydraException, OmegaConfBaseException, ValueError) as error:  # ValueError: strategy=null
            return f"Hydra: {error}", None
        finally:
            HydraConfig.instance().cfg = None


# What is wrong: one thing each, with the ranks that it takes at least.

_SIZES = ("dp_size", "dp_replicate_size", "tp_size", "pp_size", "cp_size", "ep_size")

_FAULTS: tuple[tuple[int, str], ...] = (
    # Sizes and the world.
    *((1, f"parallelism.{size}={value}") for size in _SIZES for value in (0, -2)),
    *((ranks, f"parallelism.{size}=2") for size in _SIZES for ranks in (1, 3)),
    *((4, f"parallelism.{size}=3") for size in _SIZES),
    *((2, f"parallelism.{size}=4") for size in _SIZES),
    (8, "parallelism.tp_size=2 parallelism.pp_size=3"),
    (6, "parallelism.tp_size=4 parallelism.cp_size=2 parallelism.pp_size=2"),
    (8, "parallelism.dp_size=2 parallelism.tp_size=2"),
    (4, "parallelism.dp_replicate_size=4"),
    # Axes that a strategy lacks.
    *(
        (ranks, f"strategy={strategy} parallelism.{size}=2")
        for strategy in ("ddp", "mfsdp")
        for size in _SIZES[1:]
        for ranks in (1, 2, 4)
    ),
    # Options of strategies.
    (1, "strategy=ddp strategy.bucket_cap_mb=0"),
    (2, "strategy=ddp strategy.bucket_cap_mb=-3"),
    (1, "strategy=ddp strategy.autocast_dtype=float32"),
    (1, "strategy.autocast_dtype=float32"),
    (1, "strategy.fsdp2_forward_prefetch_depth=-1"),
    (1, "strategy.fsdp2_backward_prefetch_depth=-1"),
    (1, "strategy.fsdp2_forward_prefetch_depth=3"),
    (1, "strategy.fsdp2_backward_prefetch_depth=4"),
    (1, "strategy.offload_policy.pin_memory=false"),
    (1, "strategy.enable_async_tensor_parallel=true"),
    (2, "strategy.enable_async_tensor_parallel=true parallelism.tp_size=2"),
    (2, "strategy.enable_async_tensor_parallel=true strategy.enable_compile=true parallelism.tp_size=2"),
    (1, "strategy=mfsdp strategy.zero_dp_strategy=5"),
    (1, "strategy=mfsdp strategy.zero_dp_strategy=2 strategy.overlap_grad_reduce=false"),
    (1, "strategy=mfsdp strategy.overlap_param_gather=false"),
    (1, "strategy=mfsdp strategy.zero_dp_strategy=0 strategy.init_fsdp_with_meta_device=true"),
    (2, "strategy=mfsdp parallelism.tp_size=2 strategy.init_fsdp_with_meta_device=true"),
    (1, "strategy=mfsdp strategy.average_in_collective=true strategy.calculate_per_token_loss=true"),
    (1, "strategy=mfsdp strategy.nccl_ub=true"),
    (1, "strategy=mfsdp 'strategy.megatron_fsdp_unit_modules=[Block]'"),
    (1, "strategy=mfsdp 'strategy.megatron_fsdp_unit_modules=[absent.Block,torch.nn.Liniar]'"),
    (1, "strategy=mfsdp activation_checkpointing=selective"),
    # Activation checkpointing.
    *(
        (1, f"{key}={mode}")
        for key in ("activation_checkpointing", "strategy.activation_checkpointing")
        for mode in ("some", "partial", "3")
    ),
    (1, "activation_checkpointing=selective strategy.activation_checkpointing=true"),
    (1, "activation_checkpointing=true strategy.activation_checkpointing=selective"),
    # Sections that would do nothing, or are gone.
    (1, "pipeline=gpipe"),
    (2, "pipeline.pp_microbatch_size=4"),
    (1, "pipeline.layers_per_stage=2 pipeline.scale_grads_in_schedule=true"),
    (1, "pipeline.dtype=bfloat16"),
    (1, "moe.reshard_after_forward=true"),
    (1, "context.method=gather"),
    (2, "parallelism.cp_size=2 context.method=gathered"),
    (2, "parallelism.cp_size=-2 context.method=gather"),
    (1, "moe.mp_policy.enabled=true moe.lm_head_precision=float32"),
    (2, "model=mixtral_tiny parallelism.ep_size=2 moe.mp_policy.param_dtype=float32"),
    *((1, f"{section}=null") for section in ("strategy", *SECTIONS)),
    *((1, f"~{section}") for section in ("strategy",)),
    # Pipelines.
    (2, "parallelism.pp_size=2 pipeline.pp_schedule=zero_bubble"),
    (2, "parallelism.pp_size=2 pipeline.pp_schedule=v_schedule"),
    (2, "parallelism.pp_size=2 pipeline.pp_schedule=dfs"),
    (2, "parallelism.pp_size=2 pipeline.pp_schedule=1f1bb"),
    (2, "parallelism.pp_size=2 pipeline.pp_schedule=null"),
    (2, "parallelism.pp_size=2 pipeline.pp_schedule_csv=no/such/file.csv"),
    (2, "parallelism.pp_size=2 pipeline=gpipe pipeline.pp_schedule_csv=no/such/file.csv"),
    *(
        (2, f"parallelism.pp_size=2 pipeline.{key}={value}")
        for key in ("pp_batch_size", "pp_microbatch_size", "layers_per_stage", "pp_seq_len")
        for value in (0, -1)
    ),
    (2, "parallelism.pp_size=2 pipeline.pp_microbatch_size=3"),
    (2, "parallelism.pp_size=2 pipeline.pp_batch_size=4"),
    (2, "parallelism.pp_size=2 train.micro_batch_size=2 pipeline.pp_microbatch_size=4"),
    (8, "parallelism.pp_size=4 train.global_batch_size=4"),
    (4, "parallelism.pp_size=4 train.global_batch_size=2"),
    (2, "parallelism.pp_size=2 pipeline=interleaved_1f1b train.global_batch_size=5"),
    (2, "parallelism.pp_size=2 pipeline=dualpipe_v train.global_batch_size=2"),
    (8, "parallelism.pp_size=8"),
    *((4, f"parallelism.pp_size=4 pipeline={name}") for name in ("looped_bfs", "interleaved_1f1b", "zbv_zero_bubble")),
    (2, "parallelism.pp_size=2 pipeline=interleaved_1f1b pipeline.layers_per_stage=2"),
    (2, "parallelism.pp_size=2 pipeline=interleaved_1f1b pipeline.layers_per_stage=3"),
    (2, "parallelism.pp_size=2 pipeline.layers_per_stage=1"),
    (2, "parallelism.pp_size=2 pipeline=zbv_zero_bubble pipeline.layers_per_stage=2"),
    (2, "parallelism.pp_size=2 'pipeline.module_fqns_per_model_part=[model.embed_tokens,lm_head]'"),
    (2, "parallelism.pp_size=2 'pipeline.module_fqns_per_model_part=[[a],[b],[c]]'"),
    (2, "parallelism.pp_size=2 pipeline=gpipe 'pipeline.module_fqns_per_model_part=[[a],[b],[c],[d]]'"),
    (2, "parallelism.pp_size=2 pipeline=zbv_zero_bubble strategy.enable_compile=true"),
    (2, "parallelism.pp_size=2 pipeline=zbv_zero_bubble activation_checkpointing=selective"),
    (2, "parallelism.pp_size=2 pipeline=zbv_zero_bubble strategy.activation_checkpointing=selective"),
    (2, "parallelism.pp_size=2 pipeline=dualpipe_v strategy.defer_fsdp_grad_sync=false"),
    (2, "parallelism.pp_size=2 pipeline=dualpipe_v pipeline.patch_stage_backward_maybe_with_nosync=true"),
    (4, "parallelism.pp_size=2 parallelism.cp_size=2 pipeline.pp_seq_len=100"),
    # Experts.
    (2, "parallelism.ep_size=2"),
    (3, "model=mixtral_tiny parallelism.ep_size=3 train.global_batch_size=6"),
    (2, "model=mixtral_tiny parallelism.tp_size=2"),
    (4, "model=qwen3_moe_tiny parallelism.tp_size=2 parallelism.ep_size=2"),
    (2, "model=mixtral_tiny parallelism.pp_size=2"),
    (2, "model=mixtral_tiny parallelism.ep_size=2 strategy.enable_compile=true"),
    (
        4,
        "model=mixtral_tiny parallelism.ep_size=2 parallelism.pp_size=2 pipeline=zbv_zero_bubble"
        " activation_checkpointing=true model.config.output_router_logits=false",
    ),
    (
        2,
        "model=mixtral_tiny parallelism.ep_size=2 moe.lm_head_precision=float32 moe.wrap_outer_model=false"
        " model.config.tie_word_embeddings=true",
    ),
    # The model and the sequence.
    (3, "parallelism.tp_size=3"),
    (8, "parallelism.tp_size=8"),
    (5, "parallelism.tp_size=5"),
    (2, "parallelism.tp_size=2 model.config.num_key_value_heads=1"),
    (2, "parallelism.cp_size=2 data.seq_len=30"),
    (4, "parallelism.cp_size=4 data.seq_len=60"),
    (2, "parallelism.cp_size=2 data.seq_len=1"),
    (1, "model.config.num_attention_heads=7"),
    (1, "model.config.hidden_size=72"),
    (1, "model.config.num_key_value_heads=3"),
    *(
        (1, f"model.config.{key}={value}")
        for key in ("num_hidden_layers", "hidden_size", "vocab_size", "num_attention_heads")
        for value in (0, -1, "two", "1.5")
    ),
    # Plans of tensor parallelism.
    (2, "parallelism.tp_size=2 'strategy.tp_plan={model.layers.*.mlp.up_proj:columns}'"),
    (2, "parallelism.tp_size=2 'strategy.tp_plan={model.layer.*.up_proj:colwise,lm_head:colwise_gather_output}'"),
    (2, "parallelism.tp_size=2 'strategy.tp_plan={model.layers.9.mlp.up_proj:colwise}'"),
    (2, "parallelism.tp_size=2 'strategy.tp_plan={up:colwise,down:rowwise}'"),
    (2, "parallelism.tp_size=2 'strategy.tp_plan={zzz:qqq}'"),
    (2, "parallelism.tp_size=2 'strategy.tp_plan={}'"),
    (2, "parallelism.tp_size=2 strategy.tp_plan=colwise"),
    (2, "parallelism.tp_size=2 strategy.tp_plan=3"),
    (2, "parallelism.tp_size=2 'strategy.tp_plan=[a,b]'"),
    # Batches.
    (4, "train.global_batch_size=6"),
    (2, "train.global_batch_size=12 train.micro_batch_size=4"),
    (3, "train.global_batch_size=16"),
    *(
        (1, f"train.{key}={value}")
        for key in ("global_batch_size", "micro_batch_size")
        for value in (0, -1, "many", "2.5")
    ),
    # Values of the recipe.
    *((1, f"{key}={value}") for key in ("device", "seed") for value in ("gpu", "-1", "null", "1.5", "true", "[1]")),
    *(
        (1, f"train.{key}={value}")
        for key in ("steps", "log_every", "warmup_steps", "max_grad_norm", "schedule", "tensorboard", "dtype")
        for value in ("0", "-1", "maybe", "[1]")
    ),
    *(
        (1, f"data.{key}={value}")
        for key in ("seq_len", "max_mb", "path", "tokenizer")
        for value in ("0", "-1", "[1]", "true")
    ),
    *(
        (1, f"optimizer.{key}={value}")
        for key in ("name", "lr", "betas", "eps", "weight_decay", "decay_1d")
        for value in ("-1", "fast", "[0.9]", "null")
    ),
    (1, "optimizer=sgd optimizer.nesterov=true optimizer.momentum=0"),
    (1, "optimizer=sgd optimizer.momentum=2"),
    (1, "+optimizer.momentum=0.9"),
    (1, "+optimizer.betaz=3"),
    (1, "+optimizer.qqq=3"),
    (1, "~optimizer.lr"),
    *((1, f"{key}=null") for key in ("model", "data", "optimizer", "train", "checkpoint")),
    *((1, f"~{key}") for key in ("model", "data", "optimizer", "train", "checkpoint")),
    *((1, f"{key}=3") for key in ("model", "data", "optimizer", "train", "checkpoint")),
    # Keys that + slipped in.
    *(
        (1, f"+{key}")
        for key in (
            "strategy.reshard_after_foward=true",
            "strategy.tp_size=2",
            "strategy.mp_policy.grad_dtype=float32",
            "strategy.zzz=1",
            "parallelism.tensor_parallel=2",
            "parallelism.zzz=1",
            "paralelism.tp_size=1",
            "distributed.tp_size=1",
            "train.stepz=3",
            "train.zzz=3",
            "foo=1",
            "foo.bar=1",
            "strateg=ddp",
            "moe.zzz=2",
            "pipeline.schedule=gpipe",
            "checkpoint.evry=3",
            "checkpoint.zzz=3",
            "data.zzz=1",
            "data.seqlen=32",
            "model.config.num_hiden_layers=2",
            "model.zzz=2",
            "tp_size=2",
            "lr=0.1",
        )
    ),
    (1, "++pipeline.schedule=gpipe"),
    (1, "++foo=1"),
    (1, "strategy=ddp +strategy.reshard_after_forward=true"),
    (1, "strategy=ddp +strategy.zero_dp_strategy=2"),
    (1, "strategy=mfsdp +strategy.sequence_parallel=true"),
    # Checkpoints.
    *(
        (1, f"checkpoint.{key}={value}")
        for key in ("every", "keep", "async", "export", "resume")
        for value in ("0", "-1", "later", "[1]", "true")
    ),
    (1, "checkpoint.every=10 checkpoint.keep=0"),
    (1, "checkpoint.async=true"),
    (1, "checkpoint.keep=5"),
    (1, "checkpoint.export=hf ~model.config +model._target_=tests.dist.layouts.Net"),
    (1, "checkpoint.resume=no/such/folder"),
    (1, "model.name_or_path=no/such/folder"),
    (1, "data.path=no/such/file.txt"),
    # What torch would die of in the first step, or what nobody would read.
    *((2, f"strategy=ddp strategy.bucket_cap_mb={value}") for value in ("inf", "nan")),
    (1, "optimizer.fused=true optimizer.foreach=true"),
    (1, "seed=99999999999999999999"),
    (1, "+model.hidden_size=64"),
    *((1, f"model=mixtral_tiny model.config.num_experts_per_tok={value}") for value in (0, 100, "two")),
    *((1, f"+model.config.attention_dropout={value}") for value in (2, "-0.5", "none")),
    # References to what is not there.
    *(
        (1, f"'{key}=${{{there}}}'")
        for key in ("seed", "train.dtype", "optimizer.lr", "checkpoint.every", "model.config.hidden_size")
        for there in ("oc.env:NOT_SET", "nothing.there")
    ),
    *((1, f"'{key}=${{oc.env:NOT_SET}}'") for key in ("parallelism.tp_size", "strategy.reshard_after_forward")),
    *((1, f"'{key}=${{nothing.there}}'") for key in ("activation_checkpointing", "batch_statistics", "train")),
    (1, "'train={steps:${nothing.there}}'"),
    (1, "'optimizer.betas=[${nothing.there},0.9]'"),
)

#: What stands beside a fault and is right by itself, on any number of ranks.
_BESIDE = (
    "strategy=ddp",
    "strategy=fsdp2",
    "model=qwen3_tiny",
    "train.steps=3 train.log_every=2",
    "activation_checkpointing=true",
    "strategy.mp_policy=null",
    "checkpoint.every=5",
    "optimizer=sgd",
)


def bad_lines(seed: int = 0, pairs: int = 120) -> list[Line]:
    """Every fault alone, pairs of faults, and faults beside what is right; the same for the same seed."""
    chance = random.Random(seed)
    lines = [Line.of(ranks, words) for ranks, words in _FAULTS]
    some = [chance.sample(_FAULTS, 2) for _ in range(pairs)]
    lines += [Line.of(max(a[0], b[0]), f"{a[1]} {b[1]}") for a, b in some]
    for beside in _BESIDE:
        for ranks, words in chance.sample(_FAULTS, 10):
            lines.append(Line.of(ranks, f"{beside} {words}"))
    ours = [line for line in lines if all(_is_ours(word) for word in line.words)]
    for line in [*ours[:150], *chance.sample(ours, min(40, len(ours)))]:
        lines.append(replace(line, program="app"))
    for line in chance.sample(ours, min(80, len(ours))):
        lines.append(Line(line.ranks, tuple(map(_below_dist, line.words)), "app, below a package"))
    lines += [Line(ranks, words, "app without our groups") for ranks in (1, 2) for words in ((), ("lr=0.2",))]
    return [line for line in dict.fromkeys(lines) if not _says_a_key_twice(line)]


def _is_ours(word: str) -> bool:
    key = word.lstrip("+~").partition("=")[0].partition(".")[0]
    return key in ("strategy", *SECTIONS, "activation_checkpointing")


def _below_dist(word: str) -> str:
    """The word as it is typed where our groups stand below the package ``dist``."""
    signs = word[: len(word) - len(word.lstrip("+~"))]
    key, equals, value = word.lstrip("+~").partition("=")
    if key in ("strategy", "pipeline") and value not in ("null", ""):
        return f"{signs}{key}@dist.{key}={value}"
    return f"{signs}dist.{key}{equals}{value}"


def _says_a_key_twice(line: Line) -> bool:
    keys = [_key(word) for word in line.words]
    return len(keys) != len(set(keys))


# Typing.


def typed(line: Line, problem: Problem) -> Line | None:
    """The line after its words were replaced by what is offered; None where that is nothing to type on this line."""
    offered = problem.instead
    if offered.startswith(_WITHOUT):
        gone = set(shlex.split(offered.removeprefix(_WITHOUT)))
        if not gone <= set(line.words):
            raise AssertionError(f"{offered}, but the line is {line}")
        return replace(line, words=tuple(word for word in line.words if word not in gone))
    ranks = line.ranks
    started = re.fullmatch(r"torchrun --nproc-per-node (\d+) (?:-m )?\S+ ?(.*)", offered)
    if started:
        ranks, offered = int(started[1]), started[2]
    words = shlex.split(offered)
    try:
        OverridesParser.create().parse_overrides(words)
    except HydraException:
        return None
    asked, offered_keys = {_key(word) for word in _split(problem.asked)}, {_key(word) for word in words}
    # What is offered for one of the words asked leaves the others; what has another name takes their place.
    replaced = offered_keys if asked & offered_keys else asked | offered_keys
    kept = [word for word in line.words if _key(word) not in replaced]
    if any(re.match(r"\+?strategy(@\S+)?=", word) for word in words):  # its options go with the old strategy
        kept = [word for word in kept if not re.match(r"\+?(dist\.)?strategy\.", word)]
    return replace(line, ranks=ranks, words=(*kept, *words))


def _split(asked: str) -> list[str]:
    """Words as a shell has them; Hydra's own quotes in a value are none of a shell's."""
    try:
        return shlex.split(asked)
    except ValueError:
        return asked.split()


def _key(word: str) -> str:
    key = re.sub(r"(\w+)@(\S+)", r"\2", word.lstrip("+~").partition("=")[0])
    return key.removesuffix(".pp_schedule")  # an option of the group pipeline is a schedule


def findings(line: Line, tell: bool = False) -> list[str]:
    """What is wrong with the offers that a bad line gets, one after the other; none: they lead to a run."""
    found: list[str] = []
    seen = [line]
    text, error = line.outcome()
    for _ in range(_ROUNDS):
        if tell:
            print(f"  {line}\n    {text.splitlines()[0]}")
        if error is None:
            if not text.startswith(("runs: ", "Hydra: ")):
                found.append(f"{line}: {text}")
            return found
        steps = [_step(line, problem, found) for problem in error.problems]
        following = next((step for step in steps if step is not None), None)
        if following is None:
            return found  # a package to install, a folder to repair: said, but no words of this line
        line = following
        if line in seen:
            return [*found, f"{seen[0]}: comes back to {line}"]
        seen.append(line)
        text, error = line.outcome()
        if error is None and text.startswith("Hydra: "):
            return [*found, f"{seen[-2]}: offered {shlex.join(line.words)}, and Hydra refuses it: {text}"]
    return [*found, f"{seen[0]}: nothing runs after {_ROUNDS} offers, at last {line}: {text.splitlines()[0]}"]


def _step(line: Line, problem: Problem, found: list[str]) -> Line | None:
    """The line with this problem's offer; told where the problem is still there."""
    try:
        after = typed(line, problem)
    except AssertionError as wrong:
        found.append(str(wrong))
        return None
    if after is None:
        return None
    text, error = after.outcome()
    if error is not None and any(other.what == problem.what for other in error.problems):
        found.append(f"{line}: offers {problem.instead}, after which it is still so: {problem.what}")
    return after


def main(words: Iterable[str]) -> int:
    words = list(words)
    lines = [line for line in bad_lines() if not words or any(word in str(line) for word in words)]
    count, other = 0, 0
    for line in lines:
        text, error = line.outcome()
        other += error is None
        if words:
            print(line)
        for finding in findings(line, tell=bool(words)):
            count += 1
            print(f"- {finding}", flush=True)
    print(f"{len(lines)} lines ({other} refused by Hydra's own typing, or right after all), {count} findings")
    return 1 if count else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
