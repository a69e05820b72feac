"""The tensor-parallel plan that a model comes with: by an attribute, by its family, by what transformers says of it."""

from __future__ import annotations

from typing import Any

from torch import nn

from nemo_dist_conf.families.plans import complete_plan
from nemo_dist_conf.families.styles import match_pattern
from nemo_dist_conf.runtime.model.base_model import base_prefix
from nemo_dist_conf.runtime.model.materialise import tied_names
from nemo_dist_conf.runtime.torch_inside import DECLARED_PLANS, plan_of_head

__all__ = [
    "declared_plan",
    "family_plan",
    "has_other_adapters",
    "inside_wrapper",
    "is_pattern",
    "is_transformers",
    "model_type",
    "with_tied",
]


def declared_plan(model: nn.Module) -> tuple[str, Any] | None:
    """The attribute in which a model that is none of transformers brings a plan, and the plan; None without one."""
    if is_transformers(model):
        return None
    return next(((name, plan) for name in DECLARED_PLANS if (plan := getattr(model, name, None))), None)


def family_plan(model: nn.Module, sequence_parallel: bool = False) -> dict[str, str] | None:
    """The plan of the model's family and of what transformers says of it; None where nothing is known."""
    base = head = prefix = None
    wrapper, inner = inside_wrapper(model)
    if is_transformers(model):
        config: Any = model.config
        base, head = config.base_model_tp_plan, plan_of_head(inner)
        prefix = base_prefix(inner, base or ())
        parts = {} if base else _plans_of_parts(inner)
        if parts:
            base, prefix = {**parts, **(head or {})}, ""
    found = complete_plan(model_type(model), base, head, prefix=prefix, sequence_parallel=sequence_parallel)
    if found is not None and wrapper:
        found = {f"{wrapper}.{pattern}": style for pattern, style in found.items()}
    return found


def with_tied(model: nn.Module, plan: dict[str, str]) -> dict[str, str]:
    """A plan with the embedding, which transformers leaves out; tied to a head in it, it has to be laid out alike."""
    names = [name.rpartition(".")[0] for group in tied_names(model) for name in group]
    if not any(match_pattern(pattern, name) for pattern in plan for name in names):
        return plan
    tied = {name: "embedding_rowwise" for name in names if isinstance(model.get_submodule(name), nn.Embedding)}
    return {**tied, **plan}


def is_transformers(model: nn.Module) -> bool:
    """Whether a model says of its tensor parallelism what those of transformers do."""
    return hasattr(getattr(model, "config", None), "base_model_tp_plan")


def model_type(model: nn.Module) -> object:
    """What a model's config calls its family; None where it does not say."""
    return getattr(getattr(model, "config", None), "model_type", None)


def inside_wrapper(model: nn.Module) -> tuple[str, nn.Module]:
    """(name, model) of the model of transformers inside of one that wraps it, as peft does; ("", the model) else."""
    named = ((name, module) for name, module in model.named_modules() if hasattr(type(module), "base_model_prefix"))
    return next(named, ("", model))


def has_other_adapters(model: nn.Module) -> bool:
    """Whether layers have adapters of another kind than LoRA: no family's plan says what to do with these."""
    wrapped = [module for module in model.modules() if isinstance(getattr(module, "base_layer", None), nn.Module)]
    return not all(hasattr(module, "lora_A") for module in wrapped)


def _plans_of_parts(model: nn.Module) -> dict[str, str]:
    """The plans of models inside of one that has none itself, as of a language model beside a vision tower."""
    plans: dict[str, str] = {}
    inside: list[str] = []
    for name, module in model.named_modules():
        config: Any = getattr(module, "config", None)
        if config is model.config or any(name.startswith(f"{other}.") for other in inside):
            continue
        plan = getattr(config, "base_model_tp_plan", None)
        if plan and hasattr(module, "base_model_prefix"):  # a model, and no layer that keeps its config
            inside.append(name)
            base = base_prefix(module, plan)
            plans |= {f"{name}.{f'{base}.' if base else ''}{pattern}": style for pattern, style in plan.items()}
    return plans


def is_pattern(name: str) -> bool:
    """Whether an entry of a plan may mean several modules."""
    return any(sign in name for sign in "*?[")
