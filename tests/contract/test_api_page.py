"""The typed API against a golden file that was typed by hand from the page: names, order, types, defaults."""

import dataclasses
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

import nemo_dist_conf
from nemo_dist_conf import config, mesh, pipelining
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.schema import MoEConf, ParallelismConf, PipelineConf
from nemo_dist_conf.strategies import STRATEGIES

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "api_page.json").read_text())
TYPED = {name: getattr(nemo_dist_conf, name) for name in GOLDEN}
SCHEMAS = {s.config.__name__: s.schema for s in STRATEGIES} | {
    "MoEParallelizerConfig": MoEConf,
    "ParallelismSizes": ParallelismConf,
    "PipelineConfig": PipelineConf,
}


def _default(value):
    return str(value) if isinstance(value, MixedPrecisionPolicy) else value


@pytest.mark.parametrize("name", GOLDEN)
def test_fields_are_those_of_the_page_in_its_order_with_its_types_and_defaults(name):
    made = TYPED[name]()
    found = [[f.name, str(f.type), _default(getattr(made, f.name))] for f in dataclasses.fields(TYPED[name])]
    assert found == GOLDEN[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_positional_arguments_follow_the_page(name):
    assert list(inspect.signature(TYPED[name]).parameters) == [field for field, _, _ in GOLDEN[name]]


@pytest.mark.parametrize("name", GOLDEN)
def test_the_schema_twin_has_the_same_fields_and_lowers_to_the_same_defaults(name):
    schema = SCHEMAS[name]
    assert [f.name for f in dataclasses.fields(schema)] == [field for field, _, _ in GOLDEN[name]]
    values: Any = OmegaConf.to_container(OmegaConf.structured(schema))
    lowered = TYPED[name](**values)
    assert [_default(getattr(lowered, field)) for field, _, _ in GOLDEN[name]] == [d for _, _, d in GOLDEN[name]]


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_field_has_a_help_text(name):
    assert [f.name for f in dataclasses.fields(SCHEMAS[name]) if not f.metadata.get("help")] == []


def test_names_of_the_page_are_importable():
    assert config.__all__ == [
        "DDPConfig",
        "DistributedSetup",
        "DistributedStrategyConfig",
        "FSDP2Config",
        "MegatronFSDPConfig",
        "MoEParallelizerConfig",
    ]
    assert config.DistributedConfig == config.DistributedStrategyConfig
    assert config.ActivationCheckpointingMode is not None
    assert {name: cls.__name__ for name, cls in config._STRATEGY_MAP.items()} == {
        "fsdp2": "FSDP2Config",
        "megatron_fsdp": "MegatronFSDPConfig",
        "megatron-fsdp": "MegatronFSDPConfig",
        "mfsdp": "MegatronFSDPConfig",
        "ddp": "DDPConfig",
    }
    assert mesh.__all__ == ["MeshAxisName", "MeshContext", "ParallelismSizes"]
    assert pipelining.__all__ == ["PipelineConfig"]


def test_setup_and_its_build_have_the_pages_parameters_and_defaults():
    fields = [(f.name, f.default) for f in dataclasses.fields(config.DistributedSetup)]
    assert fields == [
        ("mesh_context", dataclasses.MISSING),
        ("strategy_config", None),
        ("pipeline_config", None),
        ("moe_parallel_config", None),
        ("activation_checkpointing", False),
    ]
    parameters = inspect.signature(config.DistributedSetup.build).parameters
    assert {name: p.default for name, p in parameters.items()} == {
        "strategy": "fsdp2",
        "parallelism_sizes": None,
        "pipeline_config": None,
        "moe_parallel_config": None,
        "activation_checkpointing": False,
        "world_size": None,
    }


@pytest.mark.parametrize("name", [name for name in GOLDEN if name != "ParallelismSizes"])
def test_to_dict_is_shallow_and_keeps_objects(name):
    made = TYPED[name]()
    values = made.to_dict()
    assert list(values) == [field for field, _, _ in GOLDEN[name]]
    assert all(values[key] is getattr(made, key) for key in values)


def test_axis_names_are_plain_strings():
    assert mesh.MeshAxisName.TP == "tp"
    assert sorted(axis.value for axis in mesh.MeshAxisName) == sorted(
        ["pp", "dp", "dp_replicate", "dp_shard", "dp_shard_cp", "dp_cp", "cp", "tp", "ep", "ep_shard"]
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("bfloat16", torch.bfloat16),
        ("torch.float16", torch.float16),
        (torch.float32, torch.float32),
        (None, None),
    ],
)
def test_dtypes_may_be_given_by_name(given, expected):
    assert config.DDPConfig(autocast_dtype=given).autocast_dtype is expected
    assert config.FSDP2Config(autocast_dtype=given).autocast_dtype is expected
    assert config.MoEParallelizerConfig(lm_head_precision=given).lm_head_precision is expected
    assert pipelining.PipelineConfig(dtype=given).dtype is expected


def test_policies_may_be_given_as_objects_or_mappings_and_none_turns_them_off():
    policy = MixedPrecisionPolicy(param_dtype=torch.float16)
    offload = CPUOffloadPolicy(pin_memory=False)
    made = config.FSDP2Config(mp_policy=policy, offload_policy=offload)
    assert made.mp_policy is policy and made.offload_policy is offload
    mappings: Any = {"mp_policy": {"param_dtype": "float16"}, "offload_policy": {"pin_memory": False}}
    made = config.FSDP2Config(**mappings)
    assert made.mp_policy is not None
    assert made.mp_policy.param_dtype is torch.float16 and made.mp_policy.reduce_dtype is torch.float32
    assert made.offload_policy == CPUOffloadPolicy(pin_memory=False)
    made = config.FSDP2Config(mp_policy=None, offload_policy={"enabled": False})  # type: ignore[arg-type]
    assert made.mp_policy is None and made.offload_policy is None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: config.FSDP2Config(autocast_dtype="bf16"), "bfloat16"),  # type: ignore[arg-type]
        (lambda: config.FSDP2Config(mp_policy="bfloat16"), "strategy.mp_policy"),  # type: ignore[arg-type]
        (lambda: config.FSDP2Config(mp_policy={"parm_dtype": "bfloat16"}), "param_dtype"),  # type: ignore[arg-type]
        (lambda: config.FSDP2Config(tp_plan="llama"), "strategy.tp_plan"),  # type: ignore[arg-type]
        (lambda: config.FSDP2Config(activation_checkpointing="some"), "selective"),
        (lambda: config.FSDP2Config(fsdp2_forward_prefetch_depth="deep"), "fsdp2_forward_prefetch_depth"),  # type: ignore[arg-type]
        (lambda: config.DDPConfig(bucket_cap_mb="big"), "bucket_cap_mb"),  # type: ignore[arg-type]
        (lambda: config.MegatronFSDPConfig(zero_dp_strategy="three"), "zero_dp_strategy"),  # type: ignore[arg-type]
        (lambda: mesh.ParallelismSizes(tp_size=0), "tp_size"),
        (lambda: mesh.ParallelismSizes(tp_size=True), "tp_size"),
        (lambda: mesh.ParallelismSizes(dp_size=2.5), "dp_size"),  # type: ignore[arg-type]
        (lambda: pipelining.PipelineConfig(loss_fn="nowhere.at_all"), "loss_fn"),  # type: ignore[arg-type]
        (lambda: pipelining.PipelineConfig(round_virtual_stages_to_pp_multiple="sideways"), "sideways"),
        (lambda: config._resolve_strategy_config("fdsp2"), "fsdp2"),
        (lambda: config._resolve_strategy_config("ddp", bucket_cap=1), "bucket_cap_mb"),
        (lambda: config._resolve_strategy_config(config.DDPConfig(), static_graph=True), "static_graph"),
        (lambda: config._resolve_strategy_config(7), "7"),  # type: ignore[arg-type]
    ],
)
def test_a_wrong_value_is_a_config_error_that_names_the_way_out(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    assert words in str(caught.value)
    assert isinstance(caught.value, ValueError)
    for problem in caught.value.problems:
        assert problem.what and problem.asked and problem.allowed and problem.instead


def test_strategy_names_resolve_with_options_and_objects_pass_through():
    made = config._resolve_strategy_config("DDP", static_graph=True)
    assert made == config.DDPConfig(static_graph=True)
    assert config._resolve_strategy_config(made) is made
    assert type(config._resolve_strategy_config("mfsdp")) is config.MegatronFSDPConfig
