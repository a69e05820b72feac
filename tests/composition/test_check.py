"""The check on composed trees: where they stand, where they come from, what slipped into them."""

import pytest
from hydra import compose, initialize
from omegaconf import OmegaConf

from nemo_dist_conf.composition.check import check, find_roots
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.families.config_facts import ModelFacts


@pytest.fixture(autouse=True)
def _one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


def composed(*overrides, base="nemo_dist_conf"):
    with initialize(None, version_base="1.3"):
        return compose(base, overrides=list(overrides))


def test_a_checked_config_says_what_will_run():
    checked = check(composed("parallelism.tp_size=2", "activation_checkpointing=selective"), 8)
    assert checked.strategy.name == "fsdp2"
    assert checked.mesh.size("tp") == 2 and checked.mesh.size("dp_shard") == 4
    assert checked.activation_checkpointing == "selective"
    assert checked.notes == ()


@pytest.mark.parametrize("reload", [False, True], ids=["as composed", "written to YAML and read back"])
def test_a_config_may_have_lost_its_types(reload):
    cfg = composed("strategy=ddp", "strategy.autocast_dtype=bfloat16")
    if reload:
        cfg = OmegaConf.create(OmegaConf.to_yaml(cfg))
    checked = check(cfg, 2)
    assert checked.strategy_values["autocast_dtype"].name == "bfloat16"
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, enum_to_str=True))
    cfg.strategy.bucket_cap_mb = "big"
    with pytest.raises(ConfigError, match="strategy.bucket_cap_mb"):
        check(cfg, 2)


def test_groups_below_a_package_are_found_and_named_where_they_stand():
    cfg = OmegaConf.create({"lr": 0.1, "dist": composed("strategy=ddp", "parallelism.tp_size=2")})
    assert [root._get_full_key("strategy") for root in find_roots(cfg)] == ["dist.strategy"]
    with pytest.raises(ConfigError) as caught:
        check(cfg, 2)
    assert caught.value.asked == "strategy@dist.strategy=ddp dist.parallelism.tp_size=2"
    with pytest.raises(ConfigError) as caught:
        check(cfg.dist, 2)
    assert caught.value.asked == "strategy@dist.strategy=ddp dist.parallelism.tp_size=2"


def test_an_apps_own_strategy_beside_ours_is_no_root():
    cfg = OmegaConf.create({"strategy": {"name": "greedy"}, "dist": composed("strategy=ddp")})
    OmegaConf.set_struct(cfg, True)
    assert check(cfg, 2).strategy.name == "ddp"


def test_two_strategies_in_one_tree_need_a_choice():
    cfg = OmegaConf.create({"student": composed("strategy=ddp"), "teacher": composed()})
    with pytest.raises(ConfigError) as caught:
        check(cfg, 1)
    assert "2 places" in caught.value.what
    assert check(cfg.student, 1).strategy.name == "ddp"


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"strategy": "ddp"}, "not a strategy's options"),
        ({"strategy": "ddpp"}, "no strategy 'ddpp'"),
        ({"strategy": None}, "no strategy of nemo_dist_conf"),
        ({"strategy": {"name": "mine"}}, "no strategy of nemo_dist_conf"),
        ({"strategy": {"reshard_after_forward": False}}, "type     defaults: .fsdp2, _self_."),
        ({"strategy": {"bucket_cap_mb": 4}}, "type     defaults: .ddp, _self_."),
        ({}, "no strategy of nemo_dist_conf"),
    ],
)
def test_without_our_node_it_says_what_is_missing(tree, words):
    with pytest.raises(ConfigError, match=words):
        check(OmegaConf.create(tree), 1)


@pytest.mark.parametrize("name", ["parallelism", "pipeline", "moe"])
@pytest.mark.parametrize("value", [None, "default", 3])
def test_a_section_that_is_no_mapping_is_refused(name, value):
    cfg = OmegaConf.create(OmegaConf.to_container(composed(), enum_to_str=True))
    cfg[name] = value
    with pytest.raises(ConfigError) as caught:
        check(cfg, 1)
    assert caught.value.what.startswith(name)


def test_an_apps_own_key_that_resembles_ours_is_left_alone():
    cfg = OmegaConf.create({**composed(), "strategies": ["a"], "pipelines": {"data": 1}, "parallel": True, "mode": 3})
    assert check(cfg, 1).strategy.name == "fsdp2"


def test_the_rank_variables_of_a_launcher_are_the_world(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert check(composed()).mesh.world_size == 6
    with pytest.raises(ConfigError, match="world size 6"):
        check(composed("parallelism.tp_size=4"))


def test_rules_use_the_model_where_it_is_known():
    cfg = composed("parallelism.tp_size=4")
    assert check(cfg, 4).mesh.size("tp") == 4
    with pytest.raises(ConfigError, match="key/value heads"):
        check(cfg, 4, facts=ModelFacts(num_heads=8, num_kv_heads=2))
    OmegaConf.set_struct(cfg, False)
    cfg.model = {"config": {"model_type": "llama", "num_attention_heads": 6}}
    with pytest.raises(ConfigError, match="6 attention heads"):
        check(cfg, 4)


def test_a_folders_config_is_read_for_the_rules(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_attention_heads": 3}')
    cfg = composed("parallelism.tp_size=2")
    OmegaConf.set_struct(cfg, False)
    cfg.model = {"name_or_path": str(tmp_path)}
    with pytest.raises(ConfigError, match="3 attention heads"):
        check(cfg, 2)


@pytest.mark.parametrize(
    ("words", "ranks", "instead"),
    [
        (("strategy=ddp",), 2, "strategy.find_unused_parameters=true"),
        (("strategy=ddp",), 1, None),
        (("strategy=ddp", "strategy.find_unused_parameters=true"), 2, None),
        (("strategy=fsdp2",), 2, None),
        (("strategy=fsdp2", "parallelism.pp_size=2", "pipeline.pp_batch_size=2"), 2, "parallelism.pp_size=1"),
    ],
)
def test_a_model_that_skips_layers_is_known_from_its_config(words, ranks, instead):
    cfg = composed(*words)
    OmegaConf.set_struct(cfg, False)
    cfg.model = {"config": {"model_type": "bart", "encoder_layerdrop": 0.1, "decoder_layerdrop": 0.0}}
    if instead is None:
        check(cfg, ranks)
        return
    with pytest.raises(ConfigError, match="model.config.encoder_layerdrop=0.1") as error:
        check(cfg, ranks)
    assert error.value.type == instead


def test_trivially_satisfied_requests_are_noted():
    notes = check(composed("strategy.sequence_parallel=true"), 1).notes
    assert len(notes) == 1 and "strategy.sequence_parallel" in notes[0]


def test_every_problem_is_told_at_once_and_numbered():
    with pytest.raises(ConfigError) as caught:
        check(composed("strategy=ddp", "parallelism.tp_size=2", "pipeline=gpipe", "strategy.bucket_cap_mb=0"), 2)
    assert len(caught.value.problems) == 3
    assert str(caught.value).startswith("3 problems:\n1. ") and "\n3. " in str(caught.value)


def test_an_error_survives_pickling():
    import pickle

    with pytest.raises(ConfigError) as caught:
        check(composed("strategy=ddp", "parallelism.tp_size=2"), 2)
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is ConfigError and again.problems == caught.value.problems and str(again) == str(caught.value)
