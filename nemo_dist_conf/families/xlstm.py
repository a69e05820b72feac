"""xLSTM: recurrent layers."""

from __future__ import annotations

from nemo_dist_conf.families.mixers import RECURRENT
from nemo_dist_conf.families.spec import Family

__all__ = ["FAMILY"]

FAMILY = Family(name="xlstm", mixers=(RECURRENT,))
