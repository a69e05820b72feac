"""Qwen 3.5 with experts, its language model: recurrent layers among attentions."""

from __future__ import annotations

from nemo_dist_conf.families.mixers import HYBRID
from nemo_dist_conf.families.spec import Family

__all__ = ["FAMILY"]

FAMILY = Family(name="qwen3_5_moe_text", mixers=(HYBRID,))
