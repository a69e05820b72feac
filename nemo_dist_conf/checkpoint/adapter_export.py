"""The adapter in a checkpoint: merged into the weights of its base, or as a folder that peft loads.

Names of tensors are those of the model with the adapter inside (runtime/model/adapters.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from nemo_dist_conf.runtime.engines.base import engine_of
from nemo_dist_conf.runtime.model.adapters import base_name

__all__ = ["Merge", "adapter_fields", "adapter_names", "base_sources", "merges"]

#: Of peft's settings of an adapter, those that say what it computes.
_FIELDS = ("r", "lora_alpha", "lora_dropout", "use_dora", "target_modules", "modules_to_save")
#: Those that would have it compute something else.
_OTHERS = ("use_rslora", "lora_bias", "rank_pattern", "alpha_pattern", "target_parameters", "layer_replication")
#: What peft puts before the names of a model that it wraps.
_PEFT = "base_model.model."


def adapter_fields(model: nn.Module) -> dict[str, Any] | None:
    """What a checkpoint keeps of the settings of an adapter that a model was given; None where it has none of ours."""
    for part in engine_of(model).parts(model):
        configs: Any = getattr(part, "peft_config", None)
        config = configs.get("default") if isinstance(configs, dict) and len(configs) == 1 else None
        is_inside = type(part).__module__.partition(".")[0] != "peft"
        # Of one that a user has put there himself other settings may say what it computes.
        if type(config).__name__ == "LoraConfig" and is_inside and not any(getattr(config, name) for name in _OTHERS):
            values = {name: getattr(config, name) for name in _FIELDS}
            return {name: sorted(value) if isinstance(value, set) else value for name, value in values.items()}
    return None


def base_sources(names: Collection[str]) -> dict[str, str]:
    """Name in the base -> name in the checkpoint, of a module that was trained in full that of what was trained."""
    found: dict[str, str] = {}
    for name in names:
        base = base_name(name)
        if base is not None and (base not in found or ".modules_to_save." in name):
            found[base] = name
    return found


def adapter_names(names: Collection[str]) -> dict[str, str]:
    """Name in a folder of peft -> name in the checkpoint, of all that was trained."""
    trained = [name for name in names if base_name(name) is None or ".modules_to_save." in name]
    return {_PEFT + name.replace(".modules_to_save.default.", ".").replace(".default", ""): name for name in trained}


@dataclass(frozen=True)
class Merge:
    """How a layer's adapter is added to its weight. a, b, magnitude: names of tensors; magnitude None: LoRA.

    turned: the weight is [input, output], or of an embedding.
    """

    a: str
    b: str
    magnitude: str | None
    scaling: float
    turned: bool

    def __call__(self, weight: Tensor, read: Callable[[str], Tensor]) -> Tensor:
        """The merged weight, in its dtype."""
        a, b = read(self.a), read(self.b)
        added = self.scaling * (b @ a)
        whole = (weight.T if self.turned else weight).to(added.dtype) + added
        if self.magnitude is not None:
            whole = whole * (read(self.magnitude) / torch.linalg.norm(whole, dim=1)).view(-1, 1)
        return (whole.T if self.turned else whole).to(weight.dtype)


def merges(names: Collection[str], fields: Mapping[str, Any], model: nn.Module) -> dict[str, Merge]:
    """Name of a base weight in the checkpoint -> what is added to it. model: the base, on meta."""
    found = {}
    for a in names:
        layer = a.removesuffix(".lora_A.default.weight").removesuffix(".lora_embedding_A.default")
        if layer == a:
            continue
        base: Any = model.get_submodule(str(base_name(f"{layer}.base_layer")))
        magnitude = f"{layer}.lora_magnitude_vector.default.weight"
        found[f"{layer}.base_layer.weight"] = Merge(
            a,
            a.replace("lora_embedding_A", "lora_embedding_B").replace("lora_A", "lora_B"),
            magnitude if magnitude in names else None,
            fields["lora_alpha"] / fields["r"],
            not isinstance(base, nn.Linear),
        )
    return found
