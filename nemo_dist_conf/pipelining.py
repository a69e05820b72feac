"""Pipeline settings, by the name of the API page."""

from nemo_dist_conf.runtime.configs import PipelineConfig

__all__ = ["PipelineConfig"]
