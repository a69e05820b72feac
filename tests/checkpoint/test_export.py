"""A checkpoint of any layout as a folder that transformers loads, with the logits of the model that was saved."""

from __future__ import annotations

import contextlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_dist_conf.checkpoint import export_hf, save
from nemo_dist_conf.errors import DataError, TrainingError
from nemo_dist_conf.instantiate import instantiate
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
