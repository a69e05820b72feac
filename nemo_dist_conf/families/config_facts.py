"""What a transformers config says about a model's shape, read without importing transformers."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Mapping

from nemo_dist_conf.families.registry import find_family
from nemo_dist_conf.wording import typed_path

if TYPE_CHECKING:
    from nemo_dist_conf.families.spec import Family

__all__ = [
    "EXPERT_COUNTS",
    "ModelFacts",
    "config_of_folder",
    "facts_from_config",
    "facts_from_folder",
    "fields_of",
    "is_dense_family",
    "plain_floats",
]

#: How configs of transformers call the number of a layer's experts. A test compares with all families of 5.23.
EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "num_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a decoder; None where the config does not say, and what the family takes then is not known here.

    num_experts 0: a dense model. expert_width: of an expert's hidden layer, where the family's row names the field.
    balances_experts: it computes a loss for an even load of its experts.
    own_attention: what attends in it asks no registry of transformers. attention: the implementation that is asked for.
    folder: of the checkpoint whose config says so; None: its fields are the tree's own, and can be typed.
    """

    model_type: str | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    vocab_size: int | None = None
    num_experts: int | None = None
    expert_width: int | None = None
    tied: bool = False
    balances_experts: bool = False
    own_attention: bool = False
    attention: str | None = None
    folder: str | None = None


def facts_from_config(config: Mapping[str, Any]) -> ModelFacts:
    """Facts from the fields of a transformers config; what is absent is the family's own, or stays unknown."""
    from nemo_dist_conf.families.spec import Family  # for a model only

    # Without a row: the fields have the names that most configs use.
    family = find_family(config.get("model_type")) or Family(name="")
    fields = family.fields
    config = fields.own_names(config)
    heads = _whole(config, fields.heads, "num_attention_heads", "n_head")
    shared = config.get(fields.kv_heads, family.defaults.get(fields.kv_heads))
    return ModelFacts(
        model_type=config.get("model_type"),
        hidden_size=_whole(config, fields.hidden, "hidden_size", "n_embd"),
        intermediate_size=_whole(config, fields.intermediate, "intermediate_size"),
        num_layers=_whole(config, fields.layers, "num_hidden_layers", "n_layer"),
        num_heads=heads,
        num_kv_heads=shared if isinstance(shared, int) else heads,
        vocab_size=_whole(config, fields.vocab, "vocab_size"),
        num_experts=_experts(config),
        expert_width=_whole(config, fields.expert_width),
        tied=bool(config.get(fields.tied, family.defaults.get(fields.tied, False))),
        balances_experts=bool(config.get("output_router_logits", False)),
        own_attention=any(mixer.attends for mixer in family.mixers),
        attention=_word(config.get("attn_implementation")),
    )


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def fields_of(config: Any) -> dict[str, Any]:
    """The fields of a transformers config object, which its own to_dict copies deeply."""
    return {**vars(config), "model_type": getattr(config, "model_type", None)}


def facts_from_folder(folder: str | Path) -> ModelFacts | None:
    """Facts from a checkpoint folder's config.json; None when there is no readable one (reported when it is loaded)."""
    config = config_of_folder(folder)
    return None if config is None else replace(facts_from_config(config), folder=str(folder))


def config_of_folder(folder: str | Path) -> dict[str, Any] | None:
    """The fields of a checkpoint folder's config.json; None when there is no readable one."""
    try:
        config = json.loads((typed_path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return plain_floats(config) if isinstance(config, dict) else None


def plain_floats(value: Any) -> Any:
    """Fields of a transformers config as they stand in JSON, with its infinities and NaN as numbers.

    JSON has no word for them, and transformers 5 writes ``{"__float__": "Infinity"}``.
    """
    if isinstance(value, Mapping):
        if set(value) == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: plain_floats(item) for key, item in value.items()}
    return [plain_floats(item) for item in value] if isinstance(value, list) else value


def _experts(config: Mapping[str, Any]) -> int | None:
    """The number of a layer's experts: as any part of the config says it, else the family's own; None: not known."""
    family = find_family(config.get("model_type"))
    found = _whole(config, *_expert_counts(family))
    if found is not None:
        return found
    parts = [value if isinstance(value, Mapping) else fields_of(value) for value in config.values() if _is_part(value)]
    inside = {count for part in parts if (count := _experts(part)) is not None}
    if inside:
        return inside.pop() if len(inside) == 1 else None
    if family is None or family.shapes is None:
        return None
    return _whole(family.defaults, *_expert_counts(family)) or 0


def _expert_counts(family: Family | None) -> tuple[str, ...]:
    """What a config of the family may call the number of a layer's experts."""
    return (family.fields.experts, *EXPERT_COUNTS) if family is not None else EXPERT_COUNTS


def _is_part(value: Any) -> bool:
    """Whether a config's value is a config itself: of the language model of a vision model, say."""
    return isinstance(value, Mapping) or hasattr(value, "model_type")


def is_dense_family(model_type: str) -> bool:
    """Whether models of this type have no experts, whatever their config says; False where that is not known.

    Told from the file of transformers that holds the family's config, which is read and not imported: it knows no
    experts, and takes in no other family's config.
    """
    family = find_family(model_type)
    if family is not None and family.shapes is not None:
        return family.shapes.is_sparse is None
    spec = importlib.util.find_spec("transformers")
    places = spec.submodule_search_locations or () if spec is not None else ()
    folder = f"models/{model_type.replace('-', '_')}"
    texts = [file.read_text("utf-8") for place in places for file in Path(place, folder).glob("configuration_*.py")]
    return bool(texts) and not any(re.search(r"experts|AutoConfig|CONFIG_MAPPING", text) for text in texts)


def _whole(config: Mapping[str, Any], *names: str) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    return None
