"""Plans of models without a row of shapes: read off what their config builds on the meta device."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.families.shapes import shape_of, weights
from nemo_dist_conf.plan import search
from nemo_dist_conf.plan.activations import stage_bytes
from nemo_dist_conf.plan.command import _recipe_config, run
from nemo_dist_conf.plan.from_config import job_of
from nemo_dist_conf.plan.memory import resting_bytes
from nemo_dist_conf.plan.rank_shards import Place
from nemo_dist_conf.plan.step_time import step_time
from nemo_dist_conf.plan.traffic import traffic_of
from nemo_dist_conf.runtime.on_paper import read_model
from tests.dist.layouts import ADAMW, LLAMA
from tests.dist.pool import run_ranks
from tests.plan.families import config_of, what_differs
from tests.plan.measure import differences, job_for, seen_of_rank
from tests.plan.test_command import composed
from tests.plan.test_measured import PLAIN, SEQUENCE, TP, tracked

CP = "parallelism.cp_size=2"
OWN = {"_target_": "tests.plan.own_models.Chain"}
GPT2 = {"n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 97, "n_positions": 64, "attn_pdrop": 0.0}


def folder_of(tmp_path: Path, **config: Any) -> str:
    """A checkpoint folder of which nothing but the config is there."""
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 0, **config}))
    return f"model.name_or_path={tmp_path}"


def own(*words: str, **changes: Any) -> Any:
    config = composed("data.seq_len=16", *words)
    config.model = {**OWN, **changes}
    return config


# Its decoder's fields in its own config, a causal model that takes those of a tower too,
# tied, shared by blocks, a block with the head in it, experts, latent attention, mixers that are no attention.
@pytest.mark.parametrize(
    "family", ["musicgen", "dots3_note", "gpt2", "zamba", "bert", "deepseek_v3", "gpt_oss", "falcon_mamba", "llama"]
)
def test_every_parameter_has_the_name_and_shape_of_transformers(family: str) -> None:
    """All families: python -m tests.plan.families."""
    assert what_differs(family) == []


#: As their papers and pages count them, of a family's default config.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gptj": 6_050_882_784,
    "gpt_neox": 20_554_567_680,
    "deepseek_v3": 671_026_404_352,
}


@pytest.mark.parametrize("family", PUBLISHED)
def test_full_sizes_have_the_published_number_of_parameters(family: str) -> None:
    shape = read_model({"config": {"model_type": family}})
    assert shape.parameters == PUBLISHED[family]
    if family == "deepseek_v3":  # of which a token meets 37 B
        assert shape.active_parameters == pytest.approx(37e9, rel=0.02)


WORDS = {
    "fsdp2": [],
    "tp": ["parallelism.tp_size=2"],
    "sp": ["parallelism.tp_size=2", "strategy.sequence_parallel=true"],
    "cp": ["parallelism.cp_size=2"],
    "ulysses": ["parallelism.cp_size=2", "context.method=ulysses"],
}


@pytest.mark.parametrize("mode", ["false", "true", "selective"])
@pytest.mark.parametrize("name", WORDS)
def test_a_family_with_a_row_is_planned_alike_when_it_is_read_off_a_model(name: str, mode: str) -> None:
    """Bytes that rest and traffic to the byte; what is kept within a tenth, FLOPs and time nearly."""
    config = {**LLAMA, "hidden_size": 256, "intermediate_size": 512, "vocab_size": 512}
    shape = read_model({"config": config})
    assert dict(weights(shape)).keys() == dict(weights(shape_of(config))).keys()
    job = job_for([*WORDS[name], f"activation_checkpointing={mode}"], 2, config, ADAMW, 8, 256)
    other = dataclasses.replace(job, model=shape)
    assert resting_bytes(other, 0, Place()) == resting_bytes(job, 0, Place())
    assert sorted(map(str, traffic_of(other, 0))) == sorted(map(str, traffic_of(job, 0)))
    kept, formulas = (stage_bytes(each, each.stages[0]).saved for each in (other, job))
    assert kept == pytest.approx(formulas, rel=0.1)
    assert step_time(other).seconds == pytest.approx(step_time(job).seconds, rel=0.1)


@pytest.mark.dist
@pytest.mark.parametrize(
    "family, words",
    [
        ("gpt2", [PLAIN]),
        ("gpt2", ["strategy=ddp"]),
        ("bert", [PLAIN]),  # whose last block has the embedding's weight in it, and is no unit
        ("qwen2_moe", [PLAIN, "parallelism.ep_size=2"]),
        ("cohere", [PLAIN, TP]),
        ("gpt2", [PLAIN, TP]),  # query, key and value in one Conv1D
        ("falcon", [PLAIN, TP]),  # in one layer, head by head
        ("phi3", [PLAIN, TP]),  # two in one, gathered
        ("phi3", [PLAIN, TP, "activation_checkpointing=true"]),
        ("phi3", [PLAIN, TP, SEQUENCE]),  # whose modules are run on whole rows
        ("phi3", [PLAIN, TP, SEQUENCE, "activation_checkpointing=selective"]),
        ("deepseek_v2", [PLAIN, TP]),  # a rotary key that heads share
        ("mamba2", [PLAIN, TP]),  # a mixer whose parts are gathered
        ("zamba2", [PLAIN, TP]),  # one block used at several places
        ("mamba2", [PLAIN, CP]),
        ("bamba", [PLAIN, CP, "activation_checkpointing=true"]),  # attention in some blocks, in others none
        ("recurrent_gemma", [PLAIN, CP]),  # an attention of its own, which is given positions
        ("gpt_oss", [PLAIN, CP]),  # an attention that is no fused one
        ("bart", [PLAIN]),  # attention to what is not there, which gets no gradient
        ("bart", [PLAIN, TP]),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(word.split(".")[-1] for word in value),
)
def test_what_rests_and_what_is_sent_is_what_ranks_have(family: str, words: list[str]) -> None:
    config = config_of(family)
    job = job_for(words, 2, config, ADAMW, 4, 16)
    for seen in run_ranks(2, seen_of_rank, words, {"config": config}, ADAMW, 16, 4, family != "falcon"):
        assert list(differences(job, seen)) == []


DROPS = {"hidden_size": 256, "num_attention_heads": 8, "vocab_size": 512, "max_position_embeddings": 256}
DROPPING: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 256, "n_head": 8, "vocab_size": 512, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1},
    "bert": {**DROPS, "intermediate_size": 512, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
}


@pytest.mark.dist
@pytest.mark.parametrize("mode", ["false", "selective"])
@pytest.mark.parametrize("family", DROPPING)
def test_what_drops_out_is_kept_as_torch_tracks(family: str, mode: str) -> None:
    """On a CPU, where attention that drops out is no fused kernel; within a hundredth."""
    config = {**config_of(family), **DROPPING[family]}
    words = [PLAIN, f"activation_checkpointing={mode}"]
    found = run_ranks(1, tracked, words, config, 1, 2, 64)[0]
    job = job_for(words, 1, config, ADAMW, 2, 64)
    assert stage_bytes(job, job.stages[0]).saved == pytest.approx(found["loss"]["ACT"], rel=0.01)


def test_a_gpu_keeps_no_scores_of_an_attention_that_drops_out() -> None:
    """Its kernels are fused with it, and a dropout keeps a byte for each element where a CPU keeps four."""
    config = {**config_of("gpt2"), **DROPPING["gpt2"]}
    shape, without = (read_model({"config": other}) for other in (config, {**config, "attn_pdrop": 0.0}))
    kept, plain = (each.run_of(2, 64, "float32", True).blocks[0] for each in (shape, without))
    assert kept == plain
    on_a_cpu = shape.run_of(2, 64, "float32", False).blocks[0]
    elements, scores = 2 * 64 * 256, 2 * 8 * 64 * 64
    more = on_a_cpu.saved_inner + on_a_cpu.saved_stream - kept.saved_inner - kept.saved_stream
    # Weights, what drops out and both, without the logarithm of sums; of two dropouts three bytes an element.
    assert more == 4 * 3 * scores - 4 * 2 * 8 * 64 + 2 * 3 * elements


def test_a_model_that_does_not_compute_in_bfloat16_is_refused_with_that(tmp_path: Path) -> None:
    """A run would refuse it too; autocast leaves in float32 what has to be."""
    words = (folder_of(tmp_path, **config_of("xlstm")), "data.seq_len=32")
    with pytest.raises(ConfigError, match="xLSTMForCausalLM cannot compute with parameters in bfloat16") as refused:
        run(composed(*words))
    assert refused.value.type == "train.dtype=float32"
    assert "parameters" in run(composed(*words, "train.dtype=float32"))
    assert "parameters" in run(composed(*words, "strategy=ddp"))


@pytest.mark.dist
@pytest.mark.parametrize("mode", ["false", "true", "selective"])
@pytest.mark.parametrize("family", ["gemma2", "olmoe"])
def test_what_is_kept_is_what_torch_tracks(family: str, mode: str) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 8}
    config = {**config_of(family), **sizes, "vocab_size": 512}
    words = [PLAIN, f"activation_checkpointing={mode}"]
    found = run_ranks(1, tracked, words, config, 1, 2, 64)[0]
    job = job_for(words, 1, config, ADAMW, 2, 64)
    assert stage_bytes(job, job.stages[0]).saved == pytest.approx(found["loss"]["ACT"], rel=0.1)


def test_the_command_plans_a_family_without_a_row_and_says_how(tmp_path: Path) -> None:
    word = folder_of(tmp_path, model_type="gpt2", **GPT2)
    text = run(composed(word, "data.seq_len=64"))
    assert "read off  GPT2LMHeadModel built without values (torch was imported for it)" in text
    found = json.loads(run(composed(word, "data.seq_len=64", "plan.json=-")))
    assert found["model"]["type"] == "gpt2" and found["model"]["read_off"].startswith("GPT2LMHeadModel")
    assert found["step_seconds"] > 0 and found["notes"] == []


def test_a_plan_says_what_a_run_tries_before_it_starts(tmp_path: Path) -> None:
    word = folder_of(tmp_path, model_type="gpt2", **GPT2)
    words = ("data.seq_len=64", "world_size=4", "parallelism.tp_size=2", "parallelism.cp_size=2")
    found = json.loads(run(composed(word, *words, "plan.json=-")))
    assert [one.partition(";")[0] for one in found["tried"]] == [
        "how layers are split over tp",
        "parts of rows over cp, and which modules are run on whole ones",
    ]
    assert "  a run tries  how layers are split over tp; here as it was found for a small gpt2" in run(
        composed(word, *words)
    )
    assert json.loads(run(composed("model=llama3_8b", *words[1:], "plan.json=-")))["tried"] == []


def test_a_residual_stream_that_cannot_be_followed_is_refused_as_a_run_refuses_it(tmp_path: Path) -> None:
    words = ("data.seq_len=16", "world_size=2", TP, SEQUENCE)
    with pytest.raises(ConfigError, match="residual stream of ZambaForCausalLM cannot be followed") as refused:
        run(composed(folder_of(tmp_path, **config_of("zamba")), *words))
    assert refused.value.type == "strategy.sequence_parallel=false"


def test_a_model_of_ones_own_is_planned() -> None:
    found = json.loads(run(own("plan.json=-", count=5)))
    assert found["model"]["type"] == "Chain"
    assert found["model"]["parameters"] == 2 * 50 * 16 + 5 * (2 * 16 + 2 * 4 * 16 * 16 + 5 * 16)
    assert {row["why"] for row in found["traffic"]} == {"block", "root"}


def test_a_forward_that_cannot_be_counted_is_estimated_and_said_to_be(tmp_path: Path) -> None:
    text = run(composed(folder_of(tmp_path, **config_of("jetmoe")), "data.seq_len=16"))
    assert "not counted  activations and FLOPs, which are estimates from the sizes of weights: jetmoe does not" in text


REFUSED = {
    "no family": ({"model_type": "lama"}, [], "lama"),
    "no causal model": ({"model_type": "vit"}, [], "vit is no causal language model"),
    "no experts": ({"model_type": "gpt2", **GPT2}, ["parallelism.ep_size=2"], "no experts"),
    "heads": ({"model_type": "gemma2"}, ["parallelism.tp_size=8"], "does not divide the model's 4 key/value heads"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_run_would_refuse_of_such_a_model_a_plan_refuses(name: str, tmp_path: Path) -> None:
    config: Any
    config, words, text = REFUSED[name]
    with pytest.raises(Exception, match=text) as refused:
        run(composed(folder_of(tmp_path, **config), "data.seq_len=16", "world_size=8", *words))
    assert isinstance(refused.value, ValueError) and refused.value.type  # type: ignore[attr-defined]


def test_what_cannot_be_built_without_values_is_refused_with_the_reason() -> None:
    with pytest.raises(ConfigError, match="cannot be built on the meta device: .*") as refused:
        run(own(_target_="tests.plan.own_models.asking_values"))
    assert refused.value.asked == "model._target_=tests.plan.own_models.asking_values"


def test_a_run_does_not_build_its_model_once_more_for_its_plan(tmp_path: Path) -> None:
    recipe = _recipe_config(composed(folder_of(tmp_path, model_type="gpt2", **GPT2), "data.seq_len=64"), None)
    with pytest.raises(ConfigError, match="sizes of a model of type gpt2 are not known"):
        job_of(recipe, 8, "h100", builds=False)


def test_tensor_parallelism_of_a_module_without_a_plan_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing is known of how Chain would be split"):
        run(own("parallelism.tp_size=2"))


def test_a_search_keeps_to_what_is_known_of_the_model() -> None:
    """No tensor parallelism without a plan, no experts that are not there."""
    found = search(_recipe_config(own(count=4), None), 4, "h100", top=50)
    assert found.fitting and not any("tp_size" in one.words or "ep_size" in one.words for one in found.best)
    assert any("pp_size" in one.words for one in found.best)


@pytest.mark.parametrize("module", ["nemo_dist_conf.explain", "nemo_dist_conf.plan"])
def test_a_reader_that_has_seen_enough_ends_a_command_without_a_traceback(module: str, tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", module]
    process = subprocess.Popen(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == (b"", 141)
