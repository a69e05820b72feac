"""Every rule of a composed config, checked without starting anything."""

from nemo_dist_conf.composition.check import Checked, check

__all__ = ["Checked", "check"]
