"""Where the base model stands in a model of transformers, relative to which plans of its config are written."""

from __future__ import annotations

from typing import Any, Iterable

from torch import nn

from nemo_dist_conf.families.styles import match_pattern

__all__ = ["base_prefix"]


def base_prefix(model: nn.Module, patterns: Iterable[str]) -> str:
    """The base model's name in the model, "" where it is the model itself.

    patterns: names of modules relative to the base model. Some classes (Llama 4) name their base model otherwise than
    they call it; then it is the child in which one of the patterns means something.
    """
    inner: Any = getattr(model, "base_model", model)
    if inner is not model:
        return str(model.base_model_prefix)
    names, wanted = [name for name, _ in model.named_modules()], list(patterns)
    for prefix in ("", *(name for name, _ in model.named_children())):
        inside = [name.removeprefix(f"{prefix}.") for name in names if not prefix or name.startswith(f"{prefix}.")]
        if any(match_pattern(pattern, name) for pattern in wanted for name in inside):
            return prefix
    return ""
