"""A value from the environment is a text: converted where a group is typed, elsewhere told with what has it read."""

import shlex

import pytest
from hydra import compose, initialize, initialize_config_dir
from omegaconf import OmegaConf

from nemo_dist_conf.composition.check import check
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.recipe.checks import check_recipe
from nemo_dist_conf.recipe.yaml_folder import config_folder
from nemo_dist_conf.runtime.optimizer import build_optimizer

#: Keys of the recipe that are no texts, with one that fits.
READ = {
    "seed": "3",
    "train.steps": "3",
    "train.global_batch_size": "16",
    "train.micro_batch_size": "2",
    "train.max_grad_norm": "0.5",
    "train.warmup_steps": "2",
    "train.log_every": "2",
    "train.tensorboard": "true",
    "checkpoint.every": "2",
    "checkpoint.keep": "3",
    "checkpoint.async": "true",
    "checkpoint.resume": "null",
    "data.seq_len": "32",
    "data.max_mb": "1",
    "optimizer.lr": "0.01",
    "optimizer.betas": "[0.9,0.95]",
    "optimizer.eps": "1e-8",
    "optimizer.weight_decay": "0.1",
    "optimizer.decay_1d": "true",
    "optimizer.foreach": "null",
    "optimizer.fused": "false",
    "model.config.num_hidden_layers": "2",
    "model.config.tie_word_embeddings": "false",
    "+model.config.rms_norm_eps": "1e-5",
    "strategy.tp_plan": "{model.layers.*.mlp.up_proj: colwise}",
    "strategy.reshard_after_forward": "null",
    "pipeline.module_fqns_per_model_part": "null",
}
#: Keys that are texts, or that OmegaConf converts because their group is typed.
FIT = {
    "device": "cpu",
    "train.dtype": "float32",
    "train.schedule": "constant",
    "optimizer.name": "adam",
    "parallelism.tp_size": "1",
    "strategy.enable_compile": "true",
    "strategy.mp_policy.enabled": "false",
    "strategy.mp_policy.param_dtype": "float32",
    "strategy.activation_checkpointing": "true",
    "activation_checkpointing": "full",
    "pipeline.pp_microbatch_size": "1",
}


def composed(*words: str):
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("train", overrides=list(words))


def test_texts_are_told_as_such_and_what_is_offered_works(monkeypatch):
    for key, value in {**READ, **FIT}.items():
        monkeypatch.setenv(key.lstrip("+"), value)
    fit = [f"{key}=${{oc.env:{key}}}" for key in FIT]
    with pytest.raises(ConfigError) as caught:
        check_recipe(composed(*fit, *(f"{key}=${{oc.env:{key.lstrip('+')}}}" for key in READ)), 1)
    found = {shlex.split(problem.asked)[0].partition("=")[0]: problem for problem in caught.value.problems}
    assert set(found) == {key.lstrip("+") for key in READ}
    words = []
    for name, value in READ.items():
        key = name.lstrip("+")
        assert found[key].what == f"{key} is the text {value!r}: an environment variable holds nothing else"
        assert found[key].asked == f"'{key}=${{oc.env:{key}}}'"
        assert found[key].instead == f"'{key}=\"${{oc.decode:${{oc.env:{key}}}}}\"'"
        words += [("+" if name != key else "") + word for word in shlex.split(found[key].instead)]
    check_recipe(composed(*fit, *words), 1)


def test_an_added_key_is_offered_as_it_has_to_be_typed(monkeypatch):
    monkeypatch.setenv("VALUE", "1e-5")
    word = "+model.config.rms_norm_eps=${oc.env:VALUE}"
    cfg = composed(word)
    OmegaConf.set_struct(cfg, False)
    cfg.hydra = {"overrides": {"task": [word.replace("$", "\\$")]}}
    with pytest.raises(ConfigError) as caught:
        check_recipe(cfg, 1)
    assert caught.value.type == "'+model.config.rms_norm_eps=\"${oc.decode:${oc.env:VALUE}}\"'"


def test_what_would_not_fit_when_it_is_read_is_told_as_that(monkeypatch):
    monkeypatch.setenv("VALUE", "-1")
    with pytest.raises(ConfigError) as caught:
        check_recipe(composed("seed=${oc.env:VALUE}"), 1)
    assert (caught.value.what, caught.value.type) == ("seed=-1 does not fit", "seed=0")


def test_several_are_told_beside_what_else_is_wrong(monkeypatch):
    monkeypatch.setenv("VALUE", "3")
    words = ["seed=${oc.env:VALUE}", "train.steps=${oc.env:VALUE}", "train.log_every=0", "data.seq_len='8'"]
    with pytest.raises(ConfigError) as caught:
        check_recipe(composed(*words), 1)
    found = {problem.what.partition(":")[0]: problem.instead for problem in caught.value.problems}
    assert found == {
        "seed is the text '3'": "'seed=\"${oc.decode:${oc.env:VALUE}}\"'",
        "train.steps is the text '3'": "'train.steps=\"${oc.decode:${oc.env:VALUE}}\"'",
        "data.seq_len is the text '8'": "data.seq_len=8",
        "train.log_every=0 does not fit": "train.log_every=1",
    }


def test_texts_in_an_app_of_ones_own(monkeypatch):
    """Where its keys stand below a package; and in the node of its optimizer, which is read when it is built."""
    monkeypatch.setenv("VALUE", "null")
    with initialize(None, version_base="1.3"):
        cfg = compose("nemo_dist_conf", ["strategy.reshard_after_forward=${oc.env:VALUE}"])
    tree = OmegaConf.create({"dist": cfg, "model": {"config": {"model_type": "llama", "num_hidden_layers": 2}}})
    with pytest.raises(ConfigError) as caught:
        check(tree, 1)
    assert caught.value.type == "'dist.strategy.reshard_after_forward=\"${oc.decode:${oc.env:VALUE}}\"'"
    with pytest.raises(ConfigError) as caught:
        check(tree.dist, 1)
    assert caught.value.type == "'dist.strategy.reshard_after_forward=\"${oc.decode:${oc.env:VALUE}}\"'"
    monkeypatch.setenv("VALUE", "2")
    tree.model.config.num_hidden_layers = "${oc.env:VALUE}"
    tree.dist.strategy.reshard_after_forward = None
    with pytest.raises(ConfigError, match="model.config.num_hidden_layers is the text '2'"):
        check(tree, 1)
    app = OmegaConf.create({"optimizer": {"name": "sgd", "lr": "${oc.env:VALUE}"}})
    with pytest.raises(ConfigError) as caught:
        import torch

        build_optimizer(app.optimizer, [("weight", torch.nn.Parameter(torch.ones(1)))])
    assert caught.value.type == "'optimizer.lr=\"${oc.decode:${oc.env:VALUE}}\"'"


def test_a_text_that_does_not_fit_once_it_is_read_is_told_once_for_each_step(monkeypatch):
    """It is a text, which is told first; that eight heads do not share two columns shows when it is read."""
    monkeypatch.setenv("WIDTH", "2")
    words = ["model.config.hidden_size=${oc.env:WIDTH}", "model.config.hidden_size=${oc.decode:${oc.env:WIDTH}}"]
    told = []
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        for word in words:
            cfg = compose("train", [word.replace("=", '="') + '"'], return_hydra_config=True)
            with pytest.raises(ConfigError) as caught:
                check_recipe(cfg)
            told.append([problem.what for problem in caught.value.problems])
    assert [len(whats) for whats in told] == [1, 1]
    assert "is the text '2'" in told[0][0] and "does not split" in told[1][0]
