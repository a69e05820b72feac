"""What torch does not publish of meshes and process groups."""

from __future__ import annotations

import copy
import datetime
import os
from pathlib import Path
from typing import Any, Sequence

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

__all__ = [
    "flattened",
    "gloo_threads",
    "group_timeout",
    "name_flattened",
    "overlap_tensor_parallel",
    "root_mesh",
    "set_group_timeout",
]


def flattened(mesh: DeviceMesh, axes: Sequence[str], name: str) -> DeviceMesh:
    """The axes of a root mesh as one of that name, on a group of its own that is made the first time.

    torch 2.11 to 2.13: there is no other way to one axis over the ranks of several.
    Test: tests/dist/test_setup.py, test_names_of_several_axes_answer_whatever_the_sizes.
    """
    return mesh[tuple(axes)]._flatten(name)


def name_flattened(root: DeviceMesh, axis: str, name: str) -> None:
    """Let ``root[name]`` be the ranks of an axis that the mesh has already, flattened or not, on that axis's group.

    A mesh that has the name already is left as it is.

    torch 2.11 to 2.13: ``_flatten`` makes a second group of the same ranks, or, of axes of one rank each, a group for
    every rank on every rank.
    Test: tests/dist/test_setup.py, test_names_of_several_axes_answer_whatever_the_sizes.
    """
    if name in root._flatten_mapping:
        return
    found = root._flatten_mapping.get(axis)
    named = copy.copy(found if found is not None else root[axis])
    named._mesh_dim_names, named._hash = (name,), None
    if hasattr(named._layout, "coalesce"):  # torch 2.11 has a plain number where a name can be taken out of its root
        named._layout = named._layout.coalesce()
    root._flatten_mapping[name] = named


def root_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that a mesh was cut out of or flattened from, with all axes; itself where there is none.

    torch 2.11 to 2.13: a flattened mesh (dp_shard_cp) does not tell how large the axes are that went into it.
    Test: tests/checkpoint/test_objects.py, test_a_ranks_own_state_needs_ranks_that_are_laid_out_alike.
    """
    return mesh._get_root_mesh()


def gloo_threads() -> list[Path]:
    """The threads of this process that run gloo's collectives, as folders of /proc; none where there is no /proc.

    torch 2.11 to 2.13 name them so (ProcessGroupGloo.cpp, runLoop) and give no other way to them: a process group
    lives on in meshes and models after ``destroy_process_group``, and gloo's has no ``shutdown``.
    Test: tests/runtime/test_interpreter_exit.py.
    """
    found = []
    try:
        for number in os.listdir("/proc/self/task"):
            folder = Path("/proc/self/task", number)
            if folder.joinpath("comm").read_text().strip() == "pt_gloo_runloop":
                found.append(folder)
    except OSError:  # no such system, or a thread that has just ended
        return found
    return found


def group_timeout(group: dist.ProcessGroup | None = None) -> datetime.timedelta | None:
    """How long a collective of a group, by default of all ranks, may wait; None where its backend has no such time.

    torch 2.11 to 2.13: what was given to init_process_group cannot be asked for otherwise, and groups that are made
    later, those of a mesh among them, do not take it over.
    Test: tests/dist/test_setup.py, test_every_group_of_the_meshes_has_the_timeout_of_the_process_group.
    """
    group = group or dist.group.WORLD
    if group is None or dist.get_backend(group) == "fake":
        return None
    for device in group._device_types:
        timeout = getattr(getattr(group._get_backend(device), "options", None), "_timeout", None)
        if timeout is not None:
            return timeout
    return None


def set_group_timeout(group: dist.ProcessGroup, timeout: datetime.timedelta) -> None:
    """Let collectives of this group wait so long.

    torch 2.11 to 2.13: init_device_mesh takes a timeout only with options of a backend, and then makes a new group
    where all ranks have one already.
    Test: tests/dist/test_setup.py, test_every_group_of_the_meshes_has_the_timeout_of_the_process_group.
    """
    dist.distributed_c10d._set_pg_timeout(timeout, group)


def overlap_tensor_parallel(group_name: Any) -> None:
    """Let compiled code split matrix products so that they overlap with the collectives of a group, which is set up.

    torch 2.11 to 2.13: a setting of the compiler with an underscore; torch 2.11 needs the group set up, 2.13 does not.
    Test: tests/dist/test_fields.py, test_async_tensor_parallelism_is_refused_without_a_gpu; tests/gpu/test_cuda.py.
    """
    import torch._inductor.config as inductor
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    inductor._micro_pipeline_tp = True
    enable_symm_mem_for_group(group_name)
