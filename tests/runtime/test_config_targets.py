"""What a caller or a config brings instead of a model, an optimizer or data: refused in words, before a start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.runtime.model.build import build_model
from nemo_dist_conf.runtime.optimizer import build_optimizer
from nemo_dist_conf.train.data import build_data
from nemo_dist_conf.train.loop import _refuse_both_directions
from tests.dist.layouts import composed

HERE = "tests.runtime.test_config_targets"


class Net(nn.Module):
    def __init__(self, width: int, fails: bool = False) -> None:
        super().__init__()
        if fails:
            raise KeyError("the user's own")
        self.head = nn.Linear(width, width)


def linear() -> list[tuple[str, nn.Parameter]]:
    return list(nn.Linear(2, 2).named_parameters())


NOT_MODELS: dict[str, Any] = {"dict": {"hidden": 3}, "str": "llama_tiny", "list": [Net], "int": 3}


@pytest.mark.parametrize("kind", NOT_MODELS)
def test_a_model_that_is_none_is_refused_before_a_start(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"model: {kind} is neither a module nor a function") as refused:
        instantiate(composed("strategy=ddp"), model=NOT_MODELS[kind])
    assert refused.value.type.startswith("instantiate(cfg)") and not dist.is_initialized()


def test_a_config_of_transformers_is_told_what_builds_it() -> None:
    from transformers import LlamaConfig

    with pytest.raises(ConfigError) as refused:
        instantiate(composed("strategy=ddp"), model=LlamaConfig())
    assert "AutoModelForCausalLM.from_config(config)" in refused.value.type


def test_an_optimizer_that_is_none_is_refused_before_a_start() -> None:
    net = Net(2)
    made = torch.optim.AdamW(net.parameters())
    with pytest.raises(ConfigError, match="AdamW was made before the model was wrapped") as refused:
        instantiate(composed("strategy=ddp"), model=net, optimizer=made)  # type: ignore[arg-type]
    assert "lambda parameters: torch.optim.AdamW(parameters" in refused.value.type
    for wrong in ({"lr": 0.1}, "adamw", [torch.optim.AdamW]):
        with pytest.raises(ConfigError, match="is not a function of the parameters"):
            instantiate(composed("strategy=ddp"), model=net, optimizer=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="AdamW was made before the model was wrapped"):
        build_optimizer(made, linear())
    assert not dist.is_initialized()


@pytest.mark.dist
def test_what_a_factory_returns_is_looked_at() -> None:
    from tests.dist.pool import run_ranks

    with pytest.raises(ConfigError, match="int is not a torch.optim.Optimizer"):
        run_ranks(1, _no_optimizer)
    with pytest.raises(ConfigError, match="factory returned str, not a torch.nn.Module"):
        build_model(None, _built_on_the_cpu, 0, torch.device("cpu"))


def _no_optimizer() -> None:
    optimizer: Any = lambda parameters: 3  # noqa: E731
    instantiate(composed("strategy=ddp"), model=Net(2), optimizer=optimizer)


def _built_on_the_cpu() -> Any:
    return "a model" if float(torch.ones(1)) else None


TARGETS: dict[str, tuple[dict[str, Any], str]] = {
    "not there": ({"_target_": "nope.Nope"}, "'nope.Nope' cannot be imported"),
    "no class of the module": ({"_target_": f"{HERE}.Nope"}, f"'{HERE}.Nope' cannot be imported"),
    "no function": ({"_target_": f"{HERE}.HERE"}, "is a str, which cannot be called"),
    "another argument": ({"_target_": f"{HERE}.Net", "depth": 3}, "cannot be called with these arguments"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_that_cannot_be_called_is_refused_with_the_reason(name: str) -> None:
    node, reason = TARGETS[name]
    with pytest.raises(ConfigError, match=reason) as refused:
        build_model(node, None, 0, torch.device("cpu"))
    assert refused.value.type == "model=llama_tiny"
    with pytest.raises(ConfigError, match=reason) as refused:
        build_optimizer({"_target_": node["_target_"], "depth": 3, "fails": 1}, linear())
    assert refused.value.type == "optimizer=adamw"
    with pytest.raises(ConfigError, match=reason) as refused:
        build_data({"_target_": node["_target_"], "depth": 3}, global_batch_size=1, seed=0)
    assert refused.value.type == "data=text"


def test_an_error_of_the_users_own_constructor_stays_theirs() -> None:
    from hydra.errors import InstantiationException

    with pytest.raises(InstantiationException, match="the user's own"):
        build_model({"_target_": f"{HERE}.Net", "width": 2, "fails": True}, None, 0, torch.device("cpu"))


#: Fields of a model -> what the refusal says. Small ones, because some are built with values.
CONFIGS: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "vit"}, "vit is no causal language model of transformers"),
    ({"model_type": "clip"}, "clip is no causal language model of transformers"),
    ({"model_type": "t5"}, "t5 is no causal language model of transformers"),
    ({"model_type": "llamma"}, "transformers has no model family"),
    ({"model_type": "gemma3n_text", "num_hidden_layers": 2, "hidden_size": 32}, "transformers"),
    ({"model_type": "dbrx", "n_layers": 2, "d_model": 32, "n_heads": 4}, "transformers cannot build dbrx"),
    ({"model_type": "musicgen"}, "transformers cannot build musicgen from this config: .*dropout"),
    ({"model_type": "smollm3", "vocab_size": 64, "hidden_size": 32}, "Padding_idx must be within num_embeddings"),
    ({"model_type": "llama", "hidden_size": 40, "num_attention_heads": 8}, "validate_rope.: .*even"),
]


@pytest.mark.parametrize(("fields", "reason"), CONFIGS, ids=lambda value: str(value)[:40])
def test_a_family_that_cannot_be_built_is_refused_with_the_reason(fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        build_model({"config": fields}, None, 0, torch.device("cpu"))


def test_values_that_are_no_fields_are_refused() -> None:
    for node, reason in (({"config": 3}, "is int, not a group"), ({"config": [1]}, "is list"), ({}, "which model")):
        with pytest.raises(ConfigError, match=reason):
            build_model(node, None, 0, torch.device("cpu"))


def test_an_encoder_is_no_causal_model_until_it_is_told_to_be_one() -> None:
    """Its loss would fall to nothing, because each token sees the next one."""
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    for family in ("bert", "roberta", "electra"):
        fields = {"model_type": family, "vocab_size": 32, **sizes}
        with pytest.raises(ConfigError, match=f"{family} reads a row in both directions") as refused:
            _refuse_both_directions(build_model({"config": fields}, None, 0, torch.device("cpu"), 1e9).model)
        assert refused.value.type == "+model.config.is_decoder=true"
        _refuse_both_directions(
            build_model({"config": {**fields, "is_decoder": True}}, None, 0, torch.device("cpu"), 1e9).model
        )
    for family in ("gpt_neox", "opt"):
        fields = {"model_type": family, "vocab_size": 32, **sizes, "ffn_dim": 16, "word_embed_proj_dim": 16}
        _refuse_both_directions(build_model({"config": fields}, None, 0, torch.device("cpu"), 1e9).model)
