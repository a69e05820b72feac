"""What a user types: torch-free structured configs, one module per config group."""

from nemo_dist_conf.schema.moe import MoEConf
from nemo_dist_conf.schema.option import Documented, documented, option
from nemo_dist_conf.schema.parallelism import ParallelismConf
from nemo_dist_conf.schema.pipeline import PipelineConf, RoundVirtualStages
from nemo_dist_conf.schema.policies import MixedPrecisionConf, OffloadConf
from nemo_dist_conf.schema.switches import SwitchesConf

__all__ = [
    "Documented",
    "MixedPrecisionConf",
    "MoEConf",
    "OffloadConf",
    "ParallelismConf",
    "PipelineConf",
    "RoundVirtualStages",
    "SwitchesConf",
    "documented",
    "option",
]
