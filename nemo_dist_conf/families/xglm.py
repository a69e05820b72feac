"""XGLM: an attention of its own."""

from __future__ import annotations

from nemo_dist_conf.families.mixers import OWN_ATTENTION
from nemo_dist_conf.families.spec import Family

__all__ = ["FAMILY"]

FAMILY = Family(name="xglm", mixers=(OWN_ATTENTION,))
