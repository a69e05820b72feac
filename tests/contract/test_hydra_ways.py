"""Typed classes in the ways that Hydra's users have: hints, OmegaConf.structured, hydra-zen, instantiate."""

import dataclasses
import typing

import hydra_zen
import pytest
import torch
from hydra import compose, initialize
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import nemo_dist_conf
from nemo_dist_conf import ConfigError, DistributedSetup, MeshContext, config, pipelining
from nemo_dist_conf.composition.check import check
from nemo_dist_conf.instantiate import instantiate as hook
from nemo_dist_conf.strategies import STRATEGIES

CLASSES = [
    nemo_dist_conf.DDPConfig,
    nemo_dist_conf.FSDP2Config,
    nemo_dist_conf.MegatronFSDPConfig,
    nemo_dist_conf.MoEParallelizerConfig,
    nemo_dist_conf.ParallelismSizes,
    nemo_dist_conf.PipelineConfig,
]
MODES = ["none", "partial", "object", "all"]
#: Words that change something of every kind: a bool, a dtype, a mode, a policy, an enum, a list, a mapping.
WORDS = {
    "ddp": ["strategy.autocast_dtype=float16", "strategy.activation_checkpointing=selective"],
    "fsdp2": [
        "strategy.autocast_dtype=bfloat16",
        "strategy.mp_policy.param_dtype=float32",
        "strategy.offload_policy.enabled=true",
        "strategy.tp_plan={q:colwise}",
        "activation_checkpointing=full",
        "parallelism.pp_size=2",
        "parallelism.ep_size=2",
        "pipeline=interleaved_1f1b",
        "pipeline.pp_batch_size=4",
        "pipeline.layers_per_stage=1",
        "pipeline.round_virtual_stages_to_pp_multiple=up",
        "pipeline.dtype=bfloat16",
        "pipeline.loss_fn=torch.nn.functional.mse_loss",
        "moe.mp_policy.enabled=true",
        "moe.mp_policy.output_dtype=float32",
        "moe.lm_head_precision=float32",
    ],
    "megatron_fsdp": ["strategy.megatron_fsdp_unit_modules=[torch.nn.Linear]", "strategy.zero_dp_strategy=1"],
}


def composed(*words: str) -> DictConfig:
    with initialize(None, version_base="1.3"):
        return compose("nemo_dist_conf", overrides=list(words))


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_hints_can_be_read(kind):
    assert set(typing.get_type_hints(kind)) == {field.name for field in dataclasses.fields(kind)}
    assert set(typing.get_type_hints(kind.__init__)) >= {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(
    "function",
    [DistributedSetup, DistributedSetup.build, MeshContext, MeshContext.build, hook],
    ids=lambda function: function.__qualname__,
)
def test_hints_of_what_takes_them_can_be_read(function):
    assert typing.get_type_hints(function)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_omegaconf_reads_a_class_and_gives_it_back(kind):
    node = OmegaConf.structured(kind)
    assert OmegaConf.to_object(node) == kind()
    again: typing.Any = OmegaConf.create(OmegaConf.to_yaml(node))  # nothing in it that YAML cannot say
    assert kind(**again) == kind()


def test_a_structured_class_takes_names_and_policies():
    typed = OmegaConf.structured(config.FSDP2Config)
    merged = OmegaConf.merge(typed, {"mp_policy": {"param_dtype": "float16"}, "autocast_dtype": "bfloat16"})
    made: typing.Any = OmegaConf.to_object(merged)
    assert made.mp_policy.param_dtype is torch.float16 and made.autocast_dtype is torch.bfloat16
    without: typing.Any = OmegaConf.to_object(OmegaConf.merge(typed, {"mp_policy": None}))
    assert without.mp_policy is None


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_hydra_zen_builds_a_class_with_its_full_signature(kind):
    built = hydra_zen.builds(kind, populate_full_signature=True)
    names = [field.name for field in dataclasses.fields(built)]
    assert names[1:] == [field.name for field in dataclasses.fields(kind)]
    assert hydra_zen.instantiate(built) == kind()


def test_hydra_zen_builds_a_setup_from_built_configs():
    built = hydra_zen.builds(
        config.DistributedSetup.build,
        strategy=hydra_zen.builds(config.DDPConfig, populate_full_signature=True, find_unused_parameters=True),
        populate_full_signature=True,
    )
    assert OmegaConf.create(hydra_zen.to_yaml(built)).strategy.find_unused_parameters is True


@pytest.mark.parametrize("path", ["nemo_dist_conf", "nemo_dist_conf.config", "nemo_dist_conf.runtime.typed_configs"])
def test_a_strategy_is_known_by_any_path_of_its_class(path):
    tree = {"strategy": {"_target_": f"{path}.DDPConfig"}, "parallelism": {"tp_size": 2}}
    with pytest.raises(ConfigError, match="strategy=ddp: tp_size=2 is not possible"):
        check(OmegaConf.create(tree), 2)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", WORDS)
def test_hydras_instantiate_makes_the_typed_configs(strategy, mode):
    """Of a node, of the tree, and of a tree that holds the tree. Hydra itself puts dataclasses into its own nodes."""
    cfg = composed(f"strategy={strategy}", *WORDS[strategy])
    typed = next(s for s in STRATEGIES if s.name == strategy).config
    values = {key: value for key, value in cfg.strategy.items() if key != "_target_"}
    expected = typed(**values)
    assert instantiate(cfg.strategy, _convert_=mode) == expected
    pipeline = pipelining.PipelineConfig(**{key: cfg.pipeline[key] for key in cfg.pipeline if key != "_target_"})
    for tree in (instantiate(cfg, _convert_=mode), instantiate({"inner": cfg}, _convert_=mode)["inner"]):
        found: typing.Any = {key: OmegaConf.to_object(v) if OmegaConf.is_config(v) else v for key, v in tree.items()}
        assert found["strategy"] == expected and type(found["strategy"]) is typed
        assert found["pipeline"] == pipeline
        assert found["parallelism"].tp_size == 1


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_an_instantiated_tree_is_checked_as_the_composed_one(strategy, mode):
    cfg = composed(f"strategy={strategy}", *WORDS[strategy], "strategy.activation_checkpointing=true")
    made = instantiate(cfg, _convert_=mode)
    expected, found = check(cfg, 4), check(made, 4)
    assert (found.mesh, found.sizes, found.activation_checkpointing) == (expected.mesh, expected.sizes, True)
    assert found.strategy.config(**found.strategy_values) == expected.strategy.config(**expected.strategy_values)
    for section, kind in (("pipeline", pipelining.PipelineConfig), ("moe", config.MoEParallelizerConfig)):
        assert kind(**getattr(found, section)) == kind(**getattr(expected, section))
    wrong = instantiate(composed(f"strategy={strategy}", "parallelism.dp_size=3"), _convert_=mode)
    with pytest.raises(ConfigError, match="3 ranks, but there are 4"):
        check(wrong, 4)


def test_objects_in_an_instantiated_tree_stay_objects():
    def loss(output, target):
        return output

    class Style:
        pass

    plan = {"q": Style()}
    tree = {
        "strategy": config.FSDP2Config(tp_plan=plan, mp_policy=None, autocast_dtype=torch.float16),
        "parallelism": nemo_dist_conf.ParallelismSizes(pp_size=2),
        "pipeline": pipelining.PipelineConfig(loss_fn=loss, pp_batch_size=2),
    }
    checked = check(tree, 2)
    assert checked.pipeline["loss_fn"] is loss
    assert isinstance(checked.strategy_values["tp_plan"]["q"], Style)
    again = config.FSDP2Config(**checked.strategy_values)
    assert again.mp_policy is None and again.autocast_dtype is torch.float16


@pytest.mark.parametrize("target", ["torch.distributed.fsdp.MixedPrecisionPolicy", None])
def test_a_policy_may_be_written_as_torchs_own_class(target):
    """As the page's neighbours write it in YAML; hydra.utils.instantiate would keep the dtype's name as a text."""
    node = {"param_dtype": "float16", "output_dtype": "torch.float32", **({"_target_": target} if target else {})}
    tree: dict[str, typing.Any] = {"strategy": {"_target_": "nemo_dist_conf.config.FSDP2Config", "mp_policy": node}}
    if target:
        tree |= {"moe": {"mp_policy": node}, "parallelism": {"ep_size": 2}}
    checked = check(OmegaConf.create(tree), 2)
    made = config.FSDP2Config(**checked.strategy_values).mp_policy
    assert made is not None
    assert (made.param_dtype, made.output_dtype) == (torch.float16, torch.float32)
    if target:
        policy = config.MoEParallelizerConfig(**checked.moe).mp_policy
        assert policy is not None and policy.param_dtype is torch.float16


def test_what_is_given_and_needs_no_conversion_stays_that_object():
    plan, units, parts = {"q": "colwise"}, ["torch.nn.Linear"], [["embed"], ["head"]]
    assert config.FSDP2Config(tp_plan=plan).tp_plan is plan
    assert config.MegatronFSDPConfig(megatron_fsdp_unit_modules=units).megatron_fsdp_unit_modules is units
    assert pipelining.PipelineConfig(module_fqns_per_model_part=parts).module_fqns_per_model_part is parts
    assert config.FSDP2Config(tp_plan={1: "colwise"}).tp_plan == {"1": "colwise"}
    pair: typing.Any = ("a",)
    assert config.MegatronFSDPConfig(megatron_fsdp_unit_modules=pair).megatron_fsdp_unit_modules == ["a"]


@pytest.mark.parametrize("kind", [config.DDPConfig, config.FSDP2Config, config.MegatronFSDPConfig])
def test_full_is_the_other_name_of_activation_checkpointing_true(kind):
    assert kind(activation_checkpointing="full").activation_checkpointing is True
    name = next(s.name for s in STRATEGIES if s.config is kind)
    if name != "megatron_fsdp":
        for key in ("activation_checkpointing", "strategy.activation_checkpointing"):
            assert check(composed(f"strategy={name}", f"{key}=full"), 1).activation_checkpointing is True
    both = [f"strategy={name}", "activation_checkpointing=full", "strategy.activation_checkpointing=selective"]
    with pytest.raises(ConfigError):
        check(composed(*both), 1)
