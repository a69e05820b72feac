"""The plan of tensor and sequence parallelism for a whole model, from its family's row and what the model brings."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Mapping

from nemo_dist_conf.families.registry import families, find_family
from nemo_dist_conf.families.styles import sequence_twin

if TYPE_CHECKING:
    from nemo_dist_conf.families.spec import Places, TensorPlan

__all__ = ["complete_plan", "planned_families"]


def complete_plan(
    model_type: object,
    base_plan: Mapping[str, str] | None = None,
    head_plan: Mapping[str, str] | None = None,
    *,
    prefix: str | None = None,
    sequence_parallel: bool = False,
) -> dict[str, str] | None:
    """Pattern -> style name for a whole model, relative to its root; None where nothing is known of it.

    base_plan: relative to the base model (transformers' ``config.base_model_tp_plan``); it overrules the family's
    layers. head_plan: relative to the root. prefix: the base model's name in the root, "" where it is the root; None:
    as the family has it. sequence_parallel: norms and the residual stream split over the sequence; None for a family
    without a plan here, because its own does not name the modules of the residual stream.
    """
    from nemo_dist_conf.families.spec import Places  # for a model only

    family = find_family(model_type)
    places, styles = (family.places, family.tensor_plan) if family is not None else (Places(), None)
    if prefix is not None:
        places = dataclasses.replace(places, base=prefix)
    if styles is None and (sequence_parallel or not base_plan):
        return None
    plan = _entries(styles, places) if styles is not None else {}
    plan |= {places.in_base(pattern): style for pattern, style in (base_plan or {}).items()}
    if places.base:
        plan |= dict(head_plan or {})
    if sequence_parallel and "moe_tp_experts" in plan.values():
        return None  # a router and its experts take each token once, wherever it is
    if sequence_parallel:
        plan = {pattern: sequence_twin(style) for pattern, style in plan.items()}
        plan[places.block("*")] = "scatter_input"
    return plan


def planned_families() -> str:
    """The families whose plan is known here, for a message."""
    return ", ".join(family.name for family in families() if family.tensor_plan is not None)


def _entries(styles: TensorPlan, places: Places) -> dict[str, str]:
    """The plan as the row has it; without the head where the base model is the root."""
    block = places.block("*")
    return {
        places.in_base(places.embedding): styles.embedding,
        **{f"{block}.{name}": "replicated" for name in styles.norms},
        **{f"{block}.{name}": "gather_input" for name in styles.inputs},
        **{f"{block}.{name}": style for name, style in styles.block.items()},
        places.in_base(places.final_norm): styles.final_norm,
        **({places.head: styles.head} if places.base else {}),
    }
