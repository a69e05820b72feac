"""What the towers of a model take in."""

from __future__ import annotations

import pytest
from torch import nn

from nemo_dist_conf.runtime.model.blocks import find_blocks
from nemo_dist_conf.runtime.model.towers import tower_words
from tests.dist.kinds import KINDS
from tests.zoo.cell import model_of

#: Kind -> (part of a block's name, its word); "" : none is known.
KNOWN: dict[str, dict[str, str]] = {
    "qwen2_5_vl": {"visual": "vision", "language_model": "language"},  # its class inherits what all of it takes in
    "gemma3_with_images": {"vision_tower": "vision", "language_model": "language"},
    "clip": {"text_model": "language", "vision_model": "vision"},
    "whisper_for_speech": {"encoder": "audio", "decoder": "language"},
    "t5": {"encoder": "language", "decoder": "language"},
    "wav2vec2": {"wav2vec2": "audio"},
    "vit": {"vit": "vision"},  # get_decoder gives it too
    "modernbert": {"model": "language"},  # get_decoder gives its head
    "several_lists": {"encoder": "", "decoder": ""},
}


@pytest.mark.parametrize("kind", KNOWN)
def test_words_of_kinds(kind: str) -> None:
    model = KINDS[kind]()[0]
    blocks = find_blocks(model)
    found = tower_words(model, blocks)
    assert {part: {found.get(b, "") for b in blocks if part in b.split(".")} for part in KNOWN[kind]} == {
        part: {word} for part, word in KNOWN[kind].items()
    }


def test_a_model_of_language_is_all_language() -> None:
    model = model_of("llama")
    assert set(tower_words(model, find_blocks(model)).values()) == {"language"}


class Towers(nn.Module):
    """A model of one's own with the methods of transformers; of three that raise, answer wrongly, or take no word."""

    def __init__(self) -> None:
        super().__init__()
        self.eyes, self.mind = (nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2)) for _ in range(2))

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        if modality not in (None, "image"):
            raise ValueError(modality)
        return self.eyes if modality else self

    def get_decoder(self) -> nn.Module:
        return self.mind


def test_a_model_of_ones_own_may_say_it() -> None:
    model = Towers()
    assert set(tower_words(model, find_blocks(model)).items()) == {
        ("eyes.0", "vision"),
        ("eyes.1", "vision"),
        ("mind.0", "language"),
        ("mind.1", "language"),
    }
    model.get_encoder = lambda modality=None: model.eyes  # type: ignore[method-assign]
    assert set(tower_words(model, find_blocks(model)).values()) == {"language"}  # one encoder for whatever is asked
