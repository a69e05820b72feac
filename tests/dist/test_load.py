"""model.name_or_path: a saved transformers model on any layout gives its own logits, and what is damaged is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from nemo_dist_conf.errors import ConfigError, DataError
from nemo_dist_conf.instantiate import instantiate
from tests.dist.layouts import batch, composed, full_state, plain_model
from tests.dist.pool import run_ranks
from tests.dist.test_expert_parallel import FAMILIES
from tests.dist.test_instantiate import Live

pytestmark = pytest.mark.dist

FP32 = "strategy.mp_policy=null"
LAYOUTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ddp 1": (1, ("strategy=ddp",)),
    "ddp 2": (2, ("strategy=ddp",)),
    "fsdp2 1": (1, (FP32,)),
    "fsdp2 2": (2, (FP32,)),
    "fsdp2 2, offload": (2, (FP32, "strategy.offload_policy.enabled=true")),
    "fsdp2 4": (4, (FP32,)),
    "tp 2": (2, (FP32, "parallelism.tp_size=2")),
    "tp 2, sequence parallel": (2, (FP32, "parallelism.tp_size=2", "strategy.sequence_parallel=true")),
    "tp 2 x dp 2": (4, (FP32, "parallelism.tp_size=2")),
}


def original(kind: str | dict[str, Any]) -> Any:
    """A model whose weights no initialisation of ours would draw."""
    torch.manual_seed(11)
    model = plain_model(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a model that was saved in several files; made once."""
    root = tmp_path_factory.mktemp("saved")

    def folder(kind: str) -> Path:
        target = root / kind
        if not target.exists():
            original(kind).save_pretrained(target, max_shard_size="60KB")
            assert len(list(target.glob("*.safetensors"))) > 2
        return target

    return folder


@pytest.fixture
def copied(saved: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the untied model's folder, to be damaged."""
    return Path(shutil.copytree(saved("llama"), tmp_path / "model"))


def logits_of(folder: str, *words: str, **node: Any) -> tuple[Tensor, dict[str, Tensor]]:
    model = instantiate(composed(*words, model={"name_or_path": folder, **node}))[1]
    with torch.no_grad():
        output = model(batch()[0]).logits
    assert not isinstance(output, DTensor)
    return output, full_state(model)


def load(folder: Path, *words: str, ranks: int = 1, **node: Any) -> list[tuple[Tensor, dict[str, Tensor]]]:
    return run_ranks(ranks, logits_of, str(folder), *words, **node)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["llama", "tied"])
def test_a_saved_model_gives_its_own_logits(saved: Callable[[str], Path], layout: str, kind: str) -> None:
    model = original(kind)
    with torch.no_grad():
        expected = model(batch()[0]).logits
    weights = model.state_dict()
    ranks, words = LAYOUTS[layout]
    for logits, state in load(saved(kind), *words, ranks=ranks):
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        assert state.keys() == weights.keys()
        assert [name for name in weights if not torch.equal(state[name], weights[name])] == []


EXPERTS: dict[str, tuple[int, tuple[str, ...]]] = {
    "ddp 1": (1, ("strategy=ddp",)),
    "fsdp2 4": (4, (FP32,)),
    "ep 2 x ep_shard 2": (4, (FP32, "parallelism.ep_size=2")),
    "ep 2 x pp 2": (4, (FP32, "parallelism.ep_size=2", "parallelism.pp_size=2", "pipeline.pp_batch_size=4")),
}


def state_of(folder: str, *words: str) -> dict[str, Tensor]:
    return full_state(instantiate(composed(*words, model={"name_or_path": folder}))[1])


@pytest.mark.parametrize("layout", EXPERTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_experts_that_are_stored_one_by_one(tmp_path: Path, family: str, layout: str) -> None:
    """As save_pretrained does; each rank takes the rows of its experts out of their files."""
    model = original({**FAMILIES[family], "num_hidden_layers": 2})
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    names = {name for path in tmp_path.glob("*.safetensors") for name in safe_open(path, "pt").keys()}
    assert any(".experts.3." in name for name in names)
    ranks, words = EXPERTS[layout]
    for state in run_ranks(ranks, state_of, str(tmp_path), *words):
        assert [name for name, value in model.state_dict().items() if not torch.equal(state[name], value)] == []


def test_an_expert_that_is_missing(tmp_path: Path) -> None:
    original(FAMILIES["qwen3_moe"]).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    lost = tensors.pop("model.layers.1.mlp.experts.2.up_proj.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "1 missing in the folder (model.layers.1.mlp.experts.2.up_proj.weight)" in str(refusal(tmp_path))
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"] = lost[1:].contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert "1 of other shape" in str(refusal(tmp_path))


def test_one_file_without_an_index_is_enough(tmp_path: Path) -> None:
    original("llama").save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    _, state = load(tmp_path)[0]
    assert torch.equal(state["lm_head.weight"], original("llama").state_dict()["lm_head.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_saved_in_low_precision_become_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    """What the optimizer updates is float32, whatever the file holds."""
    model = original("llama").to(dtype)
    model.save_pretrained(tmp_path)
    _, state = load(tmp_path)[0]
    assert {value.dtype for value in state.values()} == {torch.float32}
    assert all(torch.equal(state[name], value.float()) for name, value in model.state_dict().items())


def test_a_folder_saved_from_tied_weights_that_also_has_the_head(saved: Callable[[str], Path], tmp_path: Path) -> None:
    """Some checkpoints store a tied parameter under both names."""
    folder = Path(shutil.copytree(saved("tied"), tmp_path / "model"))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "model-extra.safetensors"
    index.write_text(json.dumps(content))
    embedding = original("tied").state_dict()["lm_head.weight"].clone()
    save_file({"lm_head.weight": embedding}, folder / "model-extra.safetensors", metadata={"format": "pt"})
    _, state = load(folder)[0]
    assert torch.equal(state["lm_head.weight"], embedding)
    assert torch.equal(state["model.embed_tokens.weight"], embedding)


def test_fields_of_the_config_can_be_overridden(saved: Callable[[str], Path]) -> None:
    """Those that change no shape; the logits show that they arrived."""
    plain = load(saved("llama"))[0][0]
    changed = load(saved("llama"), config={"rms_norm_eps": 0.1})[0][0]
    assert not torch.allclose(plain, changed, atol=1e-3)


def peak_of_load(folder: str) -> tuple[float, float]:
    with Live() as live:
        model = instantiate(composed(FP32, model={"name_or_path": folder}))[1]
    whole = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    largest = max(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return live.peak / whole, largest / whole


def test_no_rank_reads_the_whole_model(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 12}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_attention_heads=4))
    model.save_pretrained(tmp_path)
    for peak, largest in run_ranks(4, peak_of_load, str(tmp_path)):
        assert peak < 1 / 4 + 4 * largest + 0.1


# --------------------------------------------------------------------------------------------- refusals


def refusal(folder: Path, ranks: int = 2, **node: Any) -> DataError:
    """What every rank says; the words that are always there are checked here."""
    errors = run_ranks(ranks, refused, str(folder), **node)
    assert len({str(error) for error in errors}) == 1
    [error] = errors[:1]
    assert isinstance(error, DataError), error
    assert f"model.name_or_path={folder}" in error.asked and str(folder) in str(error)
    return error


def refused(folder: str, **node: Any) -> ConfigError | str:
    try:
        instantiate(composed(FP32, model={"name_or_path": folder, **node}))
    except ConfigError as error:
        return error
    return "loaded"


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    assert "has no config.json" in refusal(tmp_path / "nowhere").what


def test_a_folder_without_config(copied: Path) -> None:
    (copied / "config.json").unlink()
    assert "has no config.json" in refusal(copied).what


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"model_type": "nothing_like_this"}', '{"model_type": "llama", "hidden_size": "x"}']
)
def test_a_config_that_is_none(copied: Path, text: str) -> None:
    (copied / "config.json").write_text(text)
    assert "config" in refusal(copied).what


def test_weights_of_another_architecture(copied: Path) -> None:
    """The config says one model, the files hold another."""
    from transformers import GPT2Config

    GPT2Config(vocab_size=97, n_embd=64, n_layer=3, n_head=8, n_positions=32).save_pretrained(copied)
    what = refusal(copied).what
    assert "are not those of GPT2LMHeadModel" in what
    assert "missing in the folder (" in what and "unknown to the model (model.embed_tokens.weight, " in what


def test_a_model_that_is_no_language_model(copied: Path) -> None:
    from transformers import ViTConfig

    ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8).save_pretrained(copied)
    assert "vit is no causal language model" in refusal(copied).what


def test_a_file_of_the_index_is_missing(copied: Path) -> None:
    gone = sorted(copied.glob("*.safetensors"))[1]
    gone.unlink()
    assert f"lacks {gone.name}, which its index names" in refusal(copied).what


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"weight_map": 3}', '{"weight_map": {"lm_head.weight": 3}}'])
def test_an_index_that_cannot_be_read(copied: Path, text: str) -> None:
    (copied / "model.safetensors.index.json").write_text(text)
    assert "index" in refusal(copied).what


@pytest.mark.parametrize("keep", [0, 4, 100, -16])
def test_a_file_that_was_cut_off(copied: Path, keep: int) -> None:
    cut = sorted(copied.glob("*.safetensors"))[1]
    cut.write_bytes(cut.read_bytes()[:keep])
    assert f"{cut} cannot be read" in refusal(copied).what


def test_a_file_that_is_something_else(copied: Path) -> None:
    """As where a download gave an error page, or the pointer of Git LFS."""
    other = sorted(copied.glob("*.safetensors"))[0]
    other.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert f"{other} cannot be read" in refusal(copied).what


def test_pickled_weights_are_not_unpickled(copied: Path) -> None:
    for file in [*copied.glob("*.safetensors"), *copied.glob("*.index.json")]:
        file.unlink()
    (copied / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch /tmp/unpickled'\ntR.")
    what = refusal(copied).what
    assert "holds no safetensors weights" in what and "pytorch_model.bin would have to be unpickled" in what


def test_a_folder_without_weights(copied: Path) -> None:
    for file in [*copied.glob("*.safetensors"), *copied.glob("*.index.json")]:
        file.unlink()
    assert "holds no safetensors weights" in refusal(copied).what


@pytest.mark.parametrize("sizes", [{"vocab_size": 98}, {"intermediate_size": 64}, {"num_key_value_heads": 8}], ids=str)
def test_shapes_that_the_overrides_changed(saved: Callable[[str], Path], sizes: dict[str, int]) -> None:
    error = refusal(saved("llama"), config=sizes)
    assert "of other shape (" in error.what and "without overrides of its sizes" in error.allowed


@pytest.mark.parametrize(
    "layers, words", [(2, "unknown to the model (model.layers.2."), (4, "missing in the folder (model.layers.3.")]
)
def test_a_number_of_layers_that_the_overrides_changed(saved: Callable[[str], Path], layers: int, words: str) -> None:
    assert words in refusal(saved("llama"), config={"num_hidden_layers": layers}).what


def edit(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite the file that holds the head's weights."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"]["lm_head.weight"]
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_a_tensor_of_other_shape(copied: Path) -> None:
    edit(copied, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(97, 63)}))
    assert "1 of other shape (lm_head.weight)" in refusal(copied).what


def test_a_tensor_of_other_shape_but_equal_size(copied: Path) -> None:
    edit(copied, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(64, 97)}))
    assert "1 of other shape (lm_head.weight)" in refusal(copied).what


def test_a_tensor_that_is_missing_or_too_many(copied: Path) -> None:
    edit(copied, lambda tensors: tensors.update({"extra": tensors.pop("lm_head.weight")}))
    what = refusal(copied).what
    assert "1 missing in the folder (lm_head.weight)" in what and "1 unknown to the model (extra)" in what


@pytest.mark.parametrize("name", ["a.safetensors", "model-00001-of-00002.safetensors", "zzz.safetensors"])
def test_a_file_that_the_index_does_not_name_changes_no_weight(copied: Path, name: str) -> None:
    """Left by an earlier save with another number of files, or a copy in another format: unread, or refused."""
    save_file({"lm_head.weight": torch.zeros(97, 64)}, copied / name, metadata={"format": "pt"})
    [error] = run_ranks(1, refused, str(copied))
    if error == "loaded":
        _, state = load(copied)[0]
        assert torch.equal(state["lm_head.weight"], original("llama").state_dict()["lm_head.weight"])
    else:
        assert isinstance(error, DataError) and name in error.what


def on_one_rank(folders: list[str]) -> tuple[str, type] | str:
    import torch.distributed as dist

    try:
        instantiate(composed(FP32, model={"name_or_path": "${oc.env:FOLDER}"}))
    except ConfigError as error:
        return str(error), type(error)
    return f"loaded on rank {dist.get_rank()} of {folders}"


def with_folder(folders: list[str]) -> tuple[str, type] | str:
    """Each rank has a folder of its own, as on nodes with local disks."""
    import os

    os.environ["FOLDER"] = folders[int(os.environ["RANK"])]
    return on_one_rank(folders)


def test_damage_on_one_node_stops_every_rank(saved: Callable[[str], Path], copied: Path) -> None:
    (copied / "config.json").unlink()
    for found in run_ranks(2, with_folder, [str(saved("llama")), str(copied)], timeout_s=30):
        assert not isinstance(found, str)
        assert found[1] is DataError and "on rank 1: " in found[0] and "has no config.json" in found[0]
