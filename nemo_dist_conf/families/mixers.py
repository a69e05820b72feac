"""What mixes the tokens of a row beside an attention that can be exchanged, as far as a config tells it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping

__all__ = ["HYBRID", "Mixer", "OWN_ATTENTION", "RECURRENT"]


@dataclass(frozen=True)
class Mixer:
    """One kind of layer that cannot be split over the ranks of a sequence.

    text: what the model has, after "it has". fields: of the config that choose the kind of each layer; empty: all
    layers are of this kind. kinds: words in those fields that stand for it.
    """

    text: str
    fields: tuple[str, ...] = ()
    kinds: frozenset[str] = frozenset()

    def is_chosen(self, config: Mapping[str, Any]) -> bool:
        """Whether a model with these fields has such layers; where no field chooses, it has what the family has.

        False where the fields that choose are no lists of words: the model is tried when it is built.
        """
        chosen = [config[name] for name in self.fields if config.get(name) is not None]
        layers = [layer for value in chosen if isinstance(value, (list, tuple)) for layer in value]
        return not chosen or not self.kinds.isdisjoint(map(str, layers))


OWN_ATTENTION = Mixer("an attention of its own, which does not go through transformers' registry")
RECURRENT = Mixer("recurrent layers, which carry a state from token to token")

#: Recurrent layers among attentions, as the config chooses.
HYBRID = Mixer(
    RECURRENT.text,
    fields=(
        "attn_layer_indices",
        "attn_layer_offset",
        "attn_layer_period",
        "block_types",
        "full_attention_interval",
        "hybrid_override_pattern",
        "layer_types",
        "layers_block_type",
    ),
    kinds=frozenset({"hybrid", "linear_attention", "mamba", "recurrent"}),
)
