"""Integers and names: sizes and a world size become a mesh specification. No torch."""

from nemo_dist_conf.topology.axes import AxisRules
from nemo_dist_conf.topology.paths import Paths
from nemo_dist_conf.topology.pipeline import pipeline_problems
from nemo_dist_conf.topology.solve import MeshSpec, size_problems, solve

__all__ = ["AxisRules", "MeshSpec", "Paths", "pipeline_problems", "size_problems", "solve"]
