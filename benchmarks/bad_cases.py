"""What bad_input.py tries: an intent, the words that ask it of us, and what asks it of torch and of the peers.

Code of the others is run on every rank with what bad_rank.py imports; it has to leave the wrapped ``model``.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["CASES", "Case"]

#: Ways to start what several cases begin with.
_MESH = "mesh = init_device_mesh('cpu', ({},), mesh_dim_names=('dp',)); "
_SHARD = "model = build(); [fully_shard(layer{0}) for layer in model.model.layers]; fully_shard(model{0})"
_PLUGIN = (
    "plugin = FullyShardedDataParallelPlugin(fsdp_version=2, {}); "
    "model = Accelerator(cpu=True, fsdp_plugin=plugin).prepare(build())"
)
_PARALLEL = "model = Accelerator(cpu=True, parallelism_config=ParallelismConfig({})).prepare(build())"
_FABRIC = "fabric = Fabric(accelerator='cpu', devices={}, {}); fabric.launch(); model = fabric.setup_module(build())"
_DDP_OPTIONS = "model = Accelerator(cpu=True, kwargs_handlers=[DistributedDataParallelKwargs({})]).prepare(build())"
_TP = "mesh = init_device_mesh('cpu', {}, mesh_dim_names=('dp', 'tp')); model = build(); split(model, mesh['tp'])"
_PLAN = "model = parallelize_module(build(), init_device_mesh('cpu', (2,)), {})"
_WRAPS = "auto_wrap_policy='transformer_based_wrap', transformer_cls_names_to_wrap=['{}']"
_WHOLE = "lambda model, mesh: fully_shard(model, mesh=mesh['data_parallel'])"
_SPLIT = "lambda model, mesh: (split(model, mesh['tensor_parallel']), model)[1]"


def _shard(options: str) -> str:
    return _SHARD.format(f", {options}")


def _fabric(strategy: str, devices: int) -> str:
    return _FABRIC.format(devices, f"strategy={strategy}")


@dataclass(frozen=True)
class Case:
    """intent: what is wrong or doubtful. ranks: that are to be started. words: as typed after our recipe.

    doubtful: it can run, so what counts is whether anything is said. others: side -> the code that asks the same.
    """

    intent: str
    ranks: int
    words: str
    doubtful: bool = False
    others: dict[str, str] = field(default_factory=dict)


CASES = (
    # Names and values.
    Case(
        "an unknown strategy",
        1,
        "strategy=fsdp3",
        others={
            "accelerate": _PLUGIN.format("").replace("version=2", "version=3"),
            "fabric": _fabric("'fsdp3'", 1),
        },
    ),
    Case(
        "a misspelt option of sharding",
        1,
        "strategy.reshard_after_foward=true",
        others={
            "hand": _shard("reshard_after_foward=True"),
            "accelerate": _PLUGIN.format("reshard_after_foward=True"),
        },
    ),
    Case("the same, forced in with +", 1, "+strategy.reshard_after_foward=true"),
    Case(
        "a word where a boolean is meant",
        1,
        "strategy.reshard_after_forward=maybe",
        others={
            "hand": _shard("reshard_after_forward='maybe'"),
            "accelerate": _PLUGIN.format("reshard_after_forward='maybe'"),
        },
    ),
    Case(
        "a dtype of no known name",
        1,
        "strategy.mp_policy.param_dtype=bf16",
        others={
            "hand": _shard("mp_policy=MixedPrecisionPolicy(param_dtype='bf16')"),
            "accelerate": _PLUGIN.format("mixed_precision_policy='bf17'"),
            "fabric": _FABRIC.format(1, "precision='bf17-mixed'"),
        },
    ),
    Case(
        "another option's field on ddp",
        1,
        "strategy=ddp +strategy.reshard_after_forward=true",
        others={
            "hand": "model = DistributedDataParallel(build(), reshard_after_forward=True)",
            "accelerate": _DDP_OPTIONS.format("reshard_after_forward=True"),
            "fabric": _fabric("DDPStrategy(reshard_after_forward=True)", 1),
        },
    ),
    Case("a misspelt group", 1, "+paralelism.tp_size=2"),
    Case("another project's name of a size", 1, "parallelism.sp_size=2"),
    Case("a size that is no number", 1, "parallelism.tp_size=two"),
    Case("a fractional size", 1, "parallelism.tp_size=2.5"),
    Case("a misspelt key of the recipe", 1, "+train.stepz=3"),
    Case("a misspelt schedule", 2, "parallelism.pp_size=2 pipeline.pp_schedule=1f1bb"),
    # Sizes and the world.
    Case(
        "more ranks asked for than there are",
        1,
        "parallelism.dp_size=4",
        others={
            "hand": _MESH.format(4) + _shard("mesh=mesh"),
            "accelerate": _PARALLEL.format("dp_shard_size=4"),
            "fabric": _fabric(f"ModelParallelStrategy({_SPLIT}, data_parallel_size=4, tensor_parallel_size=1)", 1),
        },
    ),
    Case(
        "fewer ranks asked for than there are",
        2,
        "strategy=ddp parallelism.dp_size=1",
        others={
            "hand": _MESH.format(1) + _shard("mesh=mesh"),
            "accelerate": _PARALLEL.format("dp_replicate_size=1"),
            "fabric": _fabric(f"ModelParallelStrategy({_SPLIT}, data_parallel_size=1, tensor_parallel_size=1)", 2),
        },
    ),
    Case(
        "tensor parallelism over 2 of 3 ranks",
        3,
        "parallelism.tp_size=2",
        others={
            "hand": _TP.format("(1, 2)"),
            "accelerate": _PARALLEL.format("tp_size=2"),
            "fabric": _fabric(f"ModelParallelStrategy({_SPLIT}, data_parallel_size=1, tensor_parallel_size=2)", 3),
        },
    ),
    Case(
        "a size of nought",
        2,
        "parallelism.tp_size=0",
        others={
            "hand": _TP.format("(2, 0)"),
            "accelerate": _PARALLEL.format("tp_size=0"),
            "fabric": _fabric(f"ModelParallelStrategy({_SPLIT}, data_parallel_size=2, tensor_parallel_size=0)", 2),
        },
    ),
    Case(
        "a negative size",
        2,
        "parallelism.tp_size=-2",
        others={
            "hand": _TP.format("(-1, -2)"),
            "accelerate": _PARALLEL.format("tp_size=-2"),
            "fabric": _fabric(f"ModelParallelStrategy({_SPLIT}, data_parallel_size=-1, tensor_parallel_size=-2)", 2),
        },
    ),
    Case(
        "replicas that do not divide the ranks",
        2,
        "parallelism.dp_replicate_size=3",
        others={
            "hand": "mesh = init_device_mesh('cpu', (3, 1), mesh_dim_names=('a', 'b')); " + _shard("mesh=mesh"),
            "accelerate": _PARALLEL.format("dp_replicate_size=3"),
        },
    ),
    # Strategies and axes.
    Case(
        "tensor parallelism under ddp",
        2,
        "strategy=ddp parallelism.tp_size=2",
        others={
            "accelerate": _PARALLEL.format("tp_size=2"),
            "fabric": _fabric("DDPStrategy(tensor_parallel_size=2)", 2),
        },
    ),
    Case("pipeline stages under ddp", 2, "strategy=ddp parallelism.pp_size=2"),
    Case(
        "context parallelism under ddp",
        2,
        "strategy=ddp parallelism.cp_size=2",
        others={"accelerate": _PARALLEL.format("cp_size=2")},
    ),
    Case("pipeline stages under megatron_fsdp", 2, "strategy=megatron_fsdp parallelism.pp_size=2"),
    Case("experts split in a model without any", 2, "parallelism.ep_size=2"),
    Case("a schedule without stages", 1, "pipeline=gpipe"),
    Case("options of experts without experts", 1, "moe.reshard_after_forward=true"),
    Case("ZeRO stage 4", 1, "strategy=megatron_fsdp strategy.zero_dp_strategy=4"),
    # What the model cannot do.
    Case(
        "heads that tensor parallelism does not divide",
        3,
        "parallelism.tp_size=3",
        others={
            "hand": _TP.format("(1, 3)"),
            "fabric": _fabric(f"ModelParallelStrategy({_SPLIT}, data_parallel_size=1, tensor_parallel_size=3)", 3),
        },
    ),
    Case("more stages than layers", 8, "parallelism.pp_size=8"),
    Case(
        "a class to wrap that the model has not",
        1,
        "strategy=megatron_fsdp strategy.megatron_fsdp_unit_modules=[absent.Block]",
        others={
            "accelerate": _PLUGIN.format(_WRAPS.format("Absent")),
        },
    ),
    Case(
        "a plan of tensor parallelism with an unknown style",
        2,
        "parallelism.tp_size=2 strategy.tp_plan={model.layers.*.mlp.up_proj:columns}",
        others={
            "hand": _PLAN.format("{'model.layers.*.mlp.up_proj': 'columns'}"),
        },
    ),
    Case(
        "a plan that names no layer of the model",
        2,
        "parallelism.tp_size=2 strategy.tp_plan={model.layer.*.up_proj:colwise}",
        others={
            "hand": _PLAN.format("{'model.layer.*.up_proj': ColwiseParallel()}"),
        },
    ),
    # The batch.
    Case("a batch that the ranks do not divide", 4, "train.global_batch_size=6"),
    Case(
        "microbatches that do not divide a rank's rows",
        2,
        "train.global_batch_size=12 train.micro_batch_size=4",
    ),
    Case("fewer microbatches than stages", 4, "parallelism.pp_size=4 train.global_batch_size=2"),
    Case("an empty batch", 1, "train.global_batch_size=0"),
    # Options.
    Case(
        "a negative bucket",
        1,
        "strategy=ddp strategy.bucket_cap_mb=-25",
        others={
            "hand": "model = DistributedDataParallel(build(), bucket_cap_mb=-25)",
            "accelerate": _DDP_OPTIONS.format("bucket_cap_mb=-25"),
            "fabric": _fabric("DDPStrategy(bucket_cap_mb=-25)", 1),
        },
    ),
    Case("a negative depth of prefetching", 1, "strategy.fsdp2_forward_prefetch_depth=-1"),
    Case("prefetching deeper, but off", 1, "strategy.fsdp2_backward_prefetch_depth=4"),
    Case(
        "asynchronous tensor parallelism without compile",
        2,
        "strategy.enable_async_tensor_parallel=true parallelism.tp_size=2",
    ),
    Case("autocast with an unknown dtype", 1, "strategy.autocast_dtype=int8"),
    Case("an unknown mode of checkpointing activations", 1, "activation_checkpointing=some"),
    Case(
        "the same option twice, and differently",
        1,
        "activation_checkpointing=selective strategy.activation_checkpointing=true",
    ),
    Case(
        "selective checkpointing with stages that split backward",
        2,
        "parallelism.pp_size=2 pipeline=zbv_zero_bubble activation_checkpointing=selective",
    ),
    # The recipe's values.
    Case("an unknown optimizer", 1, "optimizer.name=adamww"),
    Case("a negative learning rate", 1, "optimizer.lr=-1"),
    Case("no step at all", 1, "train.steps=0"),
    Case("an unknown device", 1, "device=gpu"),
    Case(
        "a misspelt field of the model",
        1,
        "+model.config.num_hiden_layers=2",
        others={"hand": "model = build(num_hiden_layers=2)"},
    ),
    Case("heads that do not divide the hidden size", 1, "model.config.num_attention_heads=7"),
    # Checkpoints.
    Case("to resume from a folder that is not there", 1, "checkpoint.resume=no/such/folder"),
    Case("to keep no checkpoint", 1, "checkpoint.every=10 checkpoint.keep=0"),
    Case("to export in an unknown format", 1, "checkpoint.export=gguf"),
    Case(
        "several mistakes at once",
        3,
        "strategy=ddp parallelism.tp_size=2 pipeline=gpipe strategy.bucket_cap_mb=0 activation_checkpointing=some",
    ),
    # What can run, but is hardly what was meant.
    Case(
        "sharding on a CPU",
        2,
        "strategy=fsdp2",
        doubtful=True,
        others={
            "hand": _shard("mesh=init_device_mesh('cpu', (2,))"),
            "accelerate": _PLUGIN.format(_WRAPS.format("LlamaDecoderLayer")),
            "fabric": _fabric(f"ModelParallelStrategy({_WHOLE}, data_parallel_size=2, tensor_parallel_size=1)", 2),
        },
    ),
    Case("sequence parallelism without tensor parallelism", 1, "strategy.sequence_parallel=true", doubtful=True),
    Case(
        "offloading and pinning without a GPU",
        1,
        "strategy.offload_policy.enabled=true",
        doubtful=True,
        others={
            "hand": _shard("offload_policy=CPUOffloadPolicy()"),
            "accelerate": _PLUGIN.format("cpu_offload=True"),
        },
    ),
)
