"""Command lines of the recipe, good and bad, and how one of them is composed and checked in this process."""

from __future__ import annotations

import copy
import functools
import shlex

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, open_dict

from nemo_dist_conf.composition.sections import SECTIONS
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.recipe.checks import check_recipe
from nemo_dist_conf.recipe.yaml_folder import config_folder
from nemo_dist_conf.topology.launched_ranks import Start, about_to_start
from nemo_dist_conf.topology.solve import LAUNCH

#: (world size, overrides as typed); the outcome of each is in golden/command_lines.txt.
COMMAND_LINES: tuple[tuple[int, str], ...] = (
    # What works.
    (1, ""),
    (1, "strategy=ddp"),
    (4, "strategy=ddp"),
    (4, "strategy=ddp parallelism.dp_size=4"),
    (4, "strategy=fsdp2"),
    (4, "parallelism.tp_size=2"),
    (4, "parallelism.tp_size=4 strategy.sequence_parallel=true"),
    (4, "parallelism.dp_replicate_size=2"),
    (8, "parallelism.dp_size=4 parallelism.dp_replicate_size=2 parallelism.tp_size=2"),
    (4, "parallelism.dp_replicate_size=1"),
    (1, "strategy.mp_policy=null"),
    (1, "strategy.mp_policy.param_dtype=float16"),
    (1, "strategy.offload_policy.enabled=true strategy.offload_policy.pin_memory=false"),
    (1, "strategy.offload_policy=null"),
    (1, "activation_checkpointing=selective"),
    (1, "strategy.activation_checkpointing=true"),
    (1, "activation_checkpointing=full"),
    (1, "activation_checkpointing=true strategy.activation_checkpointing=true"),
    (1, "strategy.enable_fsdp2_prefetch=true strategy.fsdp2_backward_prefetch_depth=0"),
    (
        2,
        "'strategy.tp_plan={model.layers.*.mlp.up_proj:colwise,model.layers.*.mlp.down_proj:rowwise}'"
        " parallelism.tp_size=2",
    ),
    (
        2,
        "strategy.sequence_parallel=true strategy.enable_async_tensor_parallel=true strategy.enable_compile=true"
        " parallelism.tp_size=2",
    ),
    (1, "strategy=ddp strategy.bucket_cap_mb=1.5 strategy.autocast_dtype=bfloat16"),
    (1, "model=qwen3_tiny data.seq_len=64"),
    (1, "model.config.num_hidden_layers=2"),
    (2, "train.global_batch_size=8 train.micro_batch_size=2"),
    (1, "parallelism.dp_size='1'"),
    # Words that Hydra's own typing refuses.
    (1, "strategy=fsdp3"),
    (1, "strategy.reshard_after_forward=maybe"),
    (1, "strategy.bucket_cap_mb=25"),
    (1, "strategy=ddp strategy.bucket_cap_mb=big"),
    (1, "strategy.mp_policy.param_dtype=bf16"),
    (1, "strategy.mp_policy=bfloat16"),
    (1, "strategy.autocast_dtype=int8"),
    (1, "parallelism.tp_size=2.5"),
    (1, "parallelism.tp_size=two"),
    (1, "parallelism.tp_size=true"),
    (1, "parallelism.tp_size=null"),
    (1, "parallelism.sp_size=2"),
    (1, "pipeline=2f2b"),
    (1, "pipeline.round_virtual_stages_to_pp_multiple=sideways"),
    (1, "pipeline.dtype=double"),
    (1, "moe.lm_head_precision=fp8"),
    (1, "distributed.tp_size=2"),
    # Strategies and axes.
    (1, "strategy=ddp parallelism.tp_size=2"),
    (2, "strategy=ddp parallelism.tp_size=2"),
    (2, "strategy=ddp parallelism.pp_size=2"),
    (2, "strategy=ddp parallelism.cp_size=2"),
    (2, "strategy=ddp parallelism.ep_size=2"),
    (4, "strategy=ddp parallelism.dp_replicate_size=2"),
    (4, "strategy=ddp parallelism.dp_size=2"),
    (8, "strategy=ddp parallelism.tp_size=2 parallelism.pp_size=2"),
    (1, "strategy=megatron_fsdp"),
    (2, "strategy=megatron-fsdp parallelism.pp_size=2"),
    (2, "strategy=mfsdp parallelism.ep_size=2"),
    (4, "strategy=mfsdp parallelism.dp_replicate_size=2"),
    (1, "strategy=mfsdp strategy.zero_dp_strategy=4"),
    (1, "strategy=mfsdp 'strategy.megatron_fsdp_unit_modules=[LlamaDecoderLayer]'"),
    (1, "strategy=mfsdp 'strategy.megatron_fsdp_unit_modules=[torch.nn.modules.linear.Liniar,absent.Block]'"),
    (1, "strategy=mfsdp strategy.zero_dp_strategy=2 strategy.overlap_grad_reduce=false"),
    (1, "strategy=mfsdp strategy.overlap_param_gather=false"),
    (1, "strategy=mfsdp strategy.zero_dp_strategy=0 strategy.init_fsdp_with_meta_device=true"),
    (1, "strategy=mfsdp strategy.average_in_collective=true strategy.calculate_per_token_loss=true"),
    (2, "strategy=mfsdp parallelism.tp_size=2"),
    (1, "strategy=mfsdp activation_checkpointing=selective"),
    (1, "strategy=mfsdp +strategy.sequence_parallel=true"),
    # Sizes and the world.
    (1, "parallelism.tp_size=2"),
    (1, "parallelism.dp_size=4"),
    (6, "parallelism.tp_size=4"),
    (8, "parallelism.dp_size=3"),
    (8, "parallelism.dp_size=4"),
    (4, "parallelism.dp_replicate_size=3"),
    (4, "parallelism.dp_replicate_size=4"),
    (1, "parallelism.tp_size=0"),
    (1, "parallelism.tp_size=-2 parallelism.cp_size=0"),
    (1, "parallelism.dp_size=0"),
    (2, "parallelism.pp_size=2 pipeline.pp_batch_size=4"),
    (4, "parallelism.cp_size=2"),
    (4, "parallelism.ep_size=2"),
    (6, "parallelism.ep_size=4"),
    # Sections that would do nothing.
    (1, "pipeline=gpipe"),
    (1, "pipeline.pp_microbatch_size=4"),
    (1, "moe.reshard_after_forward=true moe.mp_policy.enabled=true"),
    # Pipelines.
    (2, "parallelism.pp_size=2"),
    (8, "parallelism.pp_size=2 parallelism.tp_size=2 pipeline=dualpipe_v pipeline.pp_microbatch_size=2"),
    (4, "parallelism.pp_size=2 parallelism.cp_size=2 pipeline.pp_schedule=ZBVZeroBubble train.micro_batch_size=4"),
    (2, "parallelism.pp_size=2 pipeline=interleaved_1f1b pipeline.layers_per_stage=1"),
    (2, "parallelism.pp_size=2 pipeline=interleaved_1f1b pipeline.layers_per_stage=2"),
    (2, "parallelism.pp_size=2 pipeline=interleaved_1f1b pipeline.layers_per_stage=3"),
    (2, "parallelism.pp_size=2 pipeline.pp_schedule=zero_bubble"),
    (2, "parallelism.pp_size=2 pipeline.pp_schedule=1f1bb"),
    (2, "parallelism.pp_size=2 pipeline.pp_schedule=null"),
    (2, "parallelism.pp_size=2 pipeline.pp_schedule_csv=no/such/file.csv"),
    (2, "parallelism.pp_size=2 pipeline=gpipe pipeline.pp_schedule_csv=no/such/file.csv"),
    (2, "parallelism.pp_size=2 pipeline.pp_microbatch_size=3"),
    (2, "parallelism.pp_size=2 pipeline.pp_microbatch_size=0"),
    (8, "parallelism.pp_size=4 train.global_batch_size=4"),
    (2, "parallelism.pp_size=2 pipeline=interleaved_1f1b train.global_batch_size=5"),
    (8, "parallelism.pp_size=8"),
    (4, "parallelism.pp_size=4 pipeline=looped_bfs"),
    (2, "parallelism.pp_size=2 'pipeline.module_fqns_per_model_part=[model.embed_tokens,lm_head]'"),
    (2, "parallelism.pp_size=2 pipeline=zbv_zero_bubble strategy.enable_compile=true"),
    (2, "parallelism.pp_size=2 pipeline=zbv_zero_bubble activation_checkpointing=selective"),
    (
        2,
        "parallelism.pp_size=2 pipeline=dualpipe_v strategy.defer_fsdp_grad_sync=false"
        " pipeline.patch_stage_backward_maybe_with_nosync=true",
    ),
    # Experts.
    (2, "model=mixtral_tiny parallelism.ep_size=2"),
    (8, "model=qwen3_moe_tiny parallelism.ep_size=4 parallelism.dp_replicate_size=2 moe.mp_policy.enabled=true"),
    (
        8,
        "model=mixtral_tiny parallelism.ep_size=2 parallelism.cp_size=2 parallelism.pp_size=2"
        " model.config.output_router_logits=false",
    ),
    (2, "parallelism.ep_size=2"),
    (3, "model=mixtral_tiny parallelism.ep_size=3 train.global_batch_size=6"),
    (2, "model=mixtral_tiny parallelism.tp_size=2"),
    (4, "model=mixtral_tiny parallelism.tp_size=2 parallelism.ep_size=2"),
    (2, "model=mixtral_tiny parallelism.pp_size=2"),
    (2, "model=mixtral_tiny parallelism.ep_size=2 strategy.enable_compile=true"),
    (
        4,
        "model=mixtral_tiny parallelism.ep_size=2 parallelism.pp_size=2 pipeline=zbv_zero_bubble"
        " activation_checkpointing=true model.config.output_router_logits=false",
    ),
    (2, "model=mixtral_tiny parallelism.ep_size=2 moe.mp_policy.param_dtype=float32"),
    (
        2,
        "model=mixtral_tiny parallelism.ep_size=2 moe.lm_head_precision=float32 moe.wrap_outer_model=false"
        " model.config.tie_word_embeddings=true",
    ),
    # Options of a strategy.
    (1, "activation_checkpointing=some"),
    (1, "strategy.activation_checkpointing=fully"),
    (1, "activation_checkpointing=selective strategy.activation_checkpointing=true"),
    (2, "strategy.enable_async_tensor_parallel=true parallelism.tp_size=2"),
    (1, "strategy.enable_async_tensor_parallel=true"),
    (1, "strategy.fsdp2_forward_prefetch_depth=-1"),
    (1, "strategy.fsdp2_backward_prefetch_depth=4"),
    (1, "strategy.offload_policy.pin_memory=false"),
    (1, "strategy.autocast_dtype=float32"),
    (1, "strategy=ddp strategy.bucket_cap_mb=0"),
    (1, "strategy=ddp strategy.bucket_cap_mb=-25"),
    # Keys that + slipped in.
    (1, "+strategy.reshard_after_foward=true"),
    (1, "strategy=ddp +strategy.reshard_after_forward=true"),
    (1, "+strategy.tp_size=2"),
    (1, "+strategy.mp_policy.grad_dtype=float32"),
    (1, "+parallelism.tensor_parallel=2"),
    (1, "+paralelism.tp_size=2"),
    (1, "+distributed.tp_size=2"),
    (1, "+train.stepz=3"),
    (1, "++pipeline.schedule=gpipe"),
    # The model and the batch.
    (3, "parallelism.tp_size=3"),
    (8, "parallelism.tp_size=8"),
    (2, "parallelism.tp_size=2 model.config.num_key_value_heads=1"),
    (4, "train.global_batch_size=6"),
    (2, "train.global_batch_size=12 train.micro_batch_size=4"),
    (1, "train.global_batch_size=0"),
    (1, "train.dtype=float16"),
    (1, "train.dtype=bf16"),
    (1, "train.dtype=bfloat16 strategy.mp_policy=null"),
    (1, "strategy=ddp train.dtype=bfloat16 strategy.autocast_dtype=float16"),
    # A plan of tensor parallelism.
    (2, "parallelism.tp_size=2 'strategy.tp_plan={model.layers.*.mlp.up_proj:columns}'"),
    (2, "parallelism.tp_size=2 'strategy.tp_plan={model.layer.*.up_proj:colwise,lm_head:colwise_gather_output}'"),
    (2, "parallelism.tp_size=2 'strategy.tp_plan={model.layers.9.mlp.up_proj:colwise}'"),
    (2, "parallelism.tp_size=2 'strategy.tp_plan={}'"),
    (2, "parallelism.tp_size=2 strategy.tp_plan=colwise"),
    # Values of the recipe.
    (1, "device=gpu"),
    (1, "seed=-1"),
    (1, "train.steps=0 train.log_every=0 train.max_grad_norm=-1 train.tensorboard=maybe"),
    (1, "train.schedule=cosin train.warmup_steps=-1"),
    (1, "data.seq_len=0 data.max_mb=-1 data.path=3"),
    (1, "optimizer.name=adamww"),
    (1, "optimizer.lr=-1 optimizer.betas=[0.9] +optimizer.betaz=3"),
    (1, "+optimizer.momentum=0.9"),
    (1, "optimizer=sgd optimizer.nesterov=true optimizer.momentum=0"),
    (1, "+model.config.num_hiden_layers=2"),
    (1, "+model.config.rope_theta=500000"),
    (1, "model.config.num_hidden_layers=0"),
    (1, "model.config.num_attention_heads=7"),
    (1, "model.config.hidden_size=72"),
    (1, "model.config.num_key_value_heads=3"),
    # Sections gone.
    (1, "strategy=null"),
    (1, "parallelism=null"),
    (1, "~parallelism"),
    # Checkpoints.
    (1, "checkpoint.every=100 checkpoint.keep=null checkpoint.async=true checkpoint.export=hf"),
    (1, "checkpoint.resume=null"),
    (1, "checkpoint.every=0"),
    (1, "checkpoint.every=10 checkpoint.keep=0"),
    (1, "checkpoint.every=10 checkpoint.async=later"),
    (1, "checkpoint.async=true"),
    (1, "checkpoint.keep=5"),
    (1, "checkpoint.export=gguf"),
    (1, "checkpoint.export=hf ~model.config +model._target_=tests.dist.layouts.Net"),
    (1, "checkpoint.resume=no/such/folder"),
    (1, "+checkpoint.evry=3"),
    # Many at once.
    (6, "strategy=ddp parallelism.tp_size=4 pipeline=gpipe strategy.bucket_cap_mb=0 activation_checkpointing=some"),
)


#: What a word without a dot chooses an option of.
_GROUPS = ("strategy", *SECTIONS, "model", "data", "optimizer")


def outcome(world_size: int, line: str) -> tuple[str, ConfigError | None]:
    """(text that a user sees, our error or None) for a command line of the recipe on ``world_size`` ranks."""
    return _outcome(world_size, tuple(shlex.split(line)))


@functools.cache
def _outcome(world_size: int, words: tuple[str, ...]) -> tuple[str, ConfigError | None]:
    """Kept: many refusals lead to the same few lines."""
    if not GlobalHydra.instance().is_initialized():
        initialize_config_dir(str(config_folder()), version_base="1.3")
    with about_to_start(Start(world_size, LAUNCH)):
        return _composed_and_checked(world_size, words)


@functools.cache
def _choices(words: tuple[str, ...]) -> DictConfig:
    return compose("train", overrides=list(words), return_hydra_config=True)


def _is_choice(word: str) -> bool:
    key = word.lstrip("+~").partition("=")[0]
    return "." not in key and ("@" in key or "/" in key or key in _GROUPS)


def _composed(words: tuple[str, ...]) -> DictConfig:
    """As Hydra composes them; it sets values last, so what it takes longest for is done once for each choice."""
    chosen = tuple(word for word in words if _is_choice(word))
    cfg = copy.deepcopy(_choices(chosen))
    values = OverridesParser.create().parse_overrides([word for word in words if word not in chosen])
    ConfigLoaderImpl._apply_overrides_to_config(values, cfg)
    with open_dict(cfg.hydra):
        cfg.hydra.overrides.task = list(words)
    return cfg


def _composed_and_checked(world_size: int, words: tuple[str, ...]) -> tuple[str, ConfigError | None]:
    try:
        cfg = _composed(words)
    except Exception as error:  # whatever it is, Hydra or OmegaConf raised it
        cause = error.__cause__
        return "Hydra: " + str(error).split("\n")[0] + (f" / {str(cause).splitlines()[0]}" if cause else ""), None
    HydraConfig.instance().set_config(cfg)
    try:
        checked = check_recipe(cfg, world_size)
        return f"runs: {checked.strategy.name}, {checked.mesh.describe()}", None
    except ConfigError as error:
        return str(error), error
