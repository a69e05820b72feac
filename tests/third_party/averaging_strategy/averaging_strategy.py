"""A strategy from outside the package: every rank trains by itself, and parameters are averaged every n steps.

Source: Zinkevich et al., Parallelized Stochastic Gradient Descent (2010); Stich, Local SGD Converges Fast (2019).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping, Union

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.schema.option import option
from nemo_dist_conf.strategies import Strategy
from nemo_dist_conf.topology.axes import AxisRules
from nemo_dist_conf.wording import Spelling


@dataclass
class AveragingConf:
    """Ranks train by themselves and average their parameters every few steps."""

    activation_checkpointing: Union[bool, str] = option(False, "true or full: recompute every block; false: keep all")
    every: int = option(1, "steps of each rank between two averages")


def _rules(conf: Mapping[str, Any], sizes: Mapping[str, Any], spelling: Spelling) -> list[Problem]:
    if conf["every"] >= 1:
        return []
    return [
        Problem(
            what=f"every={conf['every']} is not a number of steps",
            asked=spelling.set("strategy.every", conf["every"]),
            allowed="1 or more",
            instead=spelling.set("strategy.every", 1),
        )
    ]


STRATEGY = Strategy(
    name="averaging",
    schema=AveragingConf,
    typed="averaging_strategy:AveragingConf",
    axes=AxisRules(
        strategy="averaging",
        allowed=frozenset({"dp"}),
        mesh=("dp",),
        why_not=dict.fromkeys(("tp", "pp", "ep", "cp", "dp_replicate"), "keeps the whole model on every rank"),
    ),
    rules=_rules,
    engine="averaging_engine:AveragingEngine",
    costs="nemo_dist_conf.plan.strategies.base:WHOLE_MODEL",
)
