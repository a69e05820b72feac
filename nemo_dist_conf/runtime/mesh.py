"""A solved topology as torch device meshes, and what the rest of the runtime asks of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.names import MeshAxisName as A
from nemo_dist_conf.topology.solve import MeshSpec

if TYPE_CHECKING:
    from nemo_dist_conf.runtime.configs import ParallelismSizes

__all__ = ["MeshContext", "build_meshes", "fsdp_mesh"]


@dataclass(frozen=True)
class MeshContext:
    """The device meshes of a run, and this rank's place in them.

    device_mesh: root mesh of the strategy (fsdp2: pp, dp_replicate, dp_shard, cp, tp). moe_mesh: ep_shard, ep
    over the same ranks. Without meshes every size is 1 and dp_size is None.
    sums_gradients: the strategy adds gradients over ranks instead of averaging them.
    """

    device_mesh: DeviceMesh | None = None
    moe_mesh: DeviceMesh | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sums_gradients: bool = False

    def __post_init__(self) -> None:
        known = {axis.value for axis in A}
        for name in ("device_mesh", "moe_mesh"):
            mesh = getattr(self, name)
            unknown = sorted(set(getattr(mesh, "mesh_dim_names", None) or ()) - known)
            if unknown:
                axes = ", ".join(sorted(known))
                raise ConfigError(
                    Problem(f"{name} has axes of unknown name: {', '.join(unknown)}", name, axes, f"{name}=None")
                )

    @classmethod
    def build(
        cls,
        strategy_config: Any,
        parallelism_sizes: ParallelismSizes | None = None,
        world_size: int | None = None,
        device: str | torch.device = "auto",
    ) -> MeshContext:
        """Meshes for these sizes on the current process group, which is started if there is none.

        Raises ConfigError where the sizes do not fit the strategy or the world size.
        """
        import dataclasses

        from nemo_dist_conf.runtime.configs import ParallelismSizes
        from nemo_dist_conf.runtime.process_group import initialize_distributed
        from nemo_dist_conf.strategies import STRATEGIES
        from nemo_dist_conf.topology.solve import solve

        sizes = dataclasses.asdict(parallelism_sizes or ParallelismSizes())
        strategy = next(s for s in STRATEGIES if isinstance(strategy_config, s.config))
        expected = world_size
        if expected is not None:  # refuse before a process group is started
            solve(sizes, expected, strategy.axes)
        info = initialize_distributed(device=device)
        if expected is not None and expected != info.world_size:
            what = f"world_size={expected} was given, but the process group has {info.world_size} ranks"
            raise ConfigError(
                Problem(what, f"world_size={expected}", f"{info.world_size} or None", f"world_size={info.world_size}")
            )
        spec = solve(sizes, info.world_size, strategy.axes)
        device_mesh, moe_mesh = build_meshes(spec, info.device.type)
        return cls(device_mesh, moe_mesh, info.device, getattr(strategy_config, "calculate_per_token_loss", False))

    def size(self, axis: str, default: int | None = 1) -> int | None:
        """Ranks along a root or MoE axis; ``default`` where no mesh has it."""
        for mesh in (self.device_mesh, self.moe_mesh):
            names = (mesh.mesh_dim_names or ()) if mesh is not None else ()
            if mesh is not None and axis in names:
                return mesh.size(names.index(axis))
        return default

    @property
    def pp_size(self) -> int:
        return self.size(A.PP) or 1

    @property
    def pp_enabled(self) -> bool:
        return self.pp_size > 1

    @property
    def tp_size(self) -> int:
        return self.size(A.TP) or 1

    @property
    def cp_size(self) -> int:
        return self.size(A.CP) or 1

    @property
    def ep_size(self) -> int:
        return self.size(A.EP) or 1

    @property
    def dp_replicate_size(self) -> int | None:
        """Replicas of the sharded model; None where the mesh has no such axis."""
        return self.size(A.DP_REPLICATE, None)

    @property
    def dp_shard_size(self) -> int:
        return self.size(A.DP_SHARD) or 1

    @property
    def dp_size(self) -> int | None:
        """Data-parallel ranks, replicas and shards together; None without a mesh."""
        if self.device_mesh is None:
            return None
        if A.DP in (self.device_mesh.mesh_dim_names or ()):
            return self.size(A.DP)
        return (self.dp_replicate_size or 1) * self.dp_shard_size

    @property
    def world_size(self) -> int:
        return self.device_mesh.size() if self.device_mesh is not None else 1

    @property
    def is_main(self) -> bool:
        """Whether this is global rank 0, the one that prints and writes."""
        return not dist.is_initialized() or dist.get_rank() == 0

    @property
    def data_size(self) -> int:
        """Into how many parts the global batch is split; tp, cp and pp peers share a part."""
        return self.dp_size or 1

    @property
    def data_rank(self) -> int:
        """Which part of the global batch this rank reads."""
        rank = 0
        for axis in (A.DP, A.DP_REPLICATE, A.DP_SHARD):
            if self.device_mesh is not None and axis in (self.device_mesh.mesh_dim_names or ()):
                rank = rank * (self.size(axis) or 1) + self.device_mesh.get_local_rank(axis.value)
        return rank

    @property
    def gradient_size(self) -> int:
        """Ranks over which gradients are averaged: data ranks, and the cp ranks that share their rows.

        1 where they are added.
        """
        return 1 if self.sums_gradients else self.data_size * self.cp_size

    def split_sequence(self, *tensors_BS: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """This rank's part of each row, [B, S] -> [B, S / cp]: of input ids and, in the same way, of labels."""
        if self.cp_size == 1 or self.device_mesh is None:
            return tensors_BS
        from nemo_dist_conf.runtime.context_parallel import split_sequence

        return tuple(split_sequence(tensor, self.device_mesh[A.CP.value]) for tensor in tensors_BS)

    def sum_over_data(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of ``value`` over the ranks that hold different tokens (data and cp), in place, without gradient.

        Each data axis is reduced in turn: exact, and no process group beyond the mesh's own is needed.
        """
        for group in self.data_groups():
            dist.all_reduce(value, group=group)
        return value

    def data_groups(self) -> list[dist.ProcessGroup]:
        """This rank's group along each axis above 1 whose ranks hold different tokens (data and cp)."""
        mesh, axes = self.device_mesh, (A.DP, A.DP_SHARD, A.CP, A.DP_REPLICATE)
        return [] if mesh is None else [mesh.get_group(axis.value) for axis in axes if (self.size(axis) or 1) > 1]

    def layout(self) -> str:
        """``dp_shard 2 x tp 2``: the axes above 1, outermost first; ``1 rank`` when there is none."""
        meshes = [m for m in (self.device_mesh, self.moe_mesh) if m is not None]
        parts = [f"{name} {size}" for mesh in meshes for name, size in _axes(mesh) if size > 1 and name != A.EP_SHARD]
        return " x ".join(dict.fromkeys(parts)) or "1 rank"


def _axes(mesh: DeviceMesh) -> list[tuple[str, int]]:
    return [(name, mesh.size(i)) for i, name in enumerate(mesh.mesh_dim_names or ())]


def build_meshes(spec: MeshSpec, device_type: str) -> tuple[DeviceMesh, DeviceMesh | None]:
    """The root mesh with its flattened names, and the MoE mesh where experts are split.

    A collective over all ranks: every rank calls it, with the same spec.
    """
    root = _mesh(device_type, spec.shape, spec.axes)
    for name, axes in spec.flattened:
        # One axis above 1 has a group already; flattening it again would only make a second.
        if sum(spec.size(axis) > 1 for axis in axes) > 1:
            root[axes]._flatten(name)
    moe = _mesh(device_type, spec.moe_shape, spec.moe_axes) if spec.moe_axes else None
    return root, moe


def _mesh(device_type: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> DeviceMesh:
    """``init_device_mesh``, but the axes of size 1 share one group, which each rank makes for itself.

    torch makes every rank's group of one on every rank, once for each such axis: with a strategy's five axes that is
    most of what meshes cost on a few ranks, and four times the number of ranks on many.
    """
    wide = [(size, axis) for size, axis in zip(shape, axes) if size > 1]
    if len(wide) == len(shape) or not wide:  # with a single rank all axes have the default group
        return init_device_mesh(device_type, shape, mesh_dim_names=axes)
    sizes, names = zip(*wide)
    inner = init_device_mesh(device_type, sizes, mesh_dim_names=names)
    alone = dist.new_group([dist.get_rank()], use_local_synchronization=True, group_desc="mesh_alone")
    groups = [inner.get_group(axis) if size > 1 else alone for size, axis in zip(shape, axes)]
    return DeviceMesh.from_group(groups, device_type, mesh=inner.mesh.view(shape), mesh_dim_names=axes)


def fsdp_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh to hand to fully_shard: 1-D over all shards, 2-D (replicate, shard) only for real HSDP.

    A raw 2-D (dp_shard, cp) mesh would be taken for HSDP and cost dp_shard times the memory.
    """
    names = mesh.mesh_dim_names or ()
    if A.DP_SHARD not in names:
        return mesh
    sizes = dict(_axes(mesh))
    shard = A.DP_SHARD_CP.value if sizes[A.DP_SHARD] > 1 and sizes.get(A.CP, 1) > 1 else A.DP_SHARD.value
    if sizes[A.DP_SHARD] == 1 and sizes.get(A.CP, 1) > 1:
        shard = A.CP.value
    if sizes.get(A.DP_REPLICATE, 1) > 1:
        return mesh[A.DP_REPLICATE.value, shard]
    return mesh[shard]
