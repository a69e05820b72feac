"""Groups of ranks in closed form, against torch's meshes and against counting."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from nemo_dist_conf.plan.rank_groups import Groups, all_groups, groups_of
from nemo_dist_conf.strategies import find_strategy
from nemo_dist_conf.topology.solve import MeshSpec, solve
from tests.dist.pool import close_pools, run_ranks
from tests.plan.fake import fake_rank


def mesh(world_size: int, **sizes: int) -> MeshSpec:
    asked = {"dp_size": None, "dp_replicate_size": sizes.get("dp_replicate")}
    asked |= {f"{axis}_size": sizes.get(axis, 1) for axis in ("tp", "pp", "cp", "ep")}
    return solve(asked, world_size, find_strategy("fsdp2").axes)


MESHES = {
    8: mesh(8, pp=2, tp=2),
    64: mesh(64, pp=2, dp_replicate=2, tp=2, cp=2, ep=4),
    1024: mesh(1024, pp=4, tp=8, cp=2),
    131_072: mesh(131_072, pp=16, dp_replicate=8, tp=8, cp=2),
}


def groups_of_torch(spec: MeshSpec, rank: int) -> dict[str, list[int]]:
    """On one fake rank of many: the ranks of every group that it is in."""
    with fake_rank(rank, spec.world_size):
        root = init_device_mesh("cpu", spec.shape, mesh_dim_names=spec.axes)
        found: dict[str, Any] = {axis: root.get_group(axis) for axis in spec.axes}
        for name, axes in spec.flattened:
            if sum(spec.size(axis) > 1 for axis in axes) > 1:
                found[name] = root[axes]._flatten(name).get_group()
        if spec.moe_axes:
            moe = init_device_mesh("cpu", spec.moe_shape, mesh_dim_names=spec.moe_axes)
            found |= {axis: moe.get_group(axis) for axis in spec.moe_axes if axis not in spec.axes}
        return {name: dist.get_process_group_ranks(group) for name, group in found.items()}


@pytest.mark.dist
@pytest.mark.parametrize("world_size", MESHES)
def test_groups_are_those_of_torch(world_size: int) -> None:
    spec = MESHES[world_size]
    for rank in {0, world_size - 1, *((world_size // 3,) if world_size < 10_000 else ())}:
        close_pools()
        found = run_ranks(1, groups_of_torch, spec, rank)[0]
        assert {axis: groups_of(spec, axis, 8).members(rank) for axis in found} == found


@pytest.mark.parametrize("per_node", [1, 2, 3, 4, 8, 16])
@pytest.mark.parametrize("spec", [MESHES[8], MESHES[64], mesh(24, tp=2, pp=3), mesh(12, cp=3)], ids=str)
def test_nodes_are_counted_right(spec: MeshSpec, per_node: int) -> None:
    for group in all_groups(spec, per_node):
        firsts = list(group.firsts())
        members = [group.members(first) for first in firsts]
        assert sorted(rank for ranks in members for rank in ranks) == list(range(spec.world_size))
        assert len(members) == group.count and {len(ranks) for ranks in members} == {group.size}
        nodes = [{rank // per_node for rank in ranks} for ranks in members]
        assert group.inside_nodes == (max(map(len, nodes)) == 1)
        assert group.ranks_on_a_node == sum(rank // per_node == 0 for rank in members[0])


def test_a_million_ranks_are_no_more_work_than_eight() -> None:
    spec = mesh(1_000_000, pp=10, tp=8, cp=5)
    tp, shard = groups_of(spec, "tp", 8), groups_of(spec, "dp_shard", 8)
    assert (tp.inside_nodes, tp.count) == (True, 125_000)
    assert (shard.size, shard.nodes, shard.ranks_on_a_node) == (2500, 2500, 1)
    assert shard.members(999_999)[-1] == 999_999


def test_an_axis_of_one_has_groups_of_one() -> None:
    assert groups_of(mesh(8), "tp", 8) == Groups("tp", 8, (), 8)
    assert groups_of(mesh(8), "tp", 8).members(5) == [5]
