"""The group ``adapter``: what cannot work is refused from the config alone, and what is offered goes through."""

from __future__ import annotations

import importlib.util
from typing import Any
from unittest import mock

import pytest
from hydra import compose, initialize
from omegaconf import OmegaConf

from nemo_dist_conf.composition.check import check
from nemo_dist_conf.composition.explain import explain
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.plan import job_of, search

pytestmark = pytest.mark.usefixtures("store")
LLAMA = {"config": {"model_type": "llama", "num_hidden_layers": 2}}


def checked(*words: str, model: Any = None, ranks: int = 1) -> Any:
    with initialize(None, version_base="1.3"):
        cfg = compose("nemo_dist_conf", overrides=list(words))
    return check(OmegaConf.create({**{str(key): cfg[key] for key in cfg}, "model": model}), ranks)


def refused(*words: str, **more: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        checked(*words, **more)
    return caught.value


def test_it_is_off_by_default_and_on_by_its_name() -> None:
    assert checked().groups["adapter"]["kind"] == "none"
    for kind in ("lora", "dora"):
        values = checked(f"adapter={kind}", "adapter.rank=4", "adapter.targets=[q_proj,up_proj]").groups["adapter"]
        assert (values["kind"], values["rank"], values["targets"]) == (kind, 4, ["q_proj", "up_proj"])


def test_settings_without_an_adapter_are_refused() -> None:
    found = refused("adapter.rank=4")
    assert found.what == "adapter settings were changed, but adapter is none, so they would do nothing"
    assert found.type == "adapter.rank=8"


@pytest.mark.parametrize(
    ("word", "what", "instead"),
    [
        ("adapter.rank=0", "adapter.rank cannot be 0", "adapter.rank=8"),
        ("adapter.alpha=-1", "adapter.alpha cannot be -1.0", "adapter.alpha=16.0"),
        ("adapter.dropout=1", "adapter.dropout cannot be 1.0", "adapter.dropout=0.0"),
        ("adapter.dtype=float16", "adapter.dtype cannot be float16", "adapter.dtype=float32"),
        ("adapter.targets=[]", "adapter.targets cannot be []", "adapter.targets=all-linear"),
        ("adapter.targets=3", "adapter.targets cannot be 3", "adapter.targets=all-linear"),
        ("adapter.kind=lara", "adapter.kind=lara is no adapter", "adapter=lora"),
    ],
)
def test_values_that_cannot_be_are_refused(word: str, what: str, instead: str) -> None:
    found = refused("adapter=lora", word)
    assert (found.what, found.type) == (what, instead)


def test_a_pattern_that_means_nothing_in_a_known_model_is_refused() -> None:
    found = refused("adapter=lora", "adapter.targets=[q_prj,mlp.*_proj]", model=LLAMA)
    assert found.what == "adapter.targets: no module of llama has a name that ends in q_prj"
    assert found.type == "'adapter.targets=[q_proj,mlp.*_proj]'"
    checked("adapter=lora", "adapter.targets=[q_proj,mlp.*_proj,layers.1.self_attn.k_proj]", model=LLAMA)
    found = refused("adapter=lora", "adapter.modules_to_save=[lm_haed]", model=LLAMA)
    assert found.type == "'adapter.modules_to_save=[lm_head]'"
    checked("adapter=lora", "adapter.targets=[mine]", model={"config": {"model_type": "gpt2"}})


def test_peft_has_to_be_installed() -> None:
    find = importlib.util.find_spec

    def without(name: str, *more: Any) -> Any:
        return None if name == "peft" else find(name, *more)

    with mock.patch.object(importlib.util, "find_spec", without):
        checked()
        found = refused("adapter=lora")
    assert found.what == "an adapter was asked for, and peft is not installed"
    assert found.type == "pip install 'nemo_dist_conf[peft]'"


def test_what_drops_out_is_told_and_refused_where_a_split_layer_would_not() -> None:
    assert checked("adapter=lora", "adapter.dropout=0.1").notes == ()
    (note,) = checked("adapter=lora", "adapter.dropout=0.1", ranks=2).notes
    assert note.startswith("adapter.dropout=0.1 is drawn by each rank")
    words = ("strategy=fsdp2", "parallelism.tp_size=2", "adapter.dropout=0.1")
    assert refused("adapter=dora", *words, ranks=2).type == "adapter.dropout=0.0"
    checked("adapter=lora", *words, ranks=2)


def test_it_is_explained() -> None:
    assert "adapter.targets=all-linear" in explain("adapter")


def test_a_plan_refuses_it_by_name() -> None:
    with initialize("../../conf", version_base="1.3"):
        cfg = compose("train", overrides=["adapter=lora"])
        with pytest.raises(ConfigError, match="a plan does not count adapters") as caught:
            job_of(cfg, 2, "h100")
        assert caught.value.type == "adapter=none"
        with pytest.raises(ConfigError, match="a plan does not count adapters"):
            search(cfg, 2, "h100")
        job_of(compose("train"), 2, "h100")
