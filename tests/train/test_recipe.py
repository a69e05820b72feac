"""``python -m nemo_dist_conf.train`` as a user runs it: alone, under torchrun, with bad input."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from tests import warm

pytestmark = [pytest.mark.slow, pytest.mark.dist]

TINY = [
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=2",
    "data.seq_len=32",
    "train.steps=6",
    "train.global_batch_size=8",
]


def train(folder: Path, *words: str, ranks: int = 1, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """fresh: in interpreters that import torch themselves, as a user's do."""
    recipe = ["-m", "nemo_dist_conf.train", *TINY, *words]
    if not fresh:
        launcher = ["torchrun", "--nproc-per-node", str(ranks)] if ranks > 1 else ["python"]
        return warm.run([*launcher, *recipe], cwd=folder)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launcher, *recipe]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=240)


def metrics(folder: Path) -> list[dict]:
    (path,) = folder.glob("outputs/*/*/metrics.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def single(tmp_path_factory) -> list[dict]:
    """The trajectory of one process without any strategy's help: ddp on one rank."""
    folder = tmp_path_factory.mktemp("single")
    done = train(folder, "strategy=ddp")
    assert done.returncode == 0, done.stderr
    return metrics(folder)


def test_a_run_learns_and_leaves_its_files(tmp_path):
    done = train(tmp_path, "train.steps=40", "train.tensorboard=true", "optimizer.lr=0.01", fresh=True)
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert {"step", "loss", "grad_norm", "tokens", "seconds"} <= set(rows[0])
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert abs(rows[0]["loss"] - math.log(256)) < 0.5 and rows[-1]["loss"] < rows[0]["loss"] - 1
    assert rows[0]["tokens"] == 8 * 32
    (folder,) = tmp_path.glob("outputs/*/*")
    assert {".hydra", "metrics.jsonl", "train.log"} <= {path.name for path in folder.iterdir()}
    assert list(folder.glob("**/events.out.tfevents.*"))
    for words in ("parameters", "peak memory", "tokens/s", str(folder)):
        assert words in done.stdout


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        (1, ["strategy=fsdp2"]),
        (2, ["strategy=ddp"]),
        (2, ["strategy=fsdp2", "train.micro_batch_size=2"]),
        (2, ["parallelism.tp_size=2", "strategy.sequence_parallel=true", "activation_checkpointing=true"]),
        (2, ["parallelism.cp_size=2", "train.micro_batch_size=4"]),
        (2, ["parallelism.pp_size=2", "train.micro_batch_size=4", "pipeline.scale_grads_in_schedule=true"]),
        (4, ["parallelism.tp_size=2"]),
        (4, ["parallelism.dp_replicate_size=2"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else str(value),
)
def test_every_layout_has_the_trajectory_of_one_process_and_prints_once(tmp_path, single, ranks, words):
    done = train(tmp_path, *words, ranks=ranks)
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path)  # one folder, so one file, whatever the number of ranks
    assert len(rows) == len(single)
    for row, reference in zip(rows, single):
        assert row["loss"] == pytest.approx(reference["loss"], rel=1e-5)
        assert row["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
        assert row["tokens"] == reference["tokens"]
    assert done.stdout.count("peak memory") == 1
    assert done.stdout.count("step 6/6") == 1


def test_experts_on_two_ranks_have_the_trajectory_of_one_process(tmp_path):
    """With the balancing loss, which the small model's config asks for; both numbers of the experts are there."""
    small = ["model=mixtral_tiny", "model.config.hidden_size=32", "train.steps=3"]
    found = []
    for ranks, words in ((1, ["strategy=ddp"]), (2, ["parallelism.ep_size=2"])):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        done = train(folder, *small, *words, ranks=ranks)
        assert done.returncode == 0, done.stderr
        found.append(metrics(folder))
    for row, reference in zip(found[1], found[0], strict=True):
        for name in ("loss", "grad_norm", "aux_loss", "expert_imbalance"):
            assert row[name] == pytest.approx(reference[name], rel=1e-5)
        assert row["aux_loss"] > 0 and row["expert_imbalance"] >= 1


def test_bfloat16_by_name_changes_the_numbers_a_little(tmp_path, single):
    done = train(tmp_path, "train.dtype=bfloat16", "train.steps=2")
    assert done.returncode == 0, done.stderr
    rows = metrics(tmp_path)
    assert rows[0]["loss"] != single[0]["loss"]
    assert rows[0]["loss"] == pytest.approx(single[0]["loss"], rel=1e-2)


def test_another_family_and_the_users_text(tmp_path):
    (tmp_path / "my.txt").write_text("to be or not to be, that is the question\n" * 200)
    done = train(tmp_path, "model=qwen3_tiny", "model.config.head_dim=4", "data.path=my.txt")
    assert done.returncode == 0, done.stderr
    assert "Qwen3ForCausalLM" in done.stdout and "my.txt" in done.stdout


BAD = {
    "no such path": (["data.path=nowhere"], "data.path"),
    "an empty file": (["data.path=empty.txt"], "data.path"),
    "a text shorter than a sequence": (["data.path=short.txt"], "data.seq_len"),
    "no checkpoint folder": (["model.name_or_path=nowhere"], "config.json"),
    "a checkpoint of another architecture": (["model.name_or_path=bert"], "model.name_or_path"),
    "weights of another model": (["model.name_or_path=other"], "missing in the folder"),
    "only pickled weights": (["model.name_or_path=pickled"], "unpickled"),
    "an unknown model type": (["model.config.model_type=llamma"], "type     model.config.model_type=llama\n"),
    "a field the model lacks a value for": (["model.config.hidden_size=31"], "model.config"),
    "an optimizer setting": (["optimizer.lr=-1"], "optimizer.lr"),
    "a stray key": (["+train.epochs=3"], "train.epochs"),
}


@pytest.fixture(scope="module")
def bad_folder(tmp_path_factory) -> Path:
    from transformers import AutoModelForCausalLM, BertConfig, LlamaConfig

    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty.txt").write_text("")
    (folder / "short.txt").write_text("short")
    BertConfig(num_hidden_layers=1).save_pretrained(folder / "bert")
    shape = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=4, vocab_size=256)
    small = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=1, **shape))
    small.save_pretrained(folder / "other")
    LlamaConfig(num_hidden_layers=2, **shape).save_pretrained(folder / "other")
    LlamaConfig(num_hidden_layers=1, **shape).save_pretrained(folder / "pickled")
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_a_clear_error(bad_folder, case):
    words, shown = BAD[case]
    done = train(bad_folder, *words)
    assert done.returncode == 1
    assert shown in done.stderr and "\n  type     " in done.stderr
    assert "Traceback" not in done.stderr and "Traceback" not in done.stdout


def test_a_loss_that_stops_being_finite_ends_the_run_and_keeps_the_folder(tmp_path):
    done = train(tmp_path, "optimizer.lr=1e20", "train.max_grad_norm=null", "train.warmup_steps=0", "train.steps=50")
    assert done.returncode == 1
    assert "not finite" in done.stderr and "Traceback" not in done.stderr
    rows = metrics(tmp_path)
    assert 1 <= len(rows) < 50 and all(math.isfinite(row["loss"]) for row in rows)


def test_a_bad_path_under_torchrun_is_said_once(tmp_path):
    """Fresh: ranks that torch forks answer the SIGTERM that ends them with a traceback of their own."""
    done = train(tmp_path, "data.path=nowhere", ranks=2, fresh=True)
    assert done.returncode != 0
    assert done.stderr.count("asked    data.path=nowhere") == 1
