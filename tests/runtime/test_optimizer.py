"""An optimizer from a config node: torch's own classes, over plain and distributed parameters alike."""

from __future__ import annotations

import functools
import shlex
from typing import Any, Iterator

import pytest
import torch
import torch.distributed as dist
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.runtime.optimizer import build_optimizer
from nemo_dist_conf.schema.optimizers import SETTINGS
from nemo_dist_conf.wording import Spelling


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LayerNorm(8), torch.nn.Linear(8, 2))


def build(node: Any, module: torch.nn.Module | None = None, **options: Any) -> Any:
    node = OmegaConf.create(node) if isinstance(node, dict) else node
    return build_optimizer(node, (module or model()).named_parameters(), **options)


def train(optimizer: torch.optim.Optimizer, module: torch.nn.Module, steps: int = 3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        module(torch.randn(6, 4, generator=generator)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize(
    "node, reference",
    [
        ({"name": "adamw", "lr": 0.1}, lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)),
        ({"name": "adam", "lr": 0.1, "amsgrad": True}, lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, fused=True)),
        (
            {"name": "adamw", "lr": 0.1, "betas": [0.5, 0.6], "eps": 1e-3, "weight_decay": 0.3},
            lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.5, 0.6), eps=1e-3, weight_decay=0.3, fused=True),
        ),
        (
            {"name": "sgd", "lr": 0.01, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
            lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
        ),
        ({"name": "adamw", "lr": 0.1, "fused": False}, lambda p: torch.optim.AdamW(p, lr=0.1)),
        ({"name": "adamw", "lr": 0.1, "foreach": True}, lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True)),
        ({"name": "sgd", "lr": 0.01, "foreach": True}, lambda p: torch.optim.SGD(p, lr=0.01, foreach=True)),
    ],
)
def test_it_makes_the_steps_of_torchs_optimizer(node: dict[str, Any], reference: Any) -> None:
    ours, theirs = model(), model()
    got = train(build({**node, "decay_1d": True}, ours), ours)
    want = train(reference(theirs.parameters()), theirs)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


def test_one_dimensional_parameters_are_spared_from_weight_decay() -> None:
    module = model()
    decayed, spared = build({"name": "adamw", "lr": 0.1, "weight_decay": 0.3}, module).param_groups
    assert decayed["weight_decay"] == 0.3 and {p.dim() for p in decayed["params"]} == {2}
    assert spared["weight_decay"] == 0.0 and {p.dim() for p in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(module.parameters()))


def test_torchs_own_default_decay_spares_them_too() -> None:
    """AdamW decays by 0.01 where nothing is said."""
    groups = build({"name": "adamw", "lr": 0.1}).param_groups
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]


@pytest.mark.parametrize(
    "changes", [{"decay_1d": True, "weight_decay": 0.1}, {"weight_decay": 0.0}, {"weight_decay": 0}]
)
def test_there_is_one_group_where_all_are_treated_alike(changes: dict[str, Any]) -> None:
    assert len(build({"name": "adamw", "lr": 0.1, **changes}).param_groups) == 1


def test_frozen_parameters_are_left_out() -> None:
    module = model()
    module.get_submodule("0").requires_grad_(False)
    groups = build({"name": "sgd", "lr": 0.1}, module).param_groups
    assert sum(len(group["params"]) for group in groups) == 4


def test_a_model_without_trainable_parameters_is_refused() -> None:
    with pytest.raises(ConfigError, match="no parameter that requires a gradient"):
        build({"name": "sgd", "lr": 0.1}, model().requires_grad_(False))


def test_none_is_no_optimizer() -> None:
    assert build_optimizer(None, model().named_parameters()) is None


def test_a_plain_dict_and_interpolations_work() -> None:
    cfg = OmegaConf.create({"rate": 0.25, "optimizer": {"name": "sgd", "lr": "${rate}"}})
    first = build_optimizer(cfg.optimizer, model().named_parameters())
    second = build_optimizer({"name": "sgd", "lr": 0.5}, model().named_parameters())
    assert first is not None and first.defaults["lr"] == 0.25
    assert second is not None and second.defaults["lr"] == 0.5


# ---------------------------------------------------------------------------------------------- the user's own


def test_a_target_gets_the_parameters() -> None:
    built = build({"_target_": "torch.optim.Adagrad", "lr": 0.3})
    assert isinstance(built, torch.optim.Adagrad) and built.defaults["lr"] == 0.3
    assert len(built.param_groups[0]["params"]) == 6


def test_a_partial_target_gets_the_parameters_afterwards() -> None:
    built = build({"_target_": "torch.optim.Adagrad", "_partial_": True, "lr": 0.3})
    assert isinstance(built, torch.optim.Adagrad) and len(built.param_groups[0]["params"]) == 6


def test_a_target_gets_plain_lists() -> None:
    built = build({"_target_": "torch.optim.NAdam", "lr": 0.3, "betas": [0.5, 0.6]})
    assert type(built.defaults["betas"]) in (list, tuple)


def test_a_callable_gets_the_parameters() -> None:
    built = build(functools.partial(torch.optim.SGD, lr=0.5))
    assert isinstance(built, torch.optim.SGD)


@pytest.mark.parametrize("node", [{"_target_": "builtins.list"}, lambda parameters: "no optimizer"])
def test_what_is_no_optimizer_is_refused(node: Any) -> None:
    with pytest.raises(ConfigError, match="is not a torch.optim.Optimizer"):
        build(node)


# ---------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "changes, asked, type_",
    [
        ({"name": "adamW"}, "optimizer.name=adamW", "optimizer.name=adamw"),
        ({"name": "lion"}, "optimizer.name=lion", "optimizer.name=adamw"),
        ({"name": None}, "optimizer.name=null", "optimizer.name=adamw"),
        ({"name": ["adamw"]}, "'optimizer.name=[adamw]'", "optimizer.name=adamw"),
        ({"lr": -1}, "optimizer.lr=-1", "optimizer.lr=0.001"),
        ({"lr": "fast"}, "optimizer.lr=fast", "optimizer.lr=0.001"),
        ({"lr": None}, "optimizer.lr=null", "optimizer.lr=0.001"),
        ({"lr": True}, "optimizer.lr=true", "optimizer.lr=0.001"),
        ({"lr": float("nan")}, "optimizer.lr=nan", "optimizer.lr=0.001"),
        ({"betas": [0.9]}, "'optimizer.betas=[0.9]'", "'optimizer.betas=[0.9,0.95]'"),
        ({"betas": [0.9, 1.0]}, "'optimizer.betas=[0.9,1.0]'", "'optimizer.betas=[0.9,0.95]'"),
        ({"betas": 0.9}, "optimizer.betas=0.9", "'optimizer.betas=[0.9,0.95]'"),
        ({"eps": 0}, "optimizer.eps=0", "optimizer.eps=1e-08"),
        ({"weight_decay": -0.1}, "optimizer.weight_decay=-0.1", "optimizer.weight_decay=0.0"),
        ({"decay_1d": "no"}, "optimizer.decay_1d=no", "optimizer.decay_1d=false"),
        ({"fused": 1}, "optimizer.fused=1", "optimizer.fused=null"),
        ({"momentum": 0.9}, "optimizer.momentum=0.9", "optimizer=sgd"),
        ({"weight_deacy": 0.1}, "optimizer.weight_deacy=0.1", "optimizer.weight_decay=0.1"),
        ({"zzz": 0.1}, "optimizer.zzz=0.1", "~optimizer.zzz"),
        ({"name": "sgd", "betas": [0.9, 0.95]}, "'optimizer.betas=[0.9,0.95]'", "optimizer=adamw"),
        ({"name": "sgd", "momentum": 1.5}, "optimizer.momentum=1.5", "optimizer.momentum=0.9"),
        ({"name": "sgd", "nesterov": True}, "optimizer.nesterov=true", "optimizer.nesterov=false"),
    ],
)
def test_a_wrong_setting_is_refused(changes: dict[str, Any], asked: str, type_: str) -> None:
    with pytest.raises(ConfigError) as error:
        build({"name": "adamw", "lr": 0.1, **changes})
    assert (error.value.asked, error.value.type) == (asked, type_)
    assert error.value.what and error.value.allowed
    OverridesParser.create().parse_override(*shlex.split(error.value.type))


def test_a_missing_rate_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        build({"name": "adamw"})
    assert error.value.type == "++optimizer.lr=0.001"


def test_all_wrong_settings_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        build({"name": "adamw", "lr": -1, "eps": -1, "zzz": 1})
    assert len(error.value.problems) == 3


def test_a_relocated_node_is_spelt_as_the_user_types_it() -> None:
    with pytest.raises(ConfigError) as error:
        build({"name": "adamw", "lr": -1, "momentum": 1}, spelling=Spelling("dist"))
    assert [problem.instead for problem in error.value.problems] == [
        "dist.optimizer.lr=0.001",
        "optimizer@dist.optimizer=sgd",
    ]


def test_a_word_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        build("adamw")
    assert error.value.asked == "optimizer=adamw"


def test_every_setting_offered_is_one_that_torch_takes() -> None:
    values = {"lr": 0.1, "betas": [0.9, 0.95], "momentum": 0.9, "eps": 1e-8}
    for name, settings in SETTINGS.items():
        for key in settings:
            value = values.get(key, None if key in ("foreach", "fused") else 0.0)
            value = False if key in ("decay_1d", "amsgrad", "nesterov", "maximize") else value
            build({"name": name, "lr": 0.1, key: value})


# ---------------------------------------------------------------------------------------------- DTensors


@pytest.fixture(scope="module")
def mesh() -> Iterator[Any]:
    """A real mesh of one rank with two axes."""
    if dist.is_initialized():
        pytest.skip("another process group is alive")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1, 1), mesh_dim_names=("dp", "tp"))
    dist.destroy_process_group()


def distributed(mesh: Any, which: str) -> list[tuple[str, torch.nn.Parameter]]:
    """Parameters of one mesh, of two meshes, or some plain ones among them; the same values each time."""
    torch.manual_seed(0)
    values = [torch.randn(4, 6), torch.randn(6), torch.randn(3, 4)]
    made = []
    for number, value in enumerate(values):
        if which == "plain" or (which == "mixed" and number == 1):
            tensor = value
        elif which == "two meshes" and number == 1:
            tensor = distribute_tensor(value, mesh["dp"], [Shard(0)])
        else:
            tensor = distribute_tensor(value, mesh, [Shard(0), Replicate()])
        made.append((f"p{number}", torch.nn.Parameter(tensor)))
    return made


def stepped(node: dict[str, Any], named: list[tuple[str, torch.nn.Parameter]]) -> list[torch.Tensor]:
    optimizer = build_optimizer(node, named)
    assert optimizer is not None
    for _ in range(3):
        for _, parameter in named:
            parameter.grad = parameter.detach() * 0.5
        optimizer.step()
    return [getattr(p, "full_tensor", lambda p=p: p)().detach() for _, p in named]


@pytest.mark.parametrize("which", ["one mesh", "two meshes", "mixed"])
@pytest.mark.parametrize("fast", [{}, {"foreach": True}, {"fused": True}, {"foreach": False}])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_distributed_parameters_are_updated_as_plain_ones(mesh: Any, which: str, fast: dict, name: str) -> None:
    node = {"name": name, "lr": 0.1, "weight_decay": 0.1, **fast}
    if name == "sgd" and fast.get("fused"):  # torch cannot
        with pytest.raises(ConfigError) as error:
            stepped(node, distributed(mesh, which))
        [key] = fast
        assert error.value.asked == f"optimizer.{key}=true" and error.value.type == f"optimizer.{key}=null"
        return
    got = stepped(node, distributed(mesh, which))
    want = stepped({**node, "fused": None, "foreach": False}, distributed(mesh, "plain"))
    for ours, theirs in zip(got, want):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("which", ["plain", "one mesh", "two meshes", "mixed"])
def test_the_update_is_fused_wherever_torch_can(mesh: Any, which: str) -> None:
    adamw = build_optimizer({"name": "adamw", "lr": 0.1}, distributed(mesh, which))
    sgd = build_optimizer({"name": "sgd", "lr": 0.1}, distributed(mesh, which))
    assert adamw is not None and sgd is not None
    assert adamw.defaults["fused"] is True and sgd.defaults["fused"] is None


def test_complex_parameters_are_not_fused() -> None:
    whole = [("w", torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64)))]
    optimizer = build_optimizer({"name": "adamw", "lr": 0.1}, whole)
    assert optimizer is not None and optimizer.defaults["fused"] is None


def test_groups_do_not_depend_on_the_layout(mesh: Any) -> None:
    node = {"name": "adamw", "lr": 0.1, "weight_decay": 0.1}
    sizes = []
    for which in ("plain", "one mesh", "two meshes", "mixed"):
        optimizer = build_optimizer(node, distributed(mesh, which))
        assert optimizer is not None
        sizes.append([len(group["params"]) for group in optimizer.param_groups])
    assert sizes == [[2, 1]] * 4
