"""Meshes and sizes, by the names of the API page."""

from nemo_dist_conf.names import MeshAxisName
from nemo_dist_conf.runtime.device_meshes import MeshContext
from nemo_dist_conf.runtime.typed_configs import ParallelismSizes

__all__ = ["MeshAxisName", "MeshContext", "ParallelismSizes"]
