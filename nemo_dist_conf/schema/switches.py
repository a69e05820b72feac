"""What stands beside the groups at the root of a composed tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from nemo_dist_conf.schema.option import option

__all__ = ["SwitchesConf"]


@dataclass
class SwitchesConf:
    """Switches beside the groups."""

    activation_checkpointing: Union[bool, str] = option(
        False, "true: recompute every block in backward; selective: keep matmuls and attention; false: keep all"
    )
    batch_statistics: str = option(
        "local",
        "of batch normalisation in training; local: a rank's own rows; global: the rows of all data ranks, in each "
        "microbatch, as in one process",
    )
