"""DistributedSetup.build and MeshContext on real ranks, and on the fake process group where ranks are many."""

import dataclasses

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from nemo_dist_conf import (
    ConfigError,
    DistributedSetup,
    FSDP2Config,
    MeshContext,
    MoEParallelizerConfig,
    ParallelismSizes,
    PipelineConfig,
)
from tests.dist.pool import run_ranks

pytestmark = pytest.mark.dist


def facts(context: MeshContext) -> dict:
    names = ("pp_size", "tp_size", "cp_size", "ep_size", "dp_size", "dp_replicate_size", "dp_shard_size")
    return {name: getattr(context, name) for name in (*names, "pp_enabled", "world_size", "data_rank", "data_size")}


def build(**sizes):
    """Facts of this rank's meshes, and the ranks that a sum over the data axes reaches."""
    strategy = sizes.pop("strategy", "fsdp2")
    setup = DistributedSetup.build(strategy, ParallelismSizes(**sizes))
    context = setup.mesh_context
    reached = torch.zeros(torch.distributed.get_world_size())
    reached[torch.distributed.get_rank()] = 1
    context.sum_over_data(reached)
    return facts(context), context.layout(), reached.nonzero().flatten().tolist()


@pytest.mark.parametrize(
    ("sizes", "layout", "data_ranks", "reached_by_rank_0"),
    [
        (dict(strategy="ddp"), "dp 4", [0, 1, 2, 3], [0, 1, 2, 3]),
        (dict(), "dp_shard 4", [0, 1, 2, 3], [0, 1, 2, 3]),
        (dict(dp_replicate_size=2), "dp_replicate 2 x dp_shard 2", [0, 1, 2, 3], [0, 1, 2, 3]),
        (dict(tp_size=2), "dp_shard 2 x tp 2", [0, 0, 1, 1], [0, 2]),
        (dict(tp_size=4), "tp 4", [0, 0, 0, 0], [0]),
        (dict(pp_size=2), "pp 2 x dp_shard 2", [0, 1, 0, 1], [0, 1]),
        (dict(cp_size=2), "dp_shard 2 x cp 2", [0, 0, 1, 1], [0, 1, 2, 3]),
        (dict(ep_size=2), "dp_shard 4 x ep 2", [0, 1, 2, 3], [0, 1, 2, 3]),
        (dict(strategy="mfsdp", tp_size=2), "dp 2 x tp 2", [0, 0, 1, 1], [0, 2]),
    ],
    ids=str,
)
def test_meshes_of_four_ranks(sizes, layout, data_ranks, reached_by_rank_0):
    found = run_ranks(4, build, **sizes)
    assert [found[rank][1] for rank in range(4)] == [layout] * 4
    assert [found[rank][0]["data_rank"] for rank in range(4)] == data_ranks
    assert found[0][2] == reached_by_rank_0
    sizes.pop("strategy", None)
    for name, size in sizes.items():
        assert all(found[rank][0][name] == size for rank in range(4)), name
    assert all(found[rank][0]["world_size"] == 4 for rank in range(4))
    assert found[0][0]["data_size"] == found[0][0]["dp_size"] == max(data_ranks) + 1


def groups_by_axis(**sizes):
    """Of every axis its group's name and ranks, what a sum over it gives, and the same for torch's own mesh."""
    context = DistributedSetup.build("fsdp2", ParallelismSizes(**sizes)).mesh_context
    found = {}
    for mesh in (context.device_mesh, context.moe_mesh):
        for axis in mesh.mesh_dim_names if mesh is not None else ():
            group, ones = mesh.get_group(axis), torch.ones(1)
            dist.all_reduce(ones, group=group)
            usual = init_device_mesh("cpu", mesh.shape, mesh_dim_names=mesh.mesh_dim_names)
            assert mesh.get_coordinate() == usual.get_coordinate() and (mesh.mesh == usual.mesh).all()
            assert mesh[axis].get_group() is group
            assert dist.get_process_group_ranks(group) == dist.get_process_group_ranks(usual.get_group(axis))
            found[mesh, axis] = group.group_name, mesh.size(mesh.mesh_dim_names.index(axis)), ones.item()
    return {(names.ndim, axis): value for (names, axis), value in found.items()}


@pytest.mark.parametrize(
    "sizes", [dict(), dict(tp_size=2), dict(tp_size=4), dict(pp_size=2, ep_size=2), dict(cp_size=2, ep_size=4)], ids=str
)
def test_axes_of_one_rank_share_one_group_and_the_others_have_the_ranks_that_torch_gives_them(sizes):
    for found in run_ranks(4, groups_by_axis, **sizes):
        assert all(total == size for _, size, total in found.values())
        alone = {name for name, size, _ in found.values() if size == 1}
        wide = {name for name, size, _ in found.values() if size > 1}
        assert len(alone) <= 2 and not alone & wide  # the root mesh's and the experts'
        assert sum(size == 1 for _, size, _ in found.values()) > len(alone) or not alone


def flattened_sizes():
    mesh = DistributedSetup.build("fsdp2", ParallelismSizes(cp_size=2)).mesh_context.device_mesh
    from nemo_dist_conf.runtime.mesh import fsdp_mesh

    hsdp = DistributedSetup.build("fsdp2", ParallelismSizes(dp_replicate_size=2)).mesh_context.device_mesh
    return fsdp_mesh(mesh).size(), fsdp_mesh(mesh).ndim, fsdp_mesh(hsdp).mesh_dim_names


def test_parameters_are_sharded_over_context_ranks_too_and_two_axes_mean_hsdp():
    assert run_ranks(4, flattened_sizes) == [(4, 1, ("dp_replicate", "dp_shard"))] * 4


def policies():
    made = DistributedSetup.build(
        FSDP2Config(sequence_parallel=True),
        ParallelismSizes(pp_size=2, ep_size=2),
        {"pp_schedule": "gpipe"},
        {"wrap_outer_model": False},
        activation_checkpointing="selective",
        world_size=4,
    )
    bare = DistributedSetup.build("fsdp2", ParallelismSizes(pp_size=2, ep_size=2))
    return made.pipeline_config, made.moe_parallel_config, made.strategy_config, bare.pipeline_config


def test_configs_are_resolved_and_filled_where_an_axis_needs_them():
    pipeline, moe, strategy, bare = run_ranks(4, policies)[0]
    assert pipeline == PipelineConfig(pp_schedule="gpipe")
    assert moe == MoEParallelizerConfig(wrap_outer_model=False)
    assert strategy.sequence_parallel and strategy.activation_checkpointing == "selective"
    assert bare == PipelineConfig()


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        (dict(strategy="fdsp2"), "no strategy 'fdsp2'"),
        (dict(parallelism_sizes=ParallelismSizes(tp_size=3), world_size=4), "world size 4"),
        (dict(strategy="ddp", parallelism_sizes=ParallelismSizes(tp_size=2), world_size=2), "strategy=ddp"),
        (dict(pipeline_config=PipelineConfig()), "pp_size is 1"),
        (dict(moe_parallel_config={}), "ep_size is 1"),
        (dict(pipeline_config={"schedule": "gpipe"}, parallelism_sizes=ParallelismSizes(pp_size=2)), "schedule"),
        (dict(activation_checkpointing="some"), "not a mode"),
        (dict(strategy="mfsdp", activation_checkpointing="selective"), "not a mode of strategy=megatron_fsdp"),
        (
            dict(strategy=FSDP2Config(activation_checkpointing=True), activation_checkpointing="selective"),
            "two different answers",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_before_a_process_group_is_started(kwargs, words):
    assert not torch.distributed.is_initialized()
    with pytest.raises(ConfigError, match=words):
        DistributedSetup.build(**kwargs)
    assert not torch.distributed.is_initialized()


def wrong_world():
    try:
        DistributedSetup.build("fsdp2", world_size=4)
    except ConfigError as error:
        return str(error)


def test_a_world_size_that_is_not_the_groups_is_refused():
    assert "the process group has 2 ranks" in run_ranks(2, wrong_world)[0]


def test_without_meshes_sizes_are_one_and_dp_size_is_none():
    assert facts(MeshContext()) == dict(
        pp_size=1, tp_size=1, cp_size=1, ep_size=1, dp_size=None, dp_replicate_size=None, dp_shard_size=1,
        pp_enabled=False, world_size=1, data_rank=0, data_size=1,
    )
    assert dataclasses.is_dataclass(MeshContext)


def fake_ranks(world_size: int, rank: int, sizes: dict) -> dict:
    """Facts of one rank of many, on torch's fake process group: real DeviceMeshes, no other process."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        return facts(DistributedSetup.build("fsdp2", ParallelismSizes(**sizes)).mesh_context)
    finally:
        dist.destroy_process_group()
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def test_a_thousand_ranks_are_placed_by_the_closed_form():
    sizes = dict(pp_size=4, dp_replicate_size=2, tp_size=8, cp_size=2, ep_size=16)
    for rank in (0, 7, 8, 16, 517, 1023):
        found = run_ranks(1, fake_ranks, 1024, rank, sizes)[0]
        # Outermost first: pp 4, dp_replicate 2, dp_shard 8, cp 2, tp 8.
        dp = 1024 // (4 * 2 * 8)
        assert found["data_rank"] == rank // (2 * 8) % dp
        assert (found["dp_size"], found["dp_shard_size"], found["world_size"]) == (dp, dp // 2, 1024)
        assert all(found[name] == size for name, size in sizes.items())
