"""What mixes the tokens of a row beside an attention that can be exchanged, as far as a config tells it.

Under context parallelism every rank runs such a layer's mixer on whole rows, which the plan has to know; the runtime
finds it out of the model itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping, Sequence

__all__ = ["HYBRID", "Mixer", "OWN_ATTENTION", "RECURRENT"]


@dataclass(frozen=True)
class Mixer:
    """One kind of layer whose mixer is run on whole rows.

    fields: of the config that choose the kind of each layer; empty: all layers are of this kind. kinds: words in those
    fields that stand for it. attends: it is the attention of the model.
    """

    fields: tuple[str, ...] = ()
    kinds: frozenset[str] = frozenset()
    attends: bool = False

    def layers(self, config: Mapping[str, Any], count: int) -> tuple[bool, ...]:
        """Of each of so many layers, whether it is of this kind; where no list of words chooses, all are."""
        lists = [config[name] for name in self.fields if isinstance(config.get(name), (list, tuple))]
        chosen: Sequence[Any] = next((words for words in lists if len(words) == count), ())
        return tuple(str(word) in self.kinds for word in chosen) or (True,) * count


OWN_ATTENTION = Mixer(attends=True)
"""An attention that does not go through transformers' registry."""

RECURRENT = Mixer()
"""Recurrent layers, which carry a state from token to token."""

HYBRID = Mixer(
    fields=("layer_types", "layers_block_type", "block_types", "hybrid_override_pattern"),
    kinds=frozenset({"hybrid", "linear_attention", "mamba", "recurrent"}),
)
"""Recurrent layers among attentions, as the config chooses."""
