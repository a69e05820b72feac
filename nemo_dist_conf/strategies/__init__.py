"""One file per strategy, and the registry of them. Torch is imported by the managers only, when they act."""

from nemo_dist_conf.strategies.registry import STRATEGIES, find_strategy, strategy_names, strategy_of_target
from nemo_dist_conf.strategies.spec import Strategy

__all__ = ["STRATEGIES", "Strategy", "find_strategy", "strategy_names", "strategy_of_target"]
