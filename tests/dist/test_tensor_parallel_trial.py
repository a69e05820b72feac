"""Plans of models of any input are tried before anything is sharded; what cannot be tried is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.runtime.techniques.tensor.parallel import apply_tensor_parallel
from tests.dist.layouts import composed
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist

PLAN = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}
PLAN_WORD = "'strategy.tp_plan={layers.*.up:colwise,layers.*.down:rowwise}'"


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 12), nn.Linear(12, width)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x + self.down(self.up(x).relu())


class Vectors(nn.Module):
    """Takes vectors [B, 8]; drops out while it trains, and counts its calls."""

    steps: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(8) for _ in range(3))
        self.dropout = nn.Dropout(0.5)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() != 2:
            raise ValueError("vectors only")
        self.steps += 1
        for layer in self.layers:
            x = self.dropout(layer(x))
        return x


class Pairs(Vectors):
    """Takes two tensors of a shape that nobody can guess."""

    def forward(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(left[:, 0] * right)


class Sums(Vectors):
    """Adds up the features of a row between the layers, so a rank has the sum of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            wide = layer.up(x)  # type: ignore[operator]
            x = x + layer.down(wide - wide.mean(-1, keepdim=True))  # type: ignore[operator]
        return x


class Scales(Vectors):
    """Sees only while it trains how large the features are, of which a rank has some."""

    def __init__(self) -> None:
        super().__init__()
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            wide = layer.up(x)  # type: ignore[operator]
            x = x + layer.down(wide / wide.abs().mean() if self.training else wide)  # type: ignore[operator]
        return x


def apply(model: nn.Module, plan: Any, example: Any = None) -> list[str]:
    """Names of what was sharded; the refusal, with the model as it was."""
    before = [(id(p), p.detach().clone()) for p in model.parameters()]
    state = torch.random.get_rng_state()
    try:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        return list(apply_tensor_parallel(model, mesh, plan=plan, example=example))
    except ConfigError:
        assert all(id(p) == was and torch.equal(p, value) for p, (was, value) in zip(model.parameters(), before))
        raise
    finally:
        assert torch.equal(state, torch.random.get_rng_state())
        layers: Any = model.layers
        assert all(getattr(layer, "calls", 0) == 0 for layer in layers) and not model.steps


def test_a_model_that_takes_vectors_is_tried_and_stays_as_it_was() -> None:
    for names in run_ranks(2, apply, Vectors(), PLAN):
        assert names == [f"layers.{index}.{name}" for index in range(3) for name in ("up", "down")]


def test_where_a_plan_parts_is_said_with_one_that_was_tried() -> None:
    with pytest.raises(ConfigError, match=r"what the model \(Sums\) returns is not what it returns") as refused:
        run_ranks(2, apply, Sums(), PLAN)
    gathered = "{layers.*.up:colwise_gather_output,layers.*.down:rowwise_split_input}"
    assert refused.value.type == f"'strategy.tp_plan={gathered}'"
    with pytest.raises(ConfigError, match=r"the model \(Scales\) returns in training is not what it"):
        run_ranks(2, apply, Scales(), PLAN)
    with pytest.raises(ConfigError, match="no tensor-parallel plan is known for Vectors") as refused:
        run_ranks(2, apply, Vectors(), None)
    assert refused.value.type == PLAN_WORD
    one_layer = {"layers.0.up": "colwise", "layers.0.down": "colwise"}
    with pytest.raises(ConfigError, match="an error in layers.0.down") as refused:
        run_ranks(2, apply, Vectors(), one_layer)
    assert refused.value.type == PLAN_WORD  # of every layer, by pattern


class Chained(Vectors):
    """Layers whose linears are called by numbers, as their place in the model is."""

    def __init__(self) -> None:
        super().__init__()
        chains = (nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8)) for _ in range(3))
        self.layers = nn.ModuleList(chains)


class Single(Vectors):
    """Each layer is one linear: nothing lies between two of them that the ranks could share."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.ReLU(), nn.Linear(8, 8)) for _ in range(3))


def test_an_offer_names_layers_that_are_called_by_numbers() -> None:
    with pytest.raises(ConfigError, match="no tensor-parallel plan is known for Chained") as refused:
        run_ranks(2, apply, Chained(), None)
    assert refused.value.type == "'strategy.tp_plan={layers.*.0:colwise,layers.*.2:rowwise}'"


def test_layers_that_are_split_otherwise_than_the_first_are_tried_too() -> None:
    last = {"layers.2.up": "colwise", "layers.2.down": "colwise"}
    with pytest.raises(ConfigError, match="an error in layers.2.down") as refused:
        run_ranks(2, apply, Vectors(), last)
    assert refused.value.type == PLAN_WORD
    assert run_ranks(2, apply, Vectors(), {"layers.2.up": "colwise", "layers.2.down": "rowwise"})


def test_an_offer_that_cannot_be_made_is_none() -> None:
    with pytest.raises(ConfigError, match="no tensor-parallel plan is known for Single") as refused:
        run_ranks(2, apply, Single(), None)
    assert refused.value.type == "parallelism.tp_size=1"


def shared() -> Vectors:
    """The first layer once more at the end."""
    model = Vectors()
    model.layers[2] = model.layers[0]
    return model


def test_a_module_in_two_places_is_named_by_either() -> None:
    styles = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
    assert run_ranks(2, apply, shared(), PLAN)[0] == styles
    assert run_ranks(2, apply, shared(), {"layers.2.up": "colwise", "layers.2.down": "rowwise"})[0] == styles[:2]
    both = {"layers.0.up": "colwise", "layers.0.down": "rowwise", "layers.2.up": "replicated"}
    with pytest.raises(ConfigError, match=r"layers\.0\.up and layers\.2\.up are one module") as refused:
        run_ranks(2, apply, shared(), both)
    assert refused.value.type == "'strategy.tp_plan={layers.0.up:colwise,layers.0.down:rowwise}'"


def test_what_cannot_be_tried_is_refused_until_an_example_is_given() -> None:
    with pytest.raises(ConfigError, match="cannot be tried before it is used") as refused:
        run_ranks(2, apply, Pairs(), PLAN)
    assert "example=" in refused.value.type
    example = {"left": torch.ones(3, 2, 8), "right": torch.ones(3, 8)}
    assert len(run_ranks(2, apply, Pairs(), PLAN, example)[0]) == 6


def hook(example: Any) -> list[float]:
    cfg = composed("strategy.mp_policy=null", "parallelism.tp_size=2")
    cfg.strategy.tp_plan = PLAN
    torch.manual_seed(3)
    plain = Pairs().eval()
    _, model, _ = instantiate(cfg, model=plain, example=example)
    return [float(model(**{key: value + 1 for key, value in example.items()}).detach().sum())]


def test_the_hook_takes_an_example() -> None:
    example = {"left": torch.ones(3, 2, 8), "right": torch.ones(3, 8)}
    torch.manual_seed(3)
    want = float(Pairs().eval()(**{key: value + 1 for key, value in example.items()}).detach().sum())
    assert [rank[0] for rank in run_ranks(2, hook, example)] == pytest.approx([want, want], rel=1e-6)
