"""Weights by name and shape, against transformers' own models on the meta device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.families.registry import FAMILY_NAMES, find_family
from nemo_dist_conf.families.shapes import shape_of, weights
from nemo_dist_conf.recipe.yaml_folder import config_folder

SHAPED_FAMILIES = [row.name for row in map(find_family, FAMILY_NAMES) if row is not None and row.shapes is not None]
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 97}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "kv heads": {"num_key_value_heads": 2},
    "some dense": {"decoder_sparse_step": 2, "mlp_only_layers": [1]},
}
#: As the models' own pages count them.
PUBLISHED = {
    "llama3_8b": 8_030_261_248,
    "llama3_70b": 70_553_706_496,
    "llama3_405b": 405_853_388_800,
    "qwen3_8b": 8_190_735_360,
    "qwen3_30b_a3b": 30_532_122_624,
    "mixtral_8x7b": 46_702_792_704,
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("family", SHAPED_FAMILIES)
def test_every_parameter_has_the_name_and_shape_of_transformers(family: str, variant: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {"model_type": family, **SMALL, **VARIANTS[variant]}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert {name: weight.shape for name, weight in weights(shape_of(config))} == expected


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_no_key_value_heads_are_as_many_as_heads(family: str) -> None:
    """Where transformers takes null for them."""
    from transformers import AutoConfig

    config = {"model_type": family, **SMALL, "num_key_value_heads": None}
    assert shape_of(config).kv_heads == AutoConfig.for_model(**config).num_key_value_heads == 4


@pytest.mark.parametrize("family", SHAPED_FAMILIES)
def test_what_is_not_said_is_what_transformers_takes(family: str) -> None:
    from transformers import AutoConfig

    assert shape_of({"model_type": family}) == shape_of(AutoConfig.for_model(family).to_dict())


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(name: str) -> None:
    config = yaml.safe_load((config_folder() / "model" / f"{name}.yaml").read_text())["config"]
    assert shape_of(config).parameters == PUBLISHED[name]


def test_parameters_of_a_token() -> None:
    """Of Mixtral 8x7B a token meets 12.9 B, of Qwen3 30B-A3B 3.3 B (their papers)."""
    folder = config_folder() / "model"
    for name, active in (("mixtral_8x7b", 12.88e9), ("qwen3_30b_a3b", 3.35e9)):
        shape = shape_of(yaml.safe_load((folder / f"{name}.yaml").read_text())["config"])
        assert shape.active_parameters == pytest.approx(active, rel=0.01)


@pytest.mark.parametrize(
    "config, words",
    [
        ({"model_type": "lama"}, "model.config.model_type=llama"),
        ({}, "sizes of a model of type None are not known"),
        ({"model_type": "llama", "hidden_size": 0}, "model.config.hidden_size=0 is not a size"),
        ({"model_type": "llama", "num_hidden_layers": "4"}, "num_hidden_layers"),
    ],
)
def test_what_cannot_be_is_refused(config: dict, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        shape_of(config)
