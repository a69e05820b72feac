"""Help texts on the command line."""

import dataclasses

import pytest
from hydra import compose, initialize, initialize_config_dir
from omegaconf import OmegaConf

from nemo_dist_conf.composition.explain import explain, main
from nemo_dist_conf.composition.sections import SECTIONS, leaves
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.recipe.yaml_folder import config_folder
from nemo_dist_conf.strategies import STRATEGIES, strategy_names
from nemo_dist_conf.wording import typed


def test_without_a_name_every_option_of_every_section_is_explained():
    text = explain()
    for strategy in STRATEGIES:
        for item in dataclasses.fields(strategy.schema):
            assert f"strategy.{item.name}" in text
    for name, schema in SECTIONS.items():
        for item in dataclasses.fields(schema):
            assert f"{name}.{item.name}" in text


@pytest.mark.parametrize("name", strategy_names())
def test_every_name_of_a_strategy_is_known(name):
    assert f"strategy={name}" in explain(f"strategy={name}").replace(" | ", " strategy=")


def test_defaults_are_shown_as_they_are_typed():
    text = explain("strategy=fsdp2", "parallelism")
    assert "strategy.mp_policy.param_dtype=bfloat16" in text
    assert "strategy.reshard_after_forward=null" in text
    assert "parallelism.tp_size=1" in text


def test_an_unknown_name_is_refused_with_the_nearest(capsys):
    assert main(["paralelism"]) == 1
    assert "type     parallelism" in capsys.readouterr().err
    assert main(["strategy=dpp"]) == 1
    assert "type     strategy=ddp" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "meant"),
    [("ddp", "strategy=ddp"), ("strategy=DDP", "strategy=ddp"), ("tp_size", "parallelism"), ("moe.mp_policy", "moe")],
)
def test_a_name_without_its_section_leads_to_it(word, meant):
    with pytest.raises(ConfigError) as caught:
        explain(word)
    assert caught.value.type == meant
    assert explain(meant)


def test_help_says_how_it_is_asked(capsys):
    assert main(["--help"]) == 0
    assert "strategy=ddp" in capsys.readouterr().out


def test_an_explained_default_is_the_one_that_is_composed():
    """Of every option of every strategy, of the groups beside it, and of the launcher."""
    composed = {}
    with initialize(None, version_base="1.3"):
        for strategy in STRATEGIES:
            cfg = compose("nemo_dist_conf", [f"strategy={strategy.name}"])
            composed[f"strategy={strategy.name}"] = {"strategy": cfg.strategy}
            composed.update({name: {name: cfg[name]} for name in SECTIONS})
        cfg = compose("nemo_dist_conf", ["hydra/launcher=torchrun"], return_hydra_config=True)
        composed["hydra/launcher=torchrun"] = {"hydra": {"launcher": cfg.hydra.launcher}}
    for word, tree in composed.items():
        held = leaves({key: OmegaConf.to_container(OmegaConf.create(value)) for key, value in tree.items()})
        lines = [line.strip().split("  ")[0] for line in explain(word).splitlines()[2:]]
        shown = dict(line.split("=", 1) for line in lines if "=" in line)
        for key, value in held.items():
            if not key.endswith(("_target_", "params")):
                assert shown.get(key, typed(value)) == typed(value), (word, key)


def test_help_of_an_app_shows_the_values_that_it_has():
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        words = ["strategy=ddp", "strategy.bucket_cap_mb=4", "train.dtype=bfloat16", "moe.wrap_outer_model=false"]
        cfg = compose("train", words, return_hydra_config=True)
    footer = cfg.hydra.help.footer
    assert "strategy.bucket_cap_mb=4.0 " in footer and "moe.wrap_outer_model=false " in footer
    assert "strategy.autocast_dtype=bfloat16 " in footer  # the recipe's, where explain alone says null


def test_a_shortened_name_means_what_it_begins():
    with pytest.raises(ConfigError) as caught:
        explain("strategy=fsdp")
    assert caught.value.type == "strategy=fsdp2"
    with pytest.raises(ConfigError) as caught:
        explain("strategy=megatron")
    assert caught.value.type == "strategy=megatron_fsdp"
