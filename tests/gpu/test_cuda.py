"""What only a CUDA device can show: NCCL, the default device and dtype, pinned offload, Megatron-FSDP unshimmed."""

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


def trained(*overrides):
    """Losses of three steps on one GPU, with the group and the model's first parameter."""
    from hydra import compose, initialize

    import nemo_dist_conf

    with initialize(None, version_base="1.3"):
        cfg = compose("nemo_dist_conf", overrides=list(overrides))
    OmegaConf.set_struct(cfg, False)
    cfg.model, cfg.optimizer = MODEL, {"name": "adamw", "lr": 1e-2}
    setup, model, optimizer = nemo_dist_conf.instantiate(cfg)
    ids = torch.arange(256, device=setup.mesh_context.device).view(4, 64)
    losses = []
    for _ in range(3):
        logits = model(input_ids=ids).logits.float()
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
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


def test_auto_means_bfloat16_where_there_is_a_gpu():
    from nemo_dist_conf.resolvers import compute_dtype

    assert compute_dtype("auto", "auto") == "bfloat16"
    assert compute_dtype("auto", "cpu") == "float32"
