"""An adapter trains as plain peft does in one process, whatever the strategy, the axis and the family of its base."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from nemo_dist_conf.checkpoint import export_adapter, export_hf, load, save
from nemo_dist_conf.errors import ConfigError, DataError
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.runtime.engines.fsdp2 import FSDP2Engine
from nemo_dist_conf.runtime.engines.pipeline_model import Pipeline
from nemo_dist_conf.runtime.model.adapters import base_name
from tests.dist.adapted import FAMILIES, beside_plain_peft, trained
from tests.dist.cuda_shim import cuda_shim
from tests.dist.layouts import SGD, composed, full_state, plain_model, take_steps
from tests.dist.pool import run_ranks

pytestmark = [pytest.mark.dist, pytest.mark.filterwarnings("ignore")]
pytest.importorskip("peft")

TP, EP, CP = ("parallelism.tp_size=2",), ("parallelism.ep_size=2",), ("parallelism.cp_size=2",)
SP = (*TP, "strategy.sequence_parallel=true")
PP = ("parallelism.pp_size=2", "pipeline.pp_batch_size=16", "pipeline.pp_microbatch_size=4")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
LLAMA = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
GPT2 = ["c_attn", "c_proj", "c_fc"]
FP32 = ("strategy.mp_policy=null",)
#: A plan of styles that no family here has in its row.
PACKED = (
    "strategy.tp_plan={transformer.h.*.attn.c_attn:packed_qkv_colwise,transformer.h.*.attn.c_proj:rowwise,"
    "transformer.h.*.attn:split_heads,transformer.h.*.mlp.c_fc:colwise,transformer.h.*.mlp.c_proj:rowwise,"
    "lm_head:colwise_gather_output,transformer.wte:embedding_rowwise}"
)

#: name -> (family, kind, ranks, words, fields)
CASES: dict[str, tuple[str, str, int, tuple[str, ...], dict[str, Any]]] = {
    "ddp": ("llama", "lora", 2, ("strategy=ddp",), {"targets": LLAMA}),
    "fsdp2, checkpointing, dora": ("llama", "dora", 2, (*FP32, "activation_checkpointing=true"), {"targets": LLAMA}),
    "tp x dp": ("qwen3", "lora", 4, (*FP32, *TP), {"targets": LLAMA, "rank": 3, "alpha": 5.0}),
    "tp, head trained in full, dora": (
        "llama",
        "dora",
        2,
        (*FP32, *TP),
        {"targets": LLAMA, "modules_to_save": ["lm_head"]},
    ),
    "sp, dora": ("llama", "dora", 2, (*FP32, *SP), {"targets": LLAMA}),
    "tp of one weight for three, turned, dora": ("gpt2", "dora", 2, (*FP32, *TP, PACKED), {"targets": GPT2}),
    "tp of rows that are found": ("gpt2", "lora", 2, (*FP32, *TP), {"targets": GPT2}),
    "tp of a mixer": ("mamba", "lora", 2, (*FP32, *TP), {"targets": ["in_proj", "x_proj"]}),
    "cp": ("qwen3", "dora", 2, (*FP32, *CP), {"targets": LLAMA}),
    "pp, embedding": ("llama", "lora", 2, (*FP32, *PP), {"targets": [*ATTENTION, "embed_tokens"]}),
    "ep": ("mixtral", "lora", 2, (*FP32, *EP), {"targets": ATTENTION}),
    "hsdp": ("qwen3_moe", "dora", 4, (*FP32, "parallelism.dp_replicate_size=2"), {"targets": ATTENTION}),
}


@pytest.mark.parametrize("name", CASES)
def test_training_equals_plain_peft_in_one_process(name: str) -> None:
    family, kind, ranks, words, fields = CASES[name]
    seen = run_ranks(ranks, trained, family, kind, words, steps=2, **fields)[0]
    apart = beside_plain_peft(seen, family, kind, steps=2, **fields)
    assert max(apart.values()) < 1e-5, apart
    start = _start(family, kind, tuple(sorted((key, _frozen(value)) for key, value in fields.items())))
    differing = [name for name, value in seen.before.items() if not torch.equal(value, start[name])]
    assert differing == [], "it does not begin as on one rank"


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


@functools.cache
def _start(family: str, kind: str, fields: tuple[tuple[str, Any], ...]) -> dict[str, Tensor]:
    """Of one rank, whose model has its values when the adapter is put into it."""
    return run_ranks(1, _given, family, kind, dict(fields))[0]


def _given(family: str, kind: str, fields: dict[str, Any]) -> dict[str, Tensor]:
    plain, base, _ = instantiate(composed("strategy=ddp", model={"config": dict(FAMILIES[family])}, seed=3))
    cfg = composed(f"adapter={kind}", "strategy=ddp", seed=3)
    for name, value in fields.items():
        cfg.adapter[name] = list(value) if isinstance(value, tuple) else value
    return full_state(instantiate(cfg, model=base.module)[1])


def test_megatron_fsdp_does_so_too() -> None:
    seen = run_ranks(2, _on_the_shim, ("strategy=ddp",)), run_ranks(2, _on_the_shim, ("strategy=megatron_fsdp", *TP))
    for (losses, norms), (others, other_norms) in zip(*seen):
        assert losses == pytest.approx(others, rel=1e-5) and norms == pytest.approx(other_norms, rel=1e-5)


def _on_the_shim(words: tuple[str, ...]) -> tuple[list[float], list[float]]:
    with cuda_shim():
        model = {"config": {**FAMILIES["llama"], "vocab_size": 98}}
        cfg = composed("adapter=dora", *words, model=model, optimizer=SGD, seed=3)
        cfg.adapter.targets = LLAMA
        seen = take_steps(*instantiate(cfg), 1, 2, False, 16)
        return seen.losses, seen.norms


# From a folder, and to one.

FOLDER_CASES = {
    "shard by shard": (2, FP32),
    "tp x dp, shard by shard": (4, (*FP32, *TP)),
    "stages, shard by shard": (2, (*FP32, *PP)),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    found = {}
    for name, family, dtype in (
        ("llama", "llama", torch.bfloat16),
        ("gpt2", "gpt2", torch.float32),
        ("tied", "tied", torch.float32),
    ):
        torch.manual_seed(1)
        model: Any = plain_model(FAMILIES[family]).to(dtype)
        model.config.dtype = dtype
        found[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(found[name])
    return found


@pytest.mark.parametrize("name", FOLDER_CASES)
def test_the_base_keeps_the_values_and_the_dtype_of_its_folder(folders: dict[str, Path], name: str) -> None:
    from transformers import AutoModelForCausalLM

    ranks, words = FOLDER_CASES[name]
    before, logits = run_ranks(ranks, _from_folder, str(folders["llama"]), words)[0]
    plain = AutoModelForCausalLM.from_pretrained(folders["llama"], dtype="auto").eval()
    base = plain.state_dict()
    for name, value in before.items():
        own = base_name(name)
        assert value.dtype == (torch.float32 if own is None else torch.bfloat16)
        assert own is None or torch.equal(value, base[own])
        if name.endswith("lora_magnitude_vector.default.weight"):
            weight = base[f"{name.partition('.lora_')[0]}.weight"].float()
            assert torch.equal(value, torch.linalg.norm(weight, dim=1))
    if logits is not None and "parallelism.tp_size=2" not in words:
        with torch.no_grad():
            assert torch.equal(logits, plain(_ids()).logits)


def _ids() -> Tensor:
    return torch.randint(90, (2, 16), generator=torch.Generator().manual_seed(0))


def _from_folder(folder: str, words: tuple[str, ...]) -> tuple[dict[str, Tensor], Tensor | None]:
    cfg = composed("adapter=dora", *words, model={"name_or_path": folder}, optimizer=SGD, seed=3)
    cfg.adapter.modules_to_save = ["lm_head"]
    with mock.patch.object(FSDP2Engine, "whole_up_to", classmethod(lambda *_: 0)):
        _, model, _ = instantiate(cfg)
    before = full_state(model)
    if isinstance(model, Pipeline):
        return before, None
    with torch.no_grad():
        return before, model.eval()(_ids()).logits


#: name -> (folder, kind, words, fields)
EXPORTS: dict[str, tuple[str, str, tuple[str, ...], dict[str, Any]]] = {
    "dora, packed and turned, tp": ("gpt2", "dora", TP, {}),
    "head and embedding of a tied base, stages": (
        "tied",
        "lora",
        PP,
        {"targets": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
    ),
}


@pytest.mark.parametrize("name", EXPORTS)
def test_an_exported_adapter_and_a_merged_folder_give_the_logits_of_the_run(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    base, kind, words, fields = EXPORTS[name]
    run_ranks(2, _export, str(folders[base]), tmp_path, kind, words, fields)
    wanted = run_ranks(1, _restored, str(folders[base]), tmp_path, kind, fields)[0]
    plain = AutoModelForCausalLM.from_pretrained(folders[base])
    with torch.no_grad():
        assert float((plain(_ids()).logits - wanted).abs().max()) > 1e-2
        of_folder = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
        assert of_folder.config.tie_word_embeddings == (
            base == "gpt2"
        )  # a head that was trained by itself is no longer
        merged = of_folder(_ids()).logits
        adapted = peft.PeftModel.from_pretrained(plain, str(tmp_path / "adapter"))(_ids()).logits
    assert torch.allclose(merged, wanted, atol=1e-5) and torch.equal(adapted, wanted)


def _cfg(folder: str, kind: str, words: tuple[str, ...], fields: dict[str, Any]) -> Any:
    cfg = composed(f"adapter={kind}", *words, model={"name_or_path": folder}, optimizer=SGD, seed=3)
    for name, value in fields.items():
        cfg.adapter[name] = value
    return cfg


def _export(folder: str, to: Path, kind: str, words: tuple[str, ...], fields: dict[str, Any]) -> None:
    setup, model, optimizer = instantiate(_cfg(folder, kind, (*FP32, *words), fields))
    take_steps(setup, model, optimizer, 1, 2, False, 16)
    save(to / "checkpoint", model, optimizer)
    export_adapter(to / "checkpoint", to / "adapter")
    export_hf(to / "checkpoint", to / "hf")


def _restored(folder: str, to: Path, kind: str, fields: dict[str, Any]) -> Tensor:
    """Under another layout than that which saved."""
    _, model, optimizer = instantiate(_cfg(folder, kind, ("strategy=ddp",), fields))
    load(to / "checkpoint", model, optimizer)
    with torch.no_grad():
        return model.eval()(_ids()).logits


def test_a_checkpoint_without_an_adapter_has_none_to_export(tmp_path: Path) -> None:
    save(tmp_path / "checkpoint", plain_model("llama"))
    with pytest.raises(DataError, match="holds no adapter") as caught:
        export_adapter(tmp_path / "checkpoint", tmp_path / "adapter")
    assert caught.value.type.startswith("export_hf(")


# What peft has none for.


def test_what_peft_refuses_is_left_out() -> None:
    """Weights that a kernel of a state-space model reads past their layer; typed, they are refused by name."""
    seen = run_ranks(1, trained, "mamba", "lora", ("strategy=ddp",), steps=1)[0]
    layers = {name.partition(".lora_")[0].rpartition(".")[2] for name in seen.before if ".lora_" in name}
    assert layers == {"in_proj", "x_proj", "dt_proj"}
    with pytest.raises(
        ConfigError, match="mixer.out_proj takes no adapter: Module 'out_proj' is incompatible"
    ) as caught:
        run_ranks(1, trained, "mamba", "lora", ("strategy=ddp",), steps=1, targets=["out_proj"])
    assert caught.value.type == "'adapter.targets=[dt_proj]'"


@pytest.mark.parametrize("words", [(*FP32, *SP)])
def test_an_embedding_is_refused_where_it_is_not_split(words: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="embed_tokens is an embedding with an adapter, which is not split"):
        run_ranks(2, trained, "llama", "lora", words, targets=["embed_tokens"])
