"""Pipeline settings, by the name of the API page."""

from nemo_dist_conf.runtime.typed_configs import PipelineConfig

__all__ = ["PipelineConfig"]
