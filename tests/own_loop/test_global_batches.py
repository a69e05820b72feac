"""Rows of global batches: each once an epoch whatever the ranks, and none twice or never after a stop."""

import copy

import pytest
import torch
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.own_loop import GlobalBatches
from nemo_dist_conf.runtime.device_meshes import MeshContext
from tests.dist.pool import run_ranks


def ranks(count):
    """What each of so many data ranks knows of itself; no group is needed to read rows."""
    return [MeshContext(ranks_without_mesh=(rank, count)) for rank in range(count)]


def rows_of(count, rows, size, state=None, most=None, **settings) -> tuple[list[list[int]], dict[str, int]]:
    """(global batches as lists of rows that count, state after them) as ``count`` data ranks read them."""
    batches, states = [], []
    for mesh in ranks(count):
        mine = GlobalBatches(rows, size, mesh, **settings)
        if state is not None:
            mine.load_state_dict(state)
        read = []
        for (batch,) in mine.loader(TensorDataset(torch.arange(rows))):
            read.append(batch[mine.counted].tolist())
            if len(read) == most:
                break
        batches.append(read)
        states.append(mine.state_dict())
    assert all(each == states[0] for each in states)
    return [sum(parts, []) for parts in zip(*batches)], states[0]


@pytest.mark.parametrize("rows,size", [(12, 4), (13, 4), (3, 8), (8, 8), (17, 8)])
@pytest.mark.parametrize("last", ["pad", "drop"])
def test_every_row_comes_once_an_epoch_and_ranks_change_nothing(rows, size, last):
    settings = {"seed": 3, "epochs": 3, "last": last}
    alone, _ = rows_of(1, rows, size, **settings)
    for count in (2, 4):
        assert rows_of(count, rows, size, **settings)[0] == alone
    seen = torch.tensor(sum(alone, [])).bincount(minlength=rows)
    whole = rows * 3 if last == "pad" else rows * 3 // size * size
    assert seen.sum() == whole and seen.max() <= 3 and seen.min() >= (3 if last == "pad" else whole // rows)
    first: list[int] = sum(alone, [])[:rows]
    assert sorted(first) == list(range(rows)) and (rows < 8 or first != sorted(first))


def test_a_run_goes_on_with_the_next_unseen_row_on_other_ranks_and_in_other_batches():
    before, state = rows_of(4, 21, 8, most=1, seed=1)
    assert state["taken"] == 8
    after, end = rows_of(2, 21, 6, state=state, seed=1)
    assert sorted(sum(before + after, [])) == list(range(21)) and end["taken"] == 21
    assert rows_of(1, 21, 6, state=end, seed=1)[0] == []


@pytest.mark.parametrize("workers", [0, 2])
def test_what_workers_fetch_ahead_is_not_taken(workers):
    (mesh,) = ranks(1)
    batches = GlobalBatches(20, 2, mesh, shuffle=False)
    loader = batches.loader(TensorDataset(torch.arange(20)), num_workers=workers)
    read = []
    for (batch,) in loader:
        read += batch.tolist()
        if len(read) == 6:
            break
    assert batches.taken == 6 and len(batches) == len(loader) == 7
    read += [row for (batch,) in loader for row in batch.tolist()]  # goes on where the loop broke off
    assert read == list(range(20))
    batches.rewind()
    assert [row for (batch,) in loader for row in batch.tolist()] == list(range(20))


def test_a_loader_draws_nothing_from_the_generator_of_dropout():
    (mesh,) = ranks(1)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(GlobalBatches(8, 2, mesh).loader(TensorDataset(torch.arange(8)), num_workers=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_that_fill_up_a_batch_are_told_apart():
    meshes = ranks(4)
    counted, read = [], []
    for mesh in meshes:
        batches = GlobalBatches(9, 8, mesh, shuffle=False)
        for (batch,) in batches.loader(TensorDataset(torch.arange(9))):
            last, rows = batches.counted, batch
        counted += last.tolist()
        read += rows.tolist()
    assert counted == [True] + 7 * [False] and read[0] == 8 and set(read) <= set(range(9))


def test_without_end_there_is_no_length_and_the_epoch_is_counted():
    (mesh,) = ranks(1)
    batches = GlobalBatches(4, 3, mesh, epochs=None)
    loader = batches.loader(TensorDataset(torch.arange(4)))
    for _, _batch in zip(range(5), loader):
        pass
    assert batches.taken == 15 and batches.epoch == 3
    with pytest.raises(TypeError, match="has no end"):
        len(batches)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(range(4))


class NoLength(Dataset):
    def __getitem__(self, index):
        return index


@pytest.mark.parametrize(
    ("settings", "count", "instead"),
    [
        ({"size": 6}, 4, "size=4"),
        ({"size": 2}, 4, "size=4"),
        ({"size": 0}, 1, "size=1"),
        ({"size": 2.0}, 1, "size=1"),
        ({"size": 4, "rows": 0}, 1, "rows=1"),
        ({"size": 4, "epochs": 0}, 1, "epochs=1"),
        ({"size": 4, "last": "short"}, 1, 'last="pad"'),
        ({"size": 16, "last": "drop"}, 1, 'last="pad"'),
    ],
)
def test_batches_that_cannot_be_are_refused_with_what_can(settings, count, instead):
    with pytest.raises(ConfigError) as caught:
        GlobalBatches(settings.pop("rows", 10), settings.pop("size"), ranks(count)[0], **settings)
    assert caught.value.type == instead


@pytest.mark.parametrize("dataset", [Stream(), NoLength(), TensorDataset(torch.arange(9))])
def test_a_dataset_without_these_rows_is_refused(dataset):
    with pytest.raises(ConfigError):
        GlobalBatches(10, 2, ranks(1)[0]).loader(dataset)


@pytest.mark.parametrize("option", ["batch_size", "shuffle", "sampler", "batch_sampler", "drop_last"])
def test_what_says_rows_a_second_time_is_refused(option):
    with pytest.raises(ConfigError, match=option):
        GlobalBatches(10, 2, ranks(1)[0]).loader(TensorDataset(torch.arange(10)), **{option: None})


@pytest.mark.parametrize("other", [{"rows": 11}, {"seed": 1}, {"shuffle": False}])
def test_a_state_of_other_rows_or_of_another_order_is_refused(other):
    (mesh,) = ranks(1)
    state = GlobalBatches(10, 2, mesh).state_dict()
    settings = {"rows": 10, **other}
    changed = GlobalBatches(settings.pop("rows"), 2, mesh, **settings)
    before = copy.deepcopy(changed.state_dict())
    with pytest.raises(ConfigError):
        changed.load_state_dict(state)
    assert changed.state_dict() == before


# ---------------------------------------------------------------------------------------------- between ranks


def gathered(sizes: dict[str, int], strategy: str) -> list[float]:
    from nemo_dist_conf import DistributedSetup, ParallelismSizes

    mesh = DistributedSetup.build(strategy, ParallelismSizes(**sizes)).mesh_context
    rows = torch.arange(mesh.data_rank + 1) + 10.0 * mesh.data_rank  # another number of rows on each rank
    return mesh.gather_over_data(rows.requires_grad_()).tolist()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("strategy", "sizes", "data_ranks"),
    [
        ("fsdp2", {"dp_replicate_size": 2}, 4),
        ("fsdp2", {"tp_size": 2}, 2),
        ("fsdp2", {"cp_size": 4}, 1),
        ("ddp", {}, 4),
    ],
    ids=["hsdp", "tp", "cp", "ddp"],
)
def test_rows_of_all_data_ranks_are_gathered_in_order(strategy, sizes, data_ranks):
    whole = [10.0 * rank + row for rank in range(data_ranks) for row in range(rank + 1)]
    assert run_ranks(4, gathered, sizes, strategy) == [whole] * 4


class OfTwo(Exception):
    """Does not come back from pickle."""

    def __init__(self, one, two):
        super().__init__(f"{one}{two}")


def from_rank_0(kind: str) -> str:
    import torch.distributed as dist

    from nemo_dist_conf.own_loop import from_main

    def make():
        if kind == "unpicklable":
            raise OfTwo("a", "b")
        if kind == "value":
            return {"rank": dist.get_rank(), "tensor": torch.ones(2)}
        if kind == "no pickle":
            return lambda: None
        raise ValueError("no such file")

    try:
        made = from_main(make)
        return f"{made['rank']} {made['tensor'].tolist()}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.dist
def test_what_rank_0_makes_or_meets_all_ranks_have():
    assert run_ranks(2, from_rank_0, "value") == ["0 [1.0, 1.0]"] * 2
    assert run_ranks(2, from_rank_0, "error") == ["ValueError: no such file"] * 2
    assert run_ranks(2, from_rank_0, "unpicklable") == ["OfTwo: ab", "RuntimeError: on rank 0: OfTwo: ab"]
    assert all("pickle" in text for text in run_ranks(2, from_rank_0, "no pickle"))
