"""The engine of a model: of one that we have wrapped, that somebody else has, and of a plain one."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.gradients import accumulate, clip_grad_norm_
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.runtime.engines.base import Engine, engine_of, unwrapped
from nemo_dist_conf.runtime.parallelize import parallelize
from tests.dist.cuda_shim import cuda_shim
from tests.dist.layouts import ADAMW, MODELS, batch, composed, loss_sum
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist

LAYOUTS = {
    "ddp": ("strategy=ddp",),
    "fsdp2": ("strategy=fsdp2",),
    "megatron_fsdp": ("strategy=megatron_fsdp",),
    "pipeline": ("strategy=fsdp2", "parallelism.pp_size=2", "pipeline.pp_batch_size=2"),
}


def wrapped(*words: str) -> Any:
    return instantiate(composed(*words, model=MODELS["llama"], optimizer=ADAMW))[1]


def engine_and_life(words: tuple[str, ...]) -> tuple[str, bool, bool]:
    """(name of the engine, whether each model has one of its own, whether a model is freed)."""
    with cuda_shim():
        model, other = wrapped(*words), wrapped(*words)
        engine = engine_of(model)
        found = (engine.name, engine is engine_of(model) and engine is not engine_of(other))
        life = weakref.ref(model)
        del model, engine
        gc.collect()
        return (*found, life() is None)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_wrapped_model_has_an_engine_of_its_own_which_lets_it_be_freed(name: str) -> None:
    is_freed = name != "megatron_fsdp"  # 0.6: parameters hold the wrapper, also of a model wrapped by hand
    assert run_ranks(2, engine_and_life, LAYOUTS[name]) == [(name, True, is_freed)] * 2


def of_models_that_others_have_wrapped() -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    plain = nn.Linear(4, 4)
    ddp = DistributedDataParallel(nn.Linear(4, 4))
    sharded: Any = nn.Linear(4, 4)
    fully_shard(sharded, mesh=mesh)
    names = {kind: engine_of(model).name for kind, model in (("plain", plain), ("ddp", ddp), ("fsdp2", sharded))}
    gradients = {}
    for kind, model in (("plain", plain), ("ddp", ddp), ("fsdp2", sharded)):
        for last in (False, True):
            with accumulate(model, last=last):
                model(torch.ones(2, 4) * (1 + torch.distributed.get_rank())).sum().backward()
        gradients[kind] = clip_grad_norm_(model, None).item()
    return {"names": names, "norms": gradients, "unwrapped": unwrapped(ddp) is ddp.module}


def test_models_that_others_have_wrapped_are_told_and_accumulate() -> None:
    first, second = run_ranks(2, of_models_that_others_have_wrapped)
    assert first["names"] == {"plain": "plain", "ddp": "ddp", "fsdp2": "fsdp2"} and first["unwrapped"]
    # Inputs of 1 and 2 in 2 rows, twice: 4 and 8 in each of 16 weights, 4 in each of 4 biases; wrappers average.
    plain = [(16 * g**2 + 4 * 4**2) ** 0.5 for g in (4, 8)]
    assert [first["norms"]["plain"], second["norms"]["plain"]] == pytest.approx(plain)
    mean = (16 * 6**2 + 4 * 4**2) ** 0.5
    for kind in ("ddp", "fsdp2"):
        assert [first["norms"][kind], second["norms"][kind]] == pytest.approx([mean, mean])


def refused() -> tuple[str, str]:
    """What is said to a model that is wrapped already, and to one that megatron-fsdp has wrapped without us."""
    ddp = DistributedDataParallel(nn.Linear(4, 4))
    with pytest.raises(ConfigError) as again:
        parallelize(ddp, Engine())
    with cuda_shim():
        import megatron_fsdp

        mesh = init_device_mesh("cpu", (2, 1, 1), mesh_dim_names=("dp", "cp", "tp"))
        model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        theirs = megatron_fsdp.fully_shard_model(
            model,
            device_mesh=mesh,
            dp_shard_dim="dp",
            tp_dim="tp",
            fsdp_unit_modules=[nn.Linear],
            device=torch.device("cpu"),
        )
        with pytest.raises(ConfigError) as unknown:
            clip_grad_norm_(theirs, 1.0)
    return again.value.what, unknown.value.what


def test_what_has_no_engine_of_ours_is_refused_by_name() -> None:
    ((again, unknown), _) = run_ranks(2, refused)
    assert again == "the model is wrapped already (DistributedDataParallel)"
    assert unknown.startswith("megatron-fsdp has wrapped this model without nemo_dist_conf")


def of_a_step(words: tuple[str, ...]) -> list[str]:
    """Attributes of ours on a wrapped model and its optimizer after a step, that their classes do not have."""
    _, model, optimizer = instantiate(composed(*words, model=MODELS["llama"], optimizer=ADAMW))
    ids_BS, labels_BS = batch()
    with accumulate(model, last=True):
        loss_sum(model, ids_BS, labels_BS).backward()
    clip_grad_norm_(model, 1.0)
    optimizer.step()
    return [
        name for one in (model, optimizer) for name in vars(one) if name.startswith(("_nemo", "_defer", "_gradient"))
    ]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_nothing_is_hidden_on_models_and_optimizers(strategy: str) -> None:
    assert run_ranks(2, of_a_step, (f"strategy={strategy}",)) == [[], []]
