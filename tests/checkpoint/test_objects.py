"""What goes on with a run beside its model: saved in parts or once, and filled as it lies where it is loaded."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from nemo_dist_conf.checkpoint import Checkpoints, load, save
from nemo_dist_conf.checkpoint.tensor_file import TensorFile
from nemo_dist_conf.errors import ConfigError, DataError
from nemo_dist_conf.instantiate import instantiate
from tests.checkpoint.beside import BESIDE, LAYOUTS, Ema, difference, go_on, save_beside, two
from tests.checkpoint.small import bits, make, train
from tests.dist.layouts import composed
from tests.dist.pool import run_ranks

#: Kinds that know their tensors by name: under every layout from every layout.
BY_NAME = ["averaged weights by name", "the package's EMA", "a second model and its optimizer"]
TWO = ["ddp 2", "fsdp2 2", "tp 2", "pp 2", "megatron zero 3, 2 ranks"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(folder, what rank 0 saw) of every layout of two ranks."""
    root = tmp_path_factory.mktemp("beside")
    return root, {name: run_ranks(2, save_beside, LAYOUTS[name], root / name)[0] for name in TWO}


@pytest.mark.dist
@pytest.mark.parametrize("layout", ["1 rank", *TWO])
def test_objects_come_back_under_every_layout(saved: Any, layout: str) -> None:
    """Bit for bit where tensors have names; by number alone too, but for what a pipeline's ranks number themselves."""
    root, there = saved
    sources = [(name, kind) for name in TWO for kind in BESIDE if not isinstance(there[name][kind], ConfigError)]
    found = run_ranks(LAYOUTS[layout].ranks, go_on, LAYOUTS[layout], [(root / name, kind) for name, kind in sources])[0]
    for (name, kind), loaded in zip(sources, found, strict=True):
        ways = {name, layout}
        by_number = kind not in BY_NAME and len(ways) == 2 and "pp 2" in ways
        if by_number or (kind == "averaged weights in a list" and "megatron" in layout):
            assert isinstance(loaded, DataError | ConfigError), (name, kind)
        else:
            assert not isinstance(loaded, Exception), (name, kind, loaded)
            assert difference(there[name][kind], loaded) == 0.0, (name, kind)


@pytest.mark.dist
def test_what_a_library_cuts_in_its_own_way_is_known_by_name_only(saved: Any) -> None:
    refused = saved[1]["megatron zero 3, 2 ranks"]["averaged weights in a list"]
    assert isinstance(refused, ConfigError) and "ema[0] is a DTensor that was cut in a way" in refused.what
    assert "named_parameters()" in refused.type


def _written(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """(the index, what each rank's file tells of objects)."""
    files = sorted(folder.glob("rank_*.safetensors"))
    return json.loads((folder / "index.json").read_text()), [TensorFile(file).metadata["objects"] for file in files]


@pytest.mark.dist
def test_plain_tensors_are_written_once_and_sharded_ones_in_parts(saved: Any) -> None:
    root, _ = saved
    index, texts = _written(root / "ddp 2" / "averaged weights by name")
    entry = index["objects/ema.copies['lm_head.weight']"]
    assert len(entry["parts"]) == 1 and texts == ["{}", "{}"]
    index, texts = _written(root / "fsdp2 2" / "averaged weights by name")
    parts = index["objects/ema.copies['lm_head.weight']"]["parts"]
    assert [sizes for _, _, sizes in parts] == [[49, 48], [48, 48]] and texts == ["{}", "{}"]


# ------------------------------------------------------------------------------------------------- a rank's own


class Position:
    """A data loader: its own state on each rank."""

    def __init__(self) -> None:
        self.state: Any = {"rank": dist.get_rank(), "order": torch.full((3,), dist.get_rank())}

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def _save_position(layout: str, folder: Path) -> None:
    with two(LAYOUTS[layout], 1) as (model, _, _, _):
        save(folder, model, objects={"loader": Position()})


def _load_position(layout: str, folder: Path) -> Any:
    with two(LAYOUTS[layout], 1) as (model, _, _, _):
        loader = Position()
        loader.state = None
        load(folder, model, objects={"loader": loader})
        return loader.state["rank"], loader.state["order"].tolist()


@pytest.mark.dist
def test_a_ranks_own_state_needs_ranks_that_are_laid_out_alike(tmp_path: Path) -> None:
    """Two data ranks are the same two under any strategy; two ranks of tensor parallelism read the same rows."""
    run_ranks(2, _save_position, "fsdp2 2", tmp_path / "one")
    for layout in ("fsdp2 2", "ddp 2"):
        assert run_ranks(2, _load_position, layout, tmp_path / "one") == [(0, [0, 0, 0]), (1, [1, 1, 1])]
    for layout in ("1 rank", "tp 2", "pp 2"):
        with pytest.raises(DataError, match="'loader' was another on each of the 2 ranks") as refused:
            run_ranks(LAYOUTS[layout].ranks, _load_position, layout, tmp_path / "one")
        assert "2 ranks on the same layout" in refused.value.allowed
    run_ranks(4, _save_position, "cp 2 x dp 2", tmp_path / "four")
    assert run_ranks(4, _load_position, "cp 2 x dp 2", tmp_path / "four")[3] == (3, [3, 3, 3])
    with pytest.raises(DataError, match="'loader' was another"):
        run_ranks(4, _load_position, "fsdp2 4", tmp_path / "four")


def _other_names(folder: Path) -> None:
    save(folder, nn.Linear(2, 2), objects={"all": 1, **({"some": 2} if dist.get_rank() else {})})


def _one_wrong(folder: Path) -> None:
    save(folder, nn.Linear(2, 2), objects={"log": Path("x") if dist.get_rank() else 1})


@pytest.mark.dist
def test_what_is_wrong_on_one_rank_is_told_by_all(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the same on all ranks, and rank 0 has no 'some'"):
        run_ranks(2, _other_names, tmp_path / "one")
    with pytest.raises(ConfigError, match="on rank 1: log is a PosixPath"):
        run_ranks(2, _one_wrong, tmp_path / "one")
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ in their time


def _asynchronous(folder: Path) -> tuple[bool, bool]:
    with two(LAYOUTS["fsdp2 2"], 1) as (model, optimizer, _, _), Checkpoints(folder, asynchronous=True) as checkpoints:
        ema = Ema(model)
        before = {name: copy.full_tensor() for name, copy in ema.copies.items()}
        checkpoints.save(1, model, optimizer, objects={"ema": ema})
        for copy in ema.copies.values():
            copy.zero_()
        checkpoints.wait()
        states = load(folder, model).objects["ema"]["copies"]
        load(folder, model, objects={"ema": ema})
        whole = all(torch.equal(states[name], before[name]) for name in before)
        return whole, all(torch.equal(copy.full_tensor(), before[name]) for name, copy in ema.copies.items())


@pytest.mark.dist
def test_an_asynchronous_save_keeps_objects_of_its_step(tmp_path: Path) -> None:
    """And what is asked for without an object comes whole."""
    assert run_ranks(2, _asynchronous, tmp_path) == [(True, True)] * 2


def _second_statistics(folder: Path) -> list[float]:
    """A second model under ddp whose running statistics are each rank's own."""
    cfg = composed("strategy=ddp")
    _, model, _ = instantiate(cfg, model=functools.partial(nn.Linear, 2, 2))
    _, critic, _ = instantiate(cfg, model=lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))
    statistics = critic.module[1].running_mean
    statistics.fill_(float(dist.get_rank()))
    save(folder, model, objects={"critic": critic})
    here = float(statistics[0])
    statistics.zero_()
    load(folder, model, objects={"critic": critic})
    return [here, float(statistics[0])]


@pytest.mark.dist
def test_statistics_of_a_second_model_are_made_equal_as_the_firsts(tmp_path: Path) -> None:
    assert run_ranks(2, _second_statistics, tmp_path / "one") == [[0.5, 0.5]] * 2


def _after_evaluation(folder: Path) -> bool:
    """Models whose last forward had no backward, so that fully_shard left them whole."""
    cfg = composed("strategy=fsdp2", "strategy.mp_policy=null")
    _, model, _ = instantiate(cfg, model=functools.partial(nn.Linear, 2, 3))
    _, critic, its = instantiate(cfg, model=functools.partial(nn.Linear, 2, 3), optimizer=torch.optim.AdamW)
    critic(torch.ones(1, 2)).sum().backward()
    its.step()
    expected = critic.weight.full_tensor().clone()

    def evaluate() -> None:
        with torch.no_grad():
            model(torch.ones(1, 2)), critic(torch.ones(1, 2))

    evaluate()
    assert not isinstance(critic.weight, DTensor)
    save(folder, model, objects={"critic": critic, "its": its})
    critic.weight.detach().zero_()
    evaluate()
    load(folder, model, objects={"critic": critic, "its": its})
    return torch.equal(critic.weight.full_tensor(), expected)


@pytest.mark.dist
def test_models_that_were_evaluated_before_are_saved_and_filled(tmp_path: Path) -> None:
    assert run_ranks(2, _after_evaluation, tmp_path / "one") == [True, True]


def _made_later(folder: Path) -> None:
    with two(LAYOUTS["fsdp2 2"], 1) as (model, _, _, _):
        ema = Ema(model)
        save(folder, model, objects={"ema": ema})
        ema.copies = {}
        load(folder, model, objects={"ema": ema})


@pytest.mark.dist
def test_an_object_without_its_tensors_cannot_say_how_they_lie(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="was sharded when it was saved, and 'ema' has no such tensor"):
        run_ranks(2, _made_later, tmp_path / "one")


def _own_cuts(folder: Path) -> dict[str, list[float]]:
    """DTensors that people make themselves, cut twice along one dimension; into other cuts, and into one piece."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    values = torch.arange(7.0)
    twice, once = [Shard(0), Shard(0)], [Replicate(), Shard(0)]
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    cut = {"x": distribute_tensor(values, mesh, twice), "y": distribute_tensor(values, mesh, once)}
    save(folder, model, objects={"cut": Held(cut)})
    other = {"x": distribute_tensor(values * 0, mesh, once), "y": distribute_tensor(values * 0, mesh, twice)}
    target = Held(other)
    restored = load(folder, model, objects={"cut": target})
    found = {f"{k}, here": v.full_tensor().tolist() for k, v in target.state.items()}
    return {**found, **{k: v.tolist() for k, v in restored.objects["cut"].items()}}


class Held:
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


@pytest.mark.dist
def test_dtensors_of_any_cut(tmp_path: Path) -> None:
    for found in run_ranks(4, _own_cuts, tmp_path / "one"):
        assert set(map(tuple, found.values())) == {tuple(range(7))} and len(found) == 4


def _summands(folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    part = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    save(folder, nn.Linear(1, 1), objects={"sums": Held({"grad": part})})


# -------------------------------------------------------------------------------------------------- one process


@pytest.mark.dist
def test_a_sum_over_ranks_that_is_not_made_yet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"sums\.grad is a DTensor of which each rank holds a summand"):
        run_ranks(2, _summands, tmp_path / "one")


def test_a_second_model_and_optimizers_of_both(tmp_path: Path) -> None:
    """As the parts of one network with two optimizers, and an optimizer whose model is not given."""
    first, second = make(), make(width=5)
    train(*first, 0, 2), train(*second, 0, 3)
    objects = {"critic": second[0], "of critic": second[1], "more": make(torch.optim.SGD, momentum=0.9)[1]}
    save(tmp_path / "one", *first, objects=objects)
    expected = bits(second[0])
    going_on = train(*second, 3, 5)
    again, others = make(), make(width=5)
    train(*others, 7, 8)
    load(tmp_path / "one", *again, objects={"critic": others[0], "of critic": others[1]})
    assert bits(others[0]) == expected and train(*others, 3, 5) == going_on

    with pytest.raises(DataError, match="'of critic'. was saved beside its model, and holds parameters of no model"):
        load(tmp_path / "one", *again, objects={"of critic": others[1]})
    with pytest.raises(DataError, match="was an optimizer when it was saved, and is a module"):
        load(tmp_path / "one", *again, objects={"of critic": others[0]})
    with pytest.raises(DataError, match="'critic'.: .*of other shape .0.bias: .5., here .8."):
        load(tmp_path / "one", *again, objects={"critic": make()[0]})
    with pytest.raises(DataError, match="'more'. has other parameters than when it was saved"):
        load(tmp_path / "one", *again, objects={"more": make(torch.optim.SGD, 9, momentum=0.9)[1]})
    with pytest.raises(DataError, match="'more'. was SGD when it was saved, and is AdamW"):
        load(tmp_path / "one", *again, objects={"more": make()[1]})


def test_an_optimizer_of_a_stranger_is_refused(tmp_path: Path) -> None:
    """What it holds would be lost; a module that the parameters belong to goes in among the objects."""
    model, head = make()[0], nn.Linear(2, 2)
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=0.1)
    for parameter in (*model.parameters(), *head.parameters()):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    with pytest.raises(ConfigError, match="neither of the model nor of a module among the objects"):
        save(tmp_path / "one", model, optimizer)
    save(tmp_path / "one", model, optimizer, objects={"head": head})
    expected = optimizer.state[head.weight]["exp_avg"].clone()
    optimizer.state.clear()
    load(tmp_path / "one", model, optimizer, objects={"head": head})
    assert torch.equal(optimizer.state[head.weight]["exp_avg"], expected)


class Scaled(nn.Module):
    """A module that keeps something by itself."""

    def __init__(self, scale: Any = None) -> None:
        super().__init__()
        self.scale = scale
        self.weight = nn.Parameter(torch.ones(1))

    def get_extra_state(self) -> Any:
        return self.scale

    def set_extra_state(self, state: Any) -> None:
        self.scale = state


def test_what_modules_keep_by_themselves_comes_back(tmp_path: Path) -> None:
    """It stood in state_dict() and was left out without a word."""
    model = nn.Sequential(Scaled({"scale": 2.5, "history": torch.arange(3)}), Scaled(torch.ones(2)))
    save(tmp_path / "one", model, objects={"second": Scaled((1, 2))})
    again: Any = nn.Sequential(Scaled(), Scaled())
    second = Scaled()
    found = load(tmp_path / "one", again, objects={"second": second})
    assert again[0].scale["scale"] == 2.5 and again[0].scale["history"].tolist() == [0, 1, 2]
    assert again[1].scale.tolist() == [1, 1] and second.scale == (1, 2) and list(found.objects) == ["second"]
    with pytest.raises(ConfigError, match="_extra_state.* is a PosixPath"):
        save(tmp_path / "two", nn.Sequential(Scaled(Path("x"))))


class Counting(nn.Module):
    """A module whose state is no parameter or buffer, as those of metrics are."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self.total = torch.zeros(())

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {"seen": list(self.seen), "total": self.total.clone()}

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen, self.total = state_dict["seen"], state_dict["total"]


def test_a_module_with_a_state_of_its_own_kind_is_given_it(tmp_path: Path) -> None:
    """Filling what it returned would change a copy; as the model itself, it is refused."""
    counts, again = Counting(), Counting()
    counts.seen, counts.total = [torch.ones(2), torch.zeros(1)], torch.tensor(3.0)
    save(tmp_path / "one", make()[0], objects={"counts": counts})
    load(tmp_path / "one", make()[0], objects={"counts": again})
    assert again.total == 3.0 and [len(one) for one in again.seen] == [2, 1]
    with pytest.raises(ConfigError, match=r"seen stands in the model's state_dict\(\) and is none of its parameters"):
        save(tmp_path / "two", counts)


def _on_one_rank(folder: Path) -> float:
    """Averaged weights that rank 0 alone keeps, whole."""
    model = nn.Linear(2, 2)
    average = nn.Linear(2, 2) if dist.get_rank() == 0 else None
    if average is not None:
        nn.init.constant_(average.weight, 5.0)
    save(folder, model, objects={"average": average})
    if average is not None:
        nn.init.zeros_(average.weight)
    load(folder, model, objects={"average": average})
    return float(average.weight.sum()) if average is not None else 0.0


@pytest.mark.dist
def test_an_object_that_one_rank_has(tmp_path: Path) -> None:
    assert run_ranks(2, _on_one_rank, tmp_path / "one") == [20.0, 0.0]


def test_tensors_that_cannot_be_kept_are_named(tmp_path: Path) -> None:
    wrong: dict[str, Any] = {
        "sparse_coo": torch.ones(2, 2).to_sparse(),
        "on meta": torch.ones(2, device="meta"),
        "complex32": torch.ones(2, dtype=torch.complex32),
        "quint8": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.quint8),
    }
    for word, value in wrong.items():
        with pytest.raises(ConfigError, match=rf"more\['a\.b'\] is .*{word}"):
            save(tmp_path / "one", nn.Linear(1, 1), objects={"more": {"a.b": value}})
    model = nn.Linear(1, 1)
    model.register_buffer("angles", torch.ones(2, dtype=torch.complex32))
    with pytest.raises(ConfigError, match=r"model\.angles is of dtype complex32"):
        save(tmp_path / "one", model)
    with pytest.raises(ConfigError, match=r"all\[0\] is a AdamW") as refused:
        save(tmp_path / "one", model, objects={"all": [make()[1]]})
    assert "objects={'a name': all[0], ...}" == refused.value.type
    assert not list(tmp_path.iterdir())


def test_what_is_offered_for_a_value_keeps_its_numbers(tmp_path: Path) -> None:
    itself: dict[str, Any] = {}
    itself["more"] = itself
    offered: list[tuple[Any, str]] = [
        (torch.ones(2, dtype=torch.complex128), "torch.view_as_real(more.a)"),
        (torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.quint8), "more.a.dequantize()"),
        (torch.ones(2).to(torch.float8_e4m3fnuz), "more.a.float()"),
        (numpy.ones(2), "torch.as_tensor(more.a)"),
        (numpy.float32(1), "more.a.item()"),
        (torch.Generator(), "more.a.get_state()"),
        (nn.LazyLinear(2).weight, "model(torch.zeros(...)) before it is saved"),
        (itself, "objects without 'more'"),
    ]
    for value, instead in offered:
        with pytest.raises(ConfigError) as refused:
            save(tmp_path / "one", nn.Linear(1, 1), objects={"more": {"a": value}})
        assert refused.value.type == instead
    kept = {"a": torch.ones(100, 100)}
    save(tmp_path / "two", nn.Linear(1, 1), objects={"more": kept})
    with pytest.raises(DataError, match="which cannot be filled") as not_filled:
        load(tmp_path / "two", nn.Linear(1, 1), objects={"more": kept})
    assert not_filled.value.asked == "objects={'more': a dict}"


def test_dtypes_and_shapes_of_every_kind(tmp_path: Path) -> None:
    """Complex numbers, views of their conjugates, unsigned ones, empty and single ones."""
    state: dict[str, Any] = {
        "angles": torch.tensor([1 + 2j, 3 - 1j]),
        "conjugate": torch.tensor([1 + 2j]).conj(),
        "unsigned": torch.tensor([7], dtype=torch.uint32),
        "empty": torch.empty(0, 3),
        "one": torch.tensor(3.0),
        "a.b": [torch.ones(2), (torch.zeros(1), {3: torch.ones(1)})],
        "every second": torch.arange(6)[::2],
    }
    model = nn.Linear(1, 1)
    model.register_buffer("none", torch.empty(0, 2))
    save(tmp_path / "one", model, objects={"more": state})
    target = Held(None)
    whole = load(tmp_path / "one", model, objects={"more": target}).objects["more"]
    for found in (target.state, whole):
        assert torch.equal(found["angles"], state["angles"]) and found["conjugate"].tolist() == [1 - 2j]
        assert found["unsigned"].tolist() == [7] and found["empty"].shape == (0, 3) and found["one"] == 3.0
        assert found["a.b"][1][1][3].tolist() == [1] and found["every second"].tolist() == [0, 2, 4]
    with pytest.raises(DataError, match="'more'. is a dict, which cannot be filled") as refused:
        load(tmp_path / "one", model, objects={"more": {}})
    assert refused.value.type == "load(folder, model, ...).objects['more']"


def test_wrappers_inside_a_module_leave_no_name(tmp_path: Path) -> None:
    """An average of a wrapped model is the average of the model."""
    from torch.optim.swa_utils import AveragedModel

    from nemo_dist_conf.runtime.engines.ddp_wrappers import OneRankDDP

    plain, wrapped = AveragedModel(make()[0]), AveragedModel(OneRankDDP(make()[0], torch.device("cpu")))
    for parameter in wrapped.parameters():
        parameter.detach().add_(1.0)
    save(tmp_path / "one", make()[0], objects={"average": wrapped})
    load(tmp_path / "one", make()[0], objects={"average": plain})
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True))
