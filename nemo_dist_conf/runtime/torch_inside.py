"""What torch does not publish and cannot be done without: each with version, reason, and the test that breaks."""

from __future__ import annotations

from torch.distributed.device_mesh import DeviceMesh

__all__ = ["root_mesh"]


def root_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The mesh that a mesh was cut out of or flattened from, with all axes; itself where there is none.

    torch 2.11 to 2.13: a flattened mesh (dp_shard_cp) does not tell how large the axes are that went into it.
    Test: tests/checkpoint/test_objects.py, test_a_ranks_own_state_needs_ranks_that_are_laid_out_alike.
    """
    return mesh._get_root_mesh()
