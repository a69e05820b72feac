"""All strategies, by name and alias.

One of ours is a file in this package and a line in names.STRATEGY_NAMES. Another package adds one by an entry point in
the group ``nemo_dist_conf.strategies``: ``name = module:STRATEGY``, where STRATEGY is a ``Strategy`` of that name.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

from nemo_dist_conf.entry_points import AddedRows
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.names import STRATEGY_NAMES, nearest
from nemo_dist_conf.strategies.spec import Strategy
from nemo_dist_conf.wording import Spelling

__all__ = ["STRATEGIES", "added_strategy_names", "find_strategy", "strategy_names", "strategy_of_target"]

STRATEGIES: tuple[Strategy, ...]

_OURS = [name for strategy, aliases in STRATEGY_NAMES.items() for name in (strategy, *aliases)]
_ADDED = AddedRows("nemo_dist_conf.strategies", Strategy, "strategy", _OURS)


@functools.cache
def _load(name: str) -> Strategy:
    strategy: Strategy = importlib.import_module(f"nemo_dist_conf.strategies.{name}").STRATEGY
    return strategy


def __getattr__(name: str) -> Any:
    """STRATEGIES when it is first asked for: composing needs the chosen one only."""
    if name != "STRATEGIES":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = (*map(_load, STRATEGY_NAMES), *_ADDED.all())
    return globals()[name]


def added_strategy_names() -> tuple[str, ...]:
    """Names of the strategies that other packages add."""
    return _ADDED.names()


def strategy_names() -> list[str]:
    """Every name that selects a strategy, aliases included."""
    return [*_OURS, *_ADDED.names()]


def find_strategy(name: str, spelling: Spelling = Spelling()) -> Strategy:
    """The strategy of this name or alias. Raises ConfigError, the nearest name first."""
    for strategy, aliases in STRATEGY_NAMES.items():
        if name in (strategy, *aliases):
            return _load(strategy)
    added = _ADDED.find(name)
    if added is not None:
        return added
    known = strategy_names()
    likely = nearest(name, known)
    ordered = likely + [k for k in known if k not in likely]
    raise ConfigError(
        Problem(
            what=f"there is no strategy {name!r}",
            asked=spelling.choose("strategy", name),
            allowed=", ".join(ordered),
            instead=spelling.choose("strategy", (likely or ["fsdp2"])[0]),
        )
    )


def strategy_of_target(target: str) -> Strategy | None:
    """The strategy whose typed config a class path names, one of ours by any module that passes it on; else None."""
    package, _, rest = target.partition(".")
    name = rest.rpartition(".")[2]
    ours = [strategy for strategy in map(_load, STRATEGY_NAMES) if strategy.target.startswith(f"{package}.")]
    if ours:
        return next((strategy for strategy in ours if strategy.target.endswith(f".{name}")), None)
    return next((strategy for strategy in _ADDED.all() if strategy.target == target), None)
