"""What only a CUDA device can show: NCCL, the default device and dtype, pinned offload, Megatron-FSDP unshimmed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

MODEL = {
    "config": {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
}


def made(*overrides, device="auto") -> tuple[Any, Any, Any]:
    """(setup, model, optimizer), with a process group of one rank."""
    from hydra import compose, initialize

    import nemo_dist_conf

    with initialize(None, version_base="1.3"):
        cfg = compose("nemo_dist_conf", overrides=list(overrides))
    OmegaConf.set_struct(cfg, False)
    cfg.device, cfg.model, cfg.optimizer = device, MODEL, {"name": "adamw", "lr": 1e-2}
    return nemo_dist_conf.instantiate(cfg)


def steps(setup, model, optimizer, count):
    ids = torch.arange(256, device=setup.mesh_context.device).view(4, 64)
    losses = []
    for _ in range(count):
        logits = model(input_ids=ids).logits.float()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def trained(*overrides):
    """Losses of three steps on one GPU, with its device and the model."""
    import nemo_dist_conf

    setup, model, optimizer = made(*overrides)
    losses = steps(setup, model, optimizer, 3)
    nemo_dist_conf.shutdown_distributed()
    return losses, setup.mesh_context.device, model


@pytest.mark.parametrize(
    "overrides",
    [
        ["strategy=ddp"],
        ["strategy=ddp", "strategy.autocast_dtype=bfloat16"],
        ["strategy.mp_policy=null"],
        ["strategy=fsdp2"],
        ["strategy=fsdp2", "strategy.offload_policy.enabled=true"],
        ["strategy=fsdp2", "strategy.enable_compile=true", "activation_checkpointing=selective"],
        ["strategy=megatron_fsdp", "activation_checkpointing=true"],
        ["strategy=megatron_fsdp", "strategy.zero_dp_strategy=1", "strategy.preserve_fp32_weights=true"],
        ["strategy=megatron_fsdp", "strategy.init_fsdp_with_meta_device=true"],
        ["strategy=megatron_fsdp", "strategy.fsdp_double_buffer=true", "strategy.keep_fp8_transpose_cache=true"],
        ["strategy=megatron_fsdp", "strategy.nccl_ub=true"],
    ],
    ids=" ".join,
)
def test_strategies_train_on_one_gpu(overrides):
    if "strategy=megatron_fsdp" in overrides:
        pytest.importorskip("megatron_fsdp")
    if "strategy.nccl_ub=true" in overrides:
        pytest.importorskip("megatron.core.nccl_allocator")
    losses, device, _ = trained(*overrides)
    assert device.type == "cuda"
    assert losses[-1] < losses[0]


def test_strategies_agree_in_float32():
    ddp, _, _ = trained("strategy=ddp")
    fsdp2, _, _ = trained("strategy.mp_policy=null")
    assert fsdp2 == pytest.approx(ddp, rel=1e-5)
    pytest.importorskip("megatron_fsdp")
    megatron, _, _ = trained("strategy=megatron_fsdp")
    assert megatron == pytest.approx(ddp, rel=1e-5)


def test_the_losses_are_those_of_the_cpu(tmp_path):
    """Both draw a weight from its name and the seed, but with generators of their own: so from one checkpoint."""
    import nemo_dist_conf
    from nemo_dist_conf.checkpoint import load, save

    found = {}
    for device in ("cuda", "cpu"):
        setup, model, optimizer = made("strategy.mp_policy=null", device=device)
        if device == "cuda":
            save(tmp_path / "from_gpu", model, optimizer)
        else:
            load(tmp_path / "from_gpu", model, optimizer)
        found[device] = steps(setup, model, optimizer, 3)
        nemo_dist_conf.shutdown_distributed()
    assert found["cpu"] == pytest.approx(found["cuda"], rel=1e-4)


@pytest.mark.parametrize("into", ["ddp", "fsdp2", "megatron_fsdp"])
def test_a_checkpoint_of_one_strategy_goes_on_under_another(into, tmp_path):
    import nemo_dist_conf
    from nemo_dist_conf.checkpoint import load, save

    if into == "megatron_fsdp":
        pytest.importorskip("megatron_fsdp")
    fp32: dict[str, list[str]] = {"ddp": [], "fsdp2": ["strategy.mp_policy=null"], "megatron_fsdp": []}
    first = made("strategy=fsdp2", *fp32["fsdp2"])
    steps(*first, 2)
    save(tmp_path / "step", first[1], first[2], step=2)
    expected = steps(*first, 2)
    nemo_dist_conf.shutdown_distributed()
    second = made(f"strategy={into}", *fp32[into])
    assert load(tmp_path / "step", second[1], second[2]).step == 2
    assert steps(*second, 2) == pytest.approx(expected, rel=1e-5)
    nemo_dist_conf.shutdown_distributed()


@pytest.mark.parametrize("checkpointing", ["true", "selective"])
def test_compile_and_checkpointing_change_no_loss(checkpointing):
    plain, _, _ = trained("strategy.mp_policy=null")
    words = ["strategy.mp_policy=null", "strategy.enable_compile=true", f"activation_checkpointing={checkpointing}"]
    assert trained(*words)[0] == pytest.approx(plain, rel=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2", "megatron_fsdp"])
def test_the_recipe_trains_and_goes_on(strategy, tmp_path):
    if strategy == "megatron_fsdp":
        pytest.importorskip("megatron_fsdp")
    words = [f"strategy={strategy}", "checkpoint.every=2", f"hydra.run.dir={tmp_path}"]
    for last in (2, 4):
        command = [sys.executable, "-m", "nemo_dist_conf.train", *words, f"train.steps={last}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "cuda" in done.stdout + done.stderr
    lines = [json.loads(line) for line in Path(tmp_path, "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines][-1] == 4


def test_auto_means_bfloat16_where_there_is_a_gpu():
    from nemo_dist_conf.composition.resolvers import compute_dtype

    assert compute_dtype("auto", "auto") == "bfloat16"
    assert compute_dtype("auto", "cpu") == "float32"


@pytest.mark.parametrize("kind", ["causal", "window", "soft cap", "chunks"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_attention_over_whole_rows_is_that_of_a_cpu_and_makes_no_mask(kind, dtype):
    """Of context parallelism; the queries are the third quarter of the row, and memory grows with the row."""
    from nemo_dist_conf.runtime.techniques.context.mask_rules import Behind, Both, Causal, Chunks
    from nemo_dist_conf.runtime.techniques.context.whole_attention import Scores, attend

    rule: Any = {"window": Both((Behind(300), Causal())), "chunks": Both((Chunks(512), Causal()))}.get(kind, Causal())
    scores = Scores(cap=2.0 if kind == "soft cap" else None)
    peaks = []
    for length in (4096, 8192, 16384):
        torch.manual_seed(0)
        shapes = ((1, 4, length // 4, 64), (1, 2, length, 64), (1, 2, length, 64))
        inputs = [torch.randn(shape, dtype=dtype, device="cuda", requires_grad=True) for shape in shapes]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        query, key, value = inputs
        out = attend(query, key, value, length // 2, rule, scores)
        gradients = torch.autograd.grad(out.float().square().sum(), inputs)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        if length == 4096:
            plain = [part.detach().double().cpu().requires_grad_() for part in inputs]
            query, key, value = plain
            wanted = attend(query, key, value, length // 2, rule, scores)
            expected = torch.autograd.grad(wanted.square().sum(), plain)
            for found, other in zip((out, *gradients), (wanted, *expected)):
                apart = (found.double().cpu() - other).norm() / other.norm()
                assert apart < (2e-3 if dtype == torch.float32 else 3e-2)  # TF32 may be on
    assert peaks[2] < 2.5 * peaks[1]
