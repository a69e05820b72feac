"""A checkpoint of any layout as a folder that transformers loads, with the logits of the model that was saved."""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor

from nemo_dist_conf.checkpoint import export_hf, load, save
from nemo_dist_conf.errors import DataError, TrainingError
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.plan.from_config import model_config
from nemo_dist_conf.runtime.model.build import build_model
from tests.checkpoint.exchange import DENSE, EXPERTS, FSDP2, Layout
from tests.checkpoint.small import make
from tests.dist.cuda_shim import cuda_shim
from tests.dist.layouts import LLAMA, MODELS, composed, plain_model
from tests.dist.pool import run_ranks

CASES: dict[str, Layout] = {
    **{f"dense, {name}": layout for name, layout in DENSE.items()},
    **{f"experts, {name}": layout for name, layout in EXPERTS.items()},
    "tied": Layout(2, FSDP2, MODELS["tied"]),
    "1 rank": Layout(1, FSDP2, {"config": LLAMA}),
}
IDS = torch.randint(90, (2, 9), generator=torch.Generator().manual_seed(1))


def exported(layout: Layout, folder: Path, shard_bytes: int) -> None:
    with cuda_shim() if layout.is_megatron else contextlib.nullcontext():
        cfg = composed(*layout.words, model=layout.model, seed=1)
        _, model, _ = instantiate(cfg)
        save(folder / "checkpoint", model)
        export_hf(folder / "checkpoint", folder / "hf", shard_bytes=shard_bytes)


def expected(layout: Layout) -> Tensor:
    """Of the same seed on one rank, without a checkpoint."""
    _, model, _ = instantiate(composed("strategy=ddp", model=layout.model, seed=1))
    with torch.no_grad():
        return model.eval()(IDS).logits


def loaded(folder: Path) -> Tensor:
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", UserWarning)
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert model.config.use_cache
        return model(IDS).logits


@pytest.mark.dist
@pytest.mark.parametrize("name", CASES)
def test_from_pretrained_gives_the_same_logits(tmp_path: Path, name: str) -> None:
    layout = CASES[name]
    run_ranks(layout.ranks, exported, layout, tmp_path, 60_000)
    (logits,) = run_ranks(1, expected, layout)
    # On a rank too: with another number of threads a product adds up in another order.
    (again,) = run_ranks(1, loaded, tmp_path / "hf")
    assert torch.equal(again, logits)
    files = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert len(files) > 2 and set(index["weight_map"].values()) == set(files)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".partial")] == []


@pytest.mark.dist
def test_experts_are_stored_one_by_one(tmp_path: Path) -> None:
    """As folders of transformers have them, which other programs read too."""
    layout = EXPERTS["ep 2 x dp 4"]
    run_ranks(layout.ranks, exported, layout, tmp_path, 5_000_000_000)
    from safetensors import safe_open

    with safe_open(tmp_path / "hf" / "model.safetensors", "pt") as file:
        assert "model.layers.0.block_sparse_moe.experts.3.w1.weight" in file.keys()


@pytest.mark.dist
def test_an_existing_folder_is_replaced_only_when_the_new_one_is_there(tmp_path: Path) -> None:
    layout = CASES["1 rank"]
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "old").write_text("")
    run_ranks(1, exported, layout, tmp_path, 5_000_000_000)
    assert not (tmp_path / "hf" / "old").exists() and (tmp_path / "hf" / "model.safetensors").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="could not be written"):
        export_hf(tmp_path / "checkpoint", tmp_path / "file" / "hf")


@pytest.mark.dist
def test_the_tokenizer_goes_with_it(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.save(str(tmp_path / "tokenizer.json"))
    run_ranks(1, exported, CASES["1 rank"], tmp_path, 5_000_000_000)
    for kind, source in (("file", tmp_path / "tokenizer.json"), ("folder", tmp_path / "from file")):
        export_hf(tmp_path / "checkpoint", tmp_path / f"from {kind}", tokenizer=source)
        assert AutoTokenizer.from_pretrained(tmp_path / f"from {kind}")("b a").input_ids == [1, 0]


def test_another_kind_of_model_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "one", make()[0])
    with pytest.raises(DataError, match="holds no model of transformers"):
        export_hf(tmp_path / "one", tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_damaged_checkpoint_is_not_exported(tmp_path: Path) -> None:
    folder = save(tmp_path / "one", plain_model("llama"))
    data: Any = bytearray((folder / "rank_00000.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "rank_00000.safetensors").write_bytes(data)
    with pytest.raises(DataError, match="is damaged"):
        export_hf(folder, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


# ------------------------------------------------------------------------------------------ what else people bring

_MAMBA = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
INFINITE: dict[str, dict[str, Any]] = {
    "mamba2": {**_MAMBA, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1},
    "granitemoehybrid": {
        **{**_MAMBA, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "mamba_n_heads": 4},
        **{"mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "num_local_experts": 0},
        **{"shared_intermediate_size": 32, "layer_types": ["mamba", "attention"]},
    },
}


@pytest.mark.parametrize("family", INFINITE)
def test_an_infinity_in_a_config_goes_there_and_back(tmp_path: Path, family: str) -> None:
    """transformers writes it in a form of its own, which is no number."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **INFINITE[family]))
    model.save_pretrained(tmp_path / "theirs")
    assert "__float__" in (tmp_path / "theirs" / "config.json").read_text()
    folder = {"name_or_path": str(tmp_path / "theirs")}
    built: Any = build_model(folder, None, 0, torch.device("cpu"), 1e9)
    assert tuple(built.model.config.time_step_limit) == (0.0, math.inf)
    fields = {"config": json.loads((tmp_path / "theirs" / "config.json").read_text())}
    built = build_model(fields, None, 0, torch.device("cpu"))
    assert tuple(built.model.config.time_step_limit) == (0.0, math.inf)
    assert model_config(OmegaConf.create({"model": folder}))["time_step_limit"] == [0.0, math.inf]

    save(tmp_path / "one", model)
    export_hf(tmp_path / "one", tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    assert ours == theirs


def test_an_adapter_is_refused_and_what_is_offered_works(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(plain_model("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    save(tmp_path / "one", model)
    with pytest.raises(DataError, match="with an adapter of peft around it, which this version does not") as refused:
        export_hf(tmp_path / "one", tmp_path / "hf")
    from transformers import AutoModelForCausalLM

    assert "merge_and_unload().save_pretrained" in refused.value.type and not (tmp_path / "hf").exists()
    again = peft.get_peft_model(plain_model("llama"), peft.LoraConfig(target_modules=["q_proj"], r=2))
    load(tmp_path / "one", again)
    with torch.no_grad():
        expected_logits = again(IDS).logits
        again.merge_and_unload().save_pretrained(tmp_path / "hf")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        assert torch.allclose(merged(IDS).logits, expected_logits, atol=1e-5)


def test_another_model_than_its_config_tells_is_refused_with_the_reason(tmp_path: Path) -> None:
    """A head of the user's own would be lost; a model of another task is none that is written."""
    from transformers import BertConfig, BertForSequenceClassification, ViTConfig, ViTModel

    model = plain_model("llama")
    model.value = torch.nn.Linear(4, 1)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    others = {
        "does not hold a LlamaForCausalLM as it is: 2 more .value.bias": model,
        "does not hold a BertLMHeadModel as it is: .* missing": BertForSequenceClassification(BertConfig(**sizes)),
        "holds a model .vit. that is no causal language model here": ViTModel(ViTConfig(**sizes)),
        "holds no model of transformers": make()[0],
    }
    for number, (reason, other) in enumerate(others.items()):
        save(tmp_path / str(number), other)
        with pytest.raises(DataError, match=reason) as refused:
            export_hf(tmp_path / str(number), tmp_path / "hf")
        path = refused.value.type.partition("load_file(")[2].strip("')")
        assert set(load_file(path)) == {f"model.{name}" for name in other.state_dict()}
