"""Jamba: recurrent layers among attentions."""

from __future__ import annotations

from nemo_dist_conf.families.mixers import HYBRID
from nemo_dist_conf.families.spec import Family

__all__ = ["FAMILY"]

FAMILY = Family(name="jamba", mixers=(HYBRID,))
