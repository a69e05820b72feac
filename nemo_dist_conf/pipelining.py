"""Pipeline settings by the name of the API page, and the pipeline that they make of a model."""

from nemo_dist_conf.runtime.configs import PipelineConfig
from nemo_dist_conf.runtime.pipeline import Pipeline

__all__ = ["Pipeline", "PipelineConfig"]
