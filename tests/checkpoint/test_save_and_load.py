"""One checkpoint in one process: what is saved comes back, and what does not fit is named."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from nemo_dist_conf.checkpoint import load, save
from nemo_dist_conf.errors import ConfigError, DataError, TrainingError
from tests.checkpoint.small import bits, make, train

OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adamw": (torch.optim.AdamW, {}),
    "adamw, capturable": (torch.optim.AdamW, {"amsgrad": True, "foreach": False}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
    "sgd without state": (torch.optim.SGD, {}),
    "adafactor": (torch.optim.Adafactor, {}),
    "nadam": (torch.optim.NAdam, {}),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_run_goes_on_bit_for_bit(tmp_path: Path, kind: str) -> None:
    """Weights, buffers and whatever the optimizer keeps, also state of another shape than its parameter's."""
    optimizer, options = OPTIMIZERS[kind]
    model, updates = make(optimizer, **options)
    train(model, updates, 0, 3)
    save(tmp_path / "one", model, updates, step=3)
    expected = train(model, updates, 3, 6)

    again, updates = make(optimizer, **options)
    train(again, updates, 7, 8)  # state of its own, which must be gone
    assert load(tmp_path / "one", again, updates).step == 3
    assert train(again, updates, 3, 6) == expected
    assert bits(again) == bits(model)


def test_settings_of_groups_come_back_or_stay(tmp_path: Path) -> None:
    """A torch scheduler has changed the learning rate: it goes on, unless the caller keeps its own."""
    model, optimizer = make()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    for step in range(3):
        train(model, optimizer, step, step + 1)
        schedule.step()
    save(tmp_path / "one", model, optimizer, objects={"schedule": schedule})
    schedule.step()

    again, others = make(lr=0.5, betas=(0.5, 0.5))
    restarted = torch.optim.lr_scheduler.CosineAnnealingLR(others, T_max=10)
    load(tmp_path / "one", again, others, objects={"schedule": restarted})
    assert others.param_groups[0]["betas"] == (0.9, 0.999)
    restarted.step()
    assert restarted.get_last_lr() == schedule.get_last_lr()

    again, others = make(lr=0.5)
    load(tmp_path / "one", again, others, settings=False)
    assert others.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("saved, now", [(True, False), (False, True), (None, True)])
def test_a_checkpoint_does_not_choose_the_kernels_of_the_update(tmp_path: Path, saved: Any, now: bool) -> None:
    """What one layout could fuse, another one may not be able to."""
    model, optimizer = make(fused=saved, weight_decay=0.3)
    train(model, optimizer, 0, 2)
    folder = save(tmp_path / "a", model, optimizer, step=2)
    expected = train(model, optimizer, 2, 5)
    other, its = make(fused=now)
    load(folder, other, its)
    assert its.param_groups[0]["fused"] is now and its.param_groups[0]["weight_decay"] == 0.3
    assert train(other, its, 2, 5) == pytest.approx(expected, rel=1e-5)


def test_random_states_go_on(tmp_path: Path) -> None:
    model, _ = make()
    random.seed(3), numpy.random.seed(3), torch.manual_seed(3)
    save(tmp_path / "one", model)
    drawn = (random.random(), float(numpy.random.rand()), torch.rand(2).tolist())
    load(tmp_path / "one", model)
    assert (random.random(), float(numpy.random.rand()), torch.rand(2).tolist()) == drawn


class Position:
    """A data loader with a state of every kind that a checkpoint can keep."""

    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def test_objects_come_back_as_they_were(tmp_path: Path) -> None:
    state = {"epoch": 3, "pair": (1, [2.5, None]), 7: "seven", "order": torch.tensor([3, 1, 2]), "done": False}
    model, _ = make()
    save(tmp_path / "one", model, objects={"loader": Position(state), "best": 0.25})
    loader = Position(None)
    restored = load(tmp_path / "one", model, objects={"loader": loader})
    order = loader.state.pop("order")
    assert loader.state == {key: value for key, value in state.items() if key != "order"}
    assert torch.equal(order, torch.tensor([3, 1, 2])) and restored.objects["best"] == 0.25


def test_an_object_that_would_have_to_be_pickled_is_named(tmp_path: Path) -> None:
    model, _ = make()
    with pytest.raises(ConfigError, match=r"loader\.path is a PosixPath") as refused:
        save(tmp_path / "one", model, objects={"loader": Position({"path": tmp_path})})
    assert "tuples" in refused.value.allowed and not (tmp_path / "one").exists()
    save(tmp_path / "two", model, objects={"loader": Position(1)})
    with pytest.raises(DataError, match="no state of 'sampler'"):
        load(tmp_path / "two", model, objects={"sampler": Position(1)})


def test_the_config_comes_back_as_data(tmp_path: Path) -> None:
    """What a checkpoint names is never imported or called."""
    config = OmegaConf.create({"model": {"_target_": "os.abort"}, "seed": "${oc.env:NOT_SET}", "hydra": {"job": 1}})
    model, _ = make()
    save(tmp_path / "one", model, config=config)
    restored = load(tmp_path / "one", model).config
    assert restored is not None and restored.model == {"_target_": "os.abort"} and "hydra" not in restored


def test_another_model_is_told_with_names_shapes_and_dtypes(tmp_path: Path) -> None:
    model, optimizer = make()
    train(model, optimizer, 0, 1)
    save(tmp_path / "one", model, optimizer)
    wider, _ = make(width=9)
    before = bits(wider)
    with pytest.raises(DataError, match=r"of other shape \(0\.bias: \[8\], here \[9\]"):
        load(tmp_path / "one", wider)
    assert bits(wider) == before
    with pytest.raises(DataError, match=r"8 of another dtype \(0\.bias: float32, here bfloat16"):
        load(tmp_path / "one", make()[0].to(torch.bfloat16))
    with pytest.raises(DataError, match=r"2 missing in it \(weight|unknown to the model"):
        load(tmp_path / "one", nn.Linear(4, 8))
    with pytest.raises(DataError, match="holds the state of AdamW, not of SGD"):
        load(tmp_path / "one", *make(torch.optim.SGD))
    save(tmp_path / "weights", model)
    with pytest.raises(DataError, match="holds the state of no optimizer, not of AdamW"):
        load(tmp_path / "weights", model, optimizer)
    load(tmp_path / "one", model)  # the weights alone


def test_a_checkpoint_does_not_take_anothers_place(tmp_path: Path) -> None:
    model, _ = make()
    save(tmp_path / "one", model, step=1)
    before = (tmp_path / "one" / "manifest.json").read_bytes()
    with pytest.raises(TrainingError, match="exists already(.|\n)*save to another folder, or remove that one"):
        save(tmp_path / "one", model, step=2)
    assert (tmp_path / "one" / "manifest.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_files_are_safetensors_and_json(tmp_path: Path) -> None:
    """Any tool can read them, and nothing in them is a pickle."""
    from safetensors.torch import load_file

    model, optimizer = make()
    train(model, optimizer, 0, 1)
    folder = save(tmp_path / "one", model, optimizer, config={"seed": 1})
    tensors = load_file(folder / "rank_00000.safetensors")
    assert torch.equal(tensors["model.0.weight"], model.state_dict()["0.weight"])
    assert set(tensors) == set(json.loads((folder / "index.json").read_text()))
    names = {path.name for path in folder.iterdir()}
    assert names == {"manifest.json", "index.json", "state.json", "config.yaml", "rank_00000.safetensors"}
