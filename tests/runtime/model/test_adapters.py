"""Where an adapter goes, how it starts, and what is refused of a model that no config describes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.runtime.model.adapters import Adapter, adapted, base_name
from nemo_dist_conf.runtime.model.build import build_model
from nemo_dist_conf.runtime.model.construct import record
from nemo_dist_conf.runtime.model.materialise import materialise
from tests.dist.adapted import FAMILIES
from tests.dist.layouts import Net, plain_model

pytestmark = pytest.mark.filterwarnings("ignore")
pytest.importorskip("peft")
CPU = torch.device("cpu")


def adapter(*targets: str, kind: str = "lora", **more: Any) -> Adapter:
    return Adapter(kind, 4, 8.0, targets or ("all-linear",), **more)


def layers(model: nn.Module) -> set[str]:
    return {name.partition(".lora_A.")[0] for name, _ in model.named_parameters() if ".lora_A." in name}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_begins_the_same_recorded_and_given_and_computes_what_its_base_does(
    kind: str, family: str, dtype: torch.dtype
) -> None:
    def base() -> nn.Module:
        return plain_model(FAMILIES[family]).to(dtype)

    plain, made = record(base, 3, CPU)
    assert made is not None
    materialise(plain, made)
    asked = adapter(kind=kind)
    model, made = record(lambda: adapted(base(), asked), 3, CPU, lambda name: base_name(name) or name)
    assert made is not None
    materialise(model, made)
    given, of_base = adapted(copy.deepcopy(plain), asked, 3).state_dict(), plain.state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, given[name]), name
        own = base_name(name)
        assert own is None or torch.equal(value, of_base[own]), name
        assert value.dtype == (torch.float32 if own is None else dtype) or "weight" not in name
    others = adapted(copy.deepcopy(plain), asked, 4).state_dict()
    drawn = [name for name in given if ".lora_A." in name]
    assert drawn and not any(torch.equal(others[name], given[name]) for name in drawn)
    ids = torch.randint(90, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, plain.eval()(ids).logits)


def test_only_what_is_asked_for_is_trained() -> None:
    model = adapted(
        plain_model(FAMILIES["llama"]), adapter("mlp.*_proj", "layers.1.self_attn.q_proj", full=("lm_head",)), 0
    )
    mlp = {f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("up", "gate", "down")}
    assert layers(model) == mlp | {"model.layers.1.self_attn.q_proj"}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name for name in trained if ".lora_" not in name} == {"lm_head.modules_to_save.default.weight"}


def test_all_linear_leaves_out_the_head_and_experts() -> None:
    names = {name.rpartition(".")[2] for name in layers(adapted(plain_model(FAMILIES["mixtral"]), adapter(), 0))}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert layers(adapted(Net(depth=1), adapter(), 0)) == {"blocks.0.up", "blocks.0.down", "head"}


def test_one_layer_of_a_model_with_experts_is_one_layer() -> None:
    """Of such a model peft reads the last part of a name only, in an expression."""
    model = adapted(plain_model(FAMILIES["mixtral"]), adapter("layers.1.self_attn.q_proj"), 0)
    assert layers(model) == {"model.layers.1.self_attn.q_proj"}


def refused(model: nn.Module, asked: Adapter) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        build_model(None, model, 0, CPU, adapter=asked)
    return caught.value


def test_what_cannot_be_is_refused() -> None:
    found = refused(Net(), adapter("upp"))
    assert found.what == "adapter.targets: no module of Net has a name that ends in upp"
    assert found.type == "'adapter.targets=[up]'"
    found = refused(Net(), adapter("up", full=("haed",)))
    assert found.what == "adapter.modules_to_save: no module of Net has a name that ends in haed"
    assert found.type == "'adapter.modules_to_save=[head]'"
    assert refused(Net(), adapter("norm")).what.startswith("peft does not adapt these layers: Target module LayerNorm")
    with torch.device("meta"):
        meta = Net()
    assert refused(meta, adapter()).type == "instantiate(cfg, model=Net)"
    found = refused(adapted(Net(), adapter("up"), 0), adapter("down"))
    assert found.what == "the given Net has adapters of peft in its layers already"
    assert found.type == "adapter=none"


def test_names_of_the_base() -> None:
    assert base_name("a.q_proj.base_layer.weight") == "a.q_proj.weight"
    assert base_name("head.modules_to_save.default.weight") == base_name("head.original_module.weight") == "head.weight"
    assert base_name("a.q_proj.lora_A.default.weight") is None
