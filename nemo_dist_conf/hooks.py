"""The callback that composed trees name."""

from nemo_dist_conf.composition.callback import DistributedCallback

__all__ = ["DistributedCallback"]
