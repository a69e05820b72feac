"""A solved topology as torch device meshes, and what the rest of the runtime asks of them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.names import MeshAxisName as A
from nemo_dist_conf.runtime.process_group import choose_device, initialize_distributed
from nemo_dist_conf.runtime.torch_inside import flattened, group_timeout, name_flattened, set_group_timeout
from nemo_dist_conf.runtime.typed_configs import ParallelismSizes, typed_config
from nemo_dist_conf.strategies import STRATEGIES, Strategy, strategy_of_config
from nemo_dist_conf.topology.launched_ranks import launched
from nemo_dist_conf.topology.solve import MeshSpec, solve

__all__ = ["MeshContext", "fsdp_mesh"]

#: Names of several axes together, with the axes of a root mesh that they may join.
_JOINED = {
    A.DP: (A.DP_REPLICATE, A.DP_SHARD),
    A.DP_SHARD_CP: (A.DP_SHARD, A.CP),
    A.DP_CP: (A.DP, A.DP_REPLICATE, A.DP_SHARD, A.CP),
}

_GROUP = "the process group has {found} ranks"


@dataclass(frozen=True)
class MeshContext:
    """The device meshes of a run, and this rank's place in them.

    device_mesh: root mesh of the strategy (fsdp2: pp, dp_replicate, dp_shard, cp, tp). moe_mesh: ep_shard, ep
    over the same ranks. Without meshes every size is 1 and dp_size is None.
    sums_gradients: the strategy adds gradients over ranks instead of averaging them.
    ranks_without_mesh: (rank, number of ranks) of a context that was built before there was a process group, for a
    strategy that needs no mesh: DDP takes the group of all ranks, which wrapping the model starts.
    """

    device_mesh: DeviceMesh | None = None
    moe_mesh: DeviceMesh | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sums_gradients: bool = False
    ranks_without_mesh: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        known = {axis.value for axis in A}
        for name in ("device_mesh", "moe_mesh"):
            mesh = getattr(self, name)
            unknown = sorted(set(getattr(mesh, "mesh_dim_names", None) or ()) - known)
            if unknown:
                axes = ", ".join(sorted(known))
                raise ConfigError(
                    Problem(
                        what=f"{name} has axes of unknown name: {', '.join(unknown)}",
                        asked=name,
                        allowed=axes,
                        instead=f"{name}=None",
                    )
                )

    @classmethod
    def build(
        cls,
        strategy_config: Any,
        parallelism_sizes: ParallelismSizes | None = None,
        *,
        world_size: int | None = None,
        device: str | torch.device = "auto",
    ) -> MeshContext:
        """Meshes for these sizes on the current process group, which is started if there is none.

        For a strategy that needs no mesh none is started, and without one there is no mesh (``ranks_without_mesh``).
        Raises ConfigError where the sizes do not fit the strategy or the world size, and for what is no config.
        """
        strategy = _strategy_of(strategy_config)
        asked = typed_config(parallelism_sizes, ParallelismSizes, "parallelism") or ParallelismSizes()
        if world_size is None:
            world_size = dist.get_world_size() if dist.is_initialized() else launched().world_size
        spec = solve(dataclasses.asdict(asked), world_size, strategy.axes)  # refused before a process group is started
        return cls.of_spec(spec, strategy, strategy_config, device)

    @classmethod
    def of_spec(
        cls, spec: MeshSpec, strategy: Strategy, strategy_config: Any, device: str | torch.device = "auto"
    ) -> MeshContext:
        """The meshes of a solved topology on the current process group, which is started if there is none.

        For a strategy that needs no mesh none is started, and without one there is no mesh (``ranks_without_mesh``).
        Raises ConfigError where the ranks are not as many as the topology has.
        """
        if not strategy.needs_mesh and not dist.is_initialized():
            place = launched()
            if place.source != "none":
                _require(spec.world_size, place.world_size, "{found} ranks were started")
            return cls(device=choose_device(device, place.local_rank), ranks_without_mesh=(place.rank, spec.world_size))
        info = initialize_distributed(device=device)
        _require(spec.world_size, info.world_size, _GROUP)
        device_mesh, moe_mesh = _build_meshes(spec, info.device.type)
        sums = strategy.sums_gradients is not None and getattr(strategy_config, strategy.sums_gradients)
        return cls(device_mesh, moe_mesh, info.device, sums)

    @classmethod
    def from_meshes(
        cls, device_mesh: DeviceMesh | None, moe_mesh: DeviceMesh | None = None, *, sums_gradients: bool = False
    ) -> MeshContext:
        """A context around meshes that somebody else has built, with the axis names of a strategy's.

        Where device_mesh has all axes of a strategy, it answers to the names of several axes afterwards too ("dp",
        "dp_shard_cp", "dp_cp"). That makes a process group where two of their axes are above 1, so every rank has to
        call this. Raises ConfigError for axes of unknown name.
        """
        kind = "cpu" if device_mesh is None else device_mesh.device_type
        device = torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)
        context = cls(device_mesh, moe_mesh, device, sums_gradients)
        for strategy in STRATEGIES:
            if device_mesh is not None and strategy.axes.mesh == tuple(device_mesh.mesh_dim_names or ()):
                _name_joined(device_mesh, strategy.axes.flattened)
                break
        return context

    def size(self, axis: str, default: int | None = 1) -> int | None:
        """Ranks along an axis, or along several by their name together; ``default`` where no mesh has it."""
        for mesh in (self.device_mesh, self.moe_mesh):
            names = (mesh.mesh_dim_names or ()) if mesh is not None else ()
            if mesh is not None and axis in names:
                return mesh.size(names.index(axis))
        root = dict(_axes(self.device_mesh)) if self.device_mesh is not None else {}
        parts = [root[part] for part in _JOINED.get(A(axis), ()) if part in root] if axis in set(A) else []
        return prod(parts) if parts else default

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
        if self.ranks_without_mesh is not None:
            return self._all_ranks()[1]
        return None if self.device_mesh is None else self.size(A.DP)

    @property
    def world_size(self) -> int:
        if self.ranks_without_mesh is not None:
            return self._all_ranks()[1]
        return self.device_mesh.size() if self.device_mesh is not None else 1

    @property
    def is_main(self) -> bool:
        """Whether this is global rank 0, the one that prints and writes."""
        if dist.is_initialized():
            return dist.get_rank() == 0
        return self.ranks_without_mesh is None or self.ranks_without_mesh[0] == 0

    def _all_ranks(self) -> tuple[int, int]:
        """(rank, number of ranks) without a mesh; a group that was started since has to be as large as was said."""
        if self.ranks_without_mesh is None:
            return (0, 1)
        if dist.is_initialized():
            _require(self.ranks_without_mesh[1], dist.get_world_size(), _GROUP)
        return self.ranks_without_mesh

    @property
    def data_size(self) -> int:
        """Into how many parts the global batch is split; tp, cp and pp peers share a part."""
        return self.dp_size or 1

    @property
    def data_rank(self) -> int:
        """Which part of the global batch this rank reads."""
        rank = self._all_ranks()[0]
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
        from nemo_dist_conf.runtime.techniques.context.parallel import split_sequence

        return tuple(split_sequence(tensor, self.device_mesh[A.CP.value]) for tensor in tensors_BS)

    def sum_over_data(self, value: torch.Tensor) -> torch.Tensor:
        """The sum of ``value`` over the ranks that hold different tokens (data and cp), in place, without gradient.

        Each data axis is reduced in turn: exact, and no process group beyond the mesh's own is needed.
        """
        for group in self.data_groups():
            dist.all_reduce(value, group=group)
        return value

    def gather_over_data(self, rows: torch.Tensor) -> torch.Tensor:
        """What all data ranks have of a batch, in the order of its rows: [n, ...] -> [sum of n, ...]; no gradient.

        n may differ by rank. Ranks of cp and tp have the same rows as their data rank, and get the same.
        """
        rows = rows.detach()
        for group in self._row_groups():  # the inner axis first: that is how data ranks are counted
            sizes = torch.tensor([rows.size(0)], device=rows.device).repeat(dist.get_world_size(group))
            dist.all_gather_into_tensor(sizes, sizes[:1].clone(), group=group)
            counts = sizes.tolist()
            padded = rows.new_zeros(max(counts), *rows.shape[1:])
            padded[: rows.size(0)] = rows
            parts = [torch.empty_like(padded) for _ in counts]
            dist.all_gather(parts, padded, group=group)
            rows = torch.cat([part[:count] for part, count in zip(parts, counts)])
        return rows

    def _row_groups(self) -> list[dist.ProcessGroup | None]:
        """This rank's group along each axis above 1 whose ranks hold different rows, the innermost first."""
        if self.device_mesh is None:
            return self.data_groups()
        wide = [name for name, size in _axes(self.device_mesh) if size > 1]
        axes = (A.DP, A.DP_SHARD, A.DP_REPLICATE)
        return [self.device_mesh.get_group(axis.value) for axis in axes if axis in wide]

    def data_groups(self) -> list[dist.ProcessGroup | None]:
        """This rank's group along each axis above 1 whose ranks hold different tokens (data, cp); None: all ranks."""
        if self.device_mesh is None:
            return [None] if self._all_ranks()[1] > 1 else []
        wide = [name for name, size in _axes(self.device_mesh) if size > 1]
        axes = (A.DP, A.DP_SHARD, A.CP, A.DP_REPLICATE)
        return [self.device_mesh.get_group(axis.value) for axis in axes if axis in wide]

    def layout(self) -> str:
        """``dp_shard 2 x tp 2``: the axes above 1, outermost first; ``1 rank`` when there is none."""
        if self._all_ranks()[1] > 1:
            return f"{A.DP} {self._all_ranks()[1]}"
        meshes = [m for m in (self.device_mesh, self.moe_mesh) if m is not None]
        parts = [f"{name} {size}" for mesh in meshes for name, size in _axes(mesh) if size > 1 and name != A.EP_SHARD]
        return " x ".join(dict.fromkeys(parts)) or "1 rank"


def _strategy_of(config: Any) -> Strategy:
    found = strategy_of_config(config)
    if found is None:
        known = [strategy.config.__name__ for strategy in STRATEGIES]
        likely = next((s.config.__name__ for s in STRATEGIES if config is s.config or config in s.names), known[0])
        what, asked = f"{config!r} is no config of a strategy", f"MeshContext.build({config!r}, ...)"
        allowed = f"an object of {', '.join(known)}"
        raise ConfigError(
            Problem(what=what, asked=asked, allowed=allowed, instead=f"MeshContext.build({likely}(), ...)")
        )
    return found


def _require(world_size: int | None, found: int, where: str) -> None:
    if world_size is not None and world_size != found:
        what = f"world_size={world_size} was given, but {where.format(found=found)}"
        raise ConfigError(
            Problem(
                what=what, asked=f"world_size={world_size}", allowed=f"{found} or None", instead=f"world_size={found}"
            )
        )


def _axes(mesh: DeviceMesh) -> list[tuple[str, int]]:
    return [(name, mesh.size(i)) for i, name in enumerate(mesh.mesh_dim_names or ())]


def _build_meshes(spec: MeshSpec, device_type: str) -> tuple[DeviceMesh, DeviceMesh | None]:
    """The root mesh with its flattened names, and the MoE mesh where experts are split.

    A collective over all ranks: every rank calls it, with the same spec.
    """
    root = _mesh(device_type, spec.shape, spec.axes)
    _name_joined(root, spec.flattened)
    moe = _mesh(device_type, spec.moe_shape, spec.moe_axes) if spec.moe_axes else None
    return root, moe


def _name_joined(root: DeviceMesh, joined: tuple[tuple[str, tuple[str, ...]], ...]) -> None:
    """Let the root mesh answer to the names of several axes. A group is made only of ranks that have none yet."""
    sizes = dict(_axes(root))
    known: dict[tuple[str, ...], str] = {}
    for name, axes in joined:
        wide = tuple(axis for axis in axes if sizes[axis] > 1)
        if len(wide) < 2 or wide in known:
            name_flattened(root, known.get(wide, (wide or axes)[0]), name)
        else:
            _keep_timeout(flattened(root, axes, name))
        known.setdefault(wide, name)


def _keep_timeout(mesh: DeviceMesh) -> None:
    """Let collectives over every axis wait as long as those of all ranks; torch's own default would hold for them."""
    timeout = group_timeout()
    if timeout is None:
        return
    for group in mesh.get_all_groups():
        if group is not dist.group.WORLD:
            set_group_timeout(group, timeout)


def _mesh(device_type: str, shape: tuple[int, ...], axes: tuple[str, ...]) -> DeviceMesh:
    """``init_device_mesh``, but the axes of size 1 share one group, which each rank makes for itself.

    torch makes every rank's group of one on every rank, once for each such axis: with a strategy's five axes that is
    most of what meshes cost on a few ranks, and four times the number of ranks on many.
    """
    wide = [(size, axis) for size, axis in zip(shape, axes) if size > 1]
    if len(wide) == len(shape) or not wide:  # with a single rank all axes have the default group
        mesh = init_device_mesh(device_type, shape, mesh_dim_names=axes)
        _keep_timeout(mesh)
        return mesh
    sizes, names = zip(*wide)
    inner = init_device_mesh(device_type, sizes, mesh_dim_names=names)
    _keep_timeout(inner)
    alone = dist.new_group(
        [dist.get_rank()], timeout=group_timeout(), use_local_synchronization=True, group_desc="mesh_alone"
    )
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
    if shard == A.DP_SHARD_CP:
        joined = flattened(mesh, (A.DP_SHARD.value, A.CP.value), shard)
        return joined if sizes.get(A.DP_REPLICATE, 1) == 1 else mesh[A.DP_REPLICATE.value, shard]
    if sizes.get(A.DP_REPLICATE, 1) > 1:
        return mesh[A.DP_REPLICATE.value, shard]
    return mesh[shard]
