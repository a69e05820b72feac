"""Which ranks form which group, and which groups stay inside a node: in closed form, for any number of ranks.

A mesh lays ranks out row-major, its last axis fastest, as torch's init_device_mesh does.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Iterator, Sequence

from nemo_dist_conf.topology.solve import MeshSpec

__all__ = ["Groups", "all_groups", "groups_of"]


@dataclass(frozen=True)
class Groups:
    """All groups of one axis. steps: (size, stride) of each mesh axis that it is made of, outermost first.

    size: ranks of a group. count: groups. nodes: that a group of the most spread kind touches. local: ranks of a
    group that share a node with its first one, the least of all groups.
    """

    axis: str
    world_size: int
    steps: tuple[tuple[int, int], ...]
    ranks_per_node: int

    @property
    def size(self) -> int:
        return prod(size for size, _ in self.steps)

    @property
    def count(self) -> int:
        return self.world_size // self.size

    def offsets(self) -> list[int]:
        """Offsets of a group's ranks from its first one, in order."""
        found = [0]
        for size, stride in self.steps:
            found = [base + index * stride for base in found for index in range(size)]
        return found

    def first_of(self, rank: int) -> int:
        """The first rank of the group that ``rank`` is in."""
        return rank - sum((rank // stride % size) * stride for size, stride in self.steps)

    def members(self, rank: int) -> list[int]:
        """The ranks of the group that ``rank`` is in, in order."""
        first = self.first_of(rank)
        return [first + offset for offset in self.offsets()]

    def firsts(self) -> Iterator[int]:
        """The first rank of every group, in order."""
        return (rank for rank in range(self.world_size) if self.first_of(rank) == rank)

    @property
    def inside_nodes(self) -> bool:
        """Whether every group stays inside one node."""
        span = sum((size - 1) * stride for size, stride in self.steps) + 1
        if span > self.ranks_per_node:
            return False
        if self.ranks_per_node >= self.world_size:
            return True
        # All starting places repeat with the block that holds a whole group.
        block = max((size * stride for size, stride in self.steps), default=1)
        return self.ranks_per_node % block == 0 or all(
            self.first_of(rank) // self.ranks_per_node == (self.first_of(rank) + span - 1) // self.ranks_per_node
            for rank in range(min(self.world_size, block * self.ranks_per_node))
        )

    @property
    def ranks_on_a_node(self) -> int:
        """Ranks of the group on the node of its first rank: so many adapters carry what leaves the node."""
        return sum(offset < self.ranks_per_node for offset in self.offsets_near())

    def offsets_near(self) -> list[int]:
        """The offsets below ranks_per_node; so a group of thousands need not be listed."""
        found = [0]
        for size, stride in self.steps:
            near = min(size, -(-self.ranks_per_node // stride))
            found = [base + index * stride for base in found for index in range(near)]
        return [offset for offset in found if offset < self.ranks_per_node]

    @property
    def nodes(self) -> int:
        """Nodes that a group touches."""
        return 1 if self.inside_nodes else max(2, self.size // max(1, self.ranks_on_a_node))


def groups_of(mesh: MeshSpec, axis: str, ranks_per_node: int) -> Groups:
    """The groups of a root, flattened or MoE axis; of one rank each where the mesh lacks it."""
    roots = dict(_steps(mesh.axes, mesh.shape))
    moe = dict(_steps(mesh.moe_axes, mesh.moe_shape))
    if axis in roots:
        steps: tuple[tuple[int, int], ...] = (roots[axis],)
    elif axis in moe:
        steps = (moe[axis],)
    else:
        steps = tuple(roots[name] for name in dict(mesh.flattened).get(axis, ()))
    return Groups(axis, mesh.world_size, tuple(step for step in steps if step[0] > 1), ranks_per_node)


def all_groups(mesh: MeshSpec, ranks_per_node: int) -> list[Groups]:
    """The groups of every axis above 1: root axes, then flattened ones that join several, then those of experts.

    A flattened axis with the same ranks as one before it is left out.
    """
    found = [groups_of(mesh, axis, ranks_per_node) for axis, size in zip(mesh.axes, mesh.shape) if size > 1]
    for name, axes in mesh.flattened:
        group = groups_of(mesh, name, ranks_per_node)
        if sum(mesh.size(axis) > 1 for axis in axes) > 1 and all(group.steps != known.steps for known in found):
            found.append(group)
    moe = [(axis, size) for axis, size in zip(mesh.moe_axes, mesh.moe_shape) if axis not in mesh.axes]
    return found + [groups_of(mesh, axis, ranks_per_node) for axis, size in moe if size > 1]


def _steps(axes: Sequence[str], shape: Sequence[int]) -> Iterator[tuple[str, tuple[int, int]]]:
    for index, axis in enumerate(axes):
        yield axis, (shape[index], prod(shape[index + 1 :]))
