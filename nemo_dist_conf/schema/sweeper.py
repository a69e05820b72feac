"""The options of ``hydra/sweeper=layouts``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Optional

from nemo_dist_conf.schema.option import option

__all__ = ["LayoutsConf"]


@dataclass
class LayoutsConf:
    """The fastest layouts that a plan finds for the launcher's ranks, run one after the other."""

    top: int = option(3, "layouts that are run")
    hardware: Optional[str] = option(None, "profile of the ranks' machine; null: cpu, where there is no GPU")
