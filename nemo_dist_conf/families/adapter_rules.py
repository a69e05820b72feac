"""Targets of an adapter that mean nothing in a model known by its config, told without building it; no torch."""

from __future__ import annotations

from typing import Any, Iterator, Mapping

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.families.config_facts import ModelFacts
from nemo_dist_conf.families.plan_rules import known_modules
from nemo_dist_conf.families.styles import match_end
from nemo_dist_conf.names import nearest
from nemo_dist_conf.schema.adapter import ALL_LINEAR, patterns_of
from nemo_dist_conf.wording import Spelling

__all__ = ["target_problems"]


def target_problems(values: Mapping[str, Any], facts: ModelFacts, spelling: Spelling = Spelling()) -> Iterator[Problem]:
    """Patterns of the group ``adapter`` that match no module. values: of the group, by field.

    Those of a model whose row does not say all of its modules are left to the runtime.
    """
    modules = known_modules(facts) if values["kind"] != "none" else []
    if not modules:
        return
    leaves = list(dict.fromkeys(name.rpartition(".")[2] for name in modules if not name[-1].isdigit()))
    for field, every in (("targets", [ALL_LINEAR]), ("modules_to_save", [])):
        given = patterns_of(values[field])
        for pattern in given:
            if pattern in every or any(match_end(pattern, name) for name in modules):
                continue
            near = [*nearest(pattern, leaves), *every][:3]
            better = [near[0] if other == pattern else other for other in given] if near else []
            key = spelling.key(f"adapter.{field}")
            yield Problem(
                what=f"{key}: no module of {facts.model_type} has a name that ends in {pattern}",
                asked=spelling.set(f"adapter.{field}", list(given)),
                allowed=", ".join(near) or "names of the model's modules",
                instead=spelling.set(f"adapter.{field}", better),
            )
