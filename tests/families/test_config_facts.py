"""What a config says of a model's experts, and what it leaves to its family."""

import warnings
from pathlib import Path

import pytest
import transformers

from nemo_dist_conf.composition.check import check
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.families.config_facts import (
    EXPERT_COUNTS,
    ModelFacts,
    facts_from_config,
    fields_of,
    is_dense_family,
)
from nemo_dist_conf.families.model_rules import model_problems


def refusals(config: dict, **sizes: int) -> list[str]:
    facts = facts_from_config(config)
    return [problem.what for problem in model_problems(facts, {"ep_size": 1, "tp_size": 1, **sizes}, 4)]


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "ernie4_5_moe", "moe_num_experts": 8},
        {"model_type": "ernie4_5_moe"},  # leaves it to the family
        {"model_type": "qwen3_moe"},
        {"model_type": "mixtral"},
        {"model_type": "deepseek_v3", "n_routed_experts": 8},
        {"model_type": "qwen3_vl_moe", "text_config": {"model_type": "qwen3_vl_moe_text", "num_experts": 8}},
        {"model_type": "dbrx", "ffn_config": {"moe_num_experts": 8}},
        {"model_type": "llava", "text_config": {"model_type": "mixtral"}},
        {"model_type": "llava"},  # takes in another family's config
        {"model_type": "of_tomorrow"},
        {},
    ],
    ids=str,
)
def test_experts_are_not_denied_where_a_config_leaves_their_number_out_or_calls_it_otherwise(config):
    assert refusals(config, ep_size=2) == []


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gpt2", "opt", "gemma2", "bert", "xlm-roberta"])
def test_a_family_without_experts_is_told_so_before_a_start(family):
    assert refusals({"model_type": family}, ep_size=2) == [f"ep_size=2, but the model ({family}) has no experts"]
    assert refusals({"model_type": family, "num_experts": 0}, ep_size=2)


def test_the_number_is_the_familys_where_the_config_does_not_say_it():
    assert refusals({"model_type": "mixtral"}, ep_size=3) == ["ep_size=3 does not divide the model's 8 experts"]
    assert refusals({"model_type": "qwen3_moe", "num_local_experts": 6}, ep_size=4)
    uneven = refusals({"model_type": "qwen3_moe", "num_attention_heads": 8, "moe_intermediate_size": 10}, tp_size=4)
    assert uneven == ["tp_size=4 does not divide the model's 10 columns of an expert"]
    assert refusals({"model_type": "qwen3_moe", "moe_intermediate_size": 10}, tp_size=4, ep_size=4) == []
    assert refusals({"model_type": "qwen3_moe"}, tp_size=2) == []
    assert refusals({"model_type": "llama", "num_attention_heads": 8}, tp_size=2) == []


def test_key_value_heads_are_the_familys_where_the_config_does_not_say_them():
    assert facts_from_config({"model_type": "mistral", "num_attention_heads": 32}).num_kv_heads == 8
    assert facts_from_config({"model_type": "llama", "num_attention_heads": 6}).num_kv_heads == 6
    explicit = {"model_type": "mistral", "num_attention_heads": 32, "num_key_value_heads": None}
    assert facts_from_config(explicit).num_kv_heads == 32


def test_an_unknown_number_of_experts_is_no_refusal_and_a_known_zero_is():
    assert model_problems(ModelFacts(model_type="ernie4_5_moe"), {"ep_size": 2}, 2) == []
    tree = {"strategy": {"_target_": "nemo_dist_conf.FSDP2Config"}, "parallelism": {"ep_size": 2}}
    assert check({**tree, "model": {"config": {"model_type": "ernie4_5_moe"}}}, 2).facts.num_experts is None
    with pytest.raises(ConfigError, match="has no experts"):
        check({**tree, "model": {"config": {"model_type": "gpt2"}}}, 2)


def test_all_families_of_transformers():
    """No family is called dense whose config knows experts, and every number of experts is found by its name."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    folder = Path(transformers.__file__).parent / "models"
    texts = {path.parent.name: path.read_text() for path in folder.glob("*/configuration_*.py")}
    dense = {family for family in CONFIG_MAPPING if is_dense_family(family)}
    sparse = [family for family in CONFIG_MAPPING if "experts" in texts.get(_folder(family), "")]
    assert len(dense) > 200 and len(sparse) > 50 and not dense & set(sparse)
    for family in sparse:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = CONFIG_MAPPING[family]()
        counts = {value for name, value in _items(config.to_dict()) if name in EXPERT_COUNTS and isinstance(value, int)}
        found = facts_from_config(fields_of(config)).num_experts
        assert found == (counts.pop() if len(counts) == 1 else None), family
        assert facts_from_config({"model_type": family}).num_experts in (None, found)
        named = {name for name, _ in _items(config.to_dict()) if name.endswith("experts") and "shared" not in name}
        assert named <= {*EXPERT_COUNTS, "top_k_experts"}, family


def _folder(family):
    return family.replace("-", "_")


def _items(tree):
    for name, value in tree.items():
        yield str(name), value
        if isinstance(value, dict):
            yield from _items(value)
