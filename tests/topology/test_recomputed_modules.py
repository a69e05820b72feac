"""Which modules run again, by their names."""

from __future__ import annotations

from typing import Any

import pytest

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.topology.recomputed_modules import blocks_in_scope, named, recomputed_names, towers

VISION = ["model.visual.blocks.0", "model.visual.blocks.1"]
LANGUAGE = ["model.text.layers.0", "model.text.layers.1", "model.text.layers.2"]
WORDS = {**dict.fromkeys(VISION, "vision"), **dict.fromkeys(LANGUAGE, "language")}
INSIDE = {block: [f"{block}.mlp", f"{block}.mlp.up"] for block in LANGUAGE} | {b: [f"{b}.attn"] for b in VISION}


def chosen(**values: Any) -> list[str]:
    asked = {"scope": "all", "every": 1, "modules": [], **values}
    return recomputed_names([*VISION, *LANGUAGE], WORDS, asked, INSIDE)


def test_a_scope_is_a_word_or_the_name_of_a_module_around_blocks() -> None:
    assert chosen() == [*VISION, *LANGUAGE]
    assert chosen(scope="vision") == chosen(scope="visual") == chosen(scope="model.visual") == VISION
    assert chosen(scope="language") == chosen(scope="te*") == LANGUAGE
    assert chosen(scope="model") == [*VISION, *LANGUAGE]
    assert chosen(scope="layers.1") == LANGUAGE[1:2]
    assert blocks_in_scope(["a.0", "b.0"], {"a.0": "audio"}, "audio") == ["a.0"]


def test_every_counts_in_each_list_of_the_scope() -> None:
    assert chosen(every=2) == [VISION[0], LANGUAGE[0], LANGUAGE[2]]
    assert chosen(every=3, scope="language") == [LANGUAGE[0]]
    assert chosen(every=100) == [VISION[0], LANGUAGE[0]]


def test_modules_are_named_by_their_ends_and_the_outermost_is_taken() -> None:
    assert chosen(modules=["mlp"]) == chosen(modules=["mlp", "up"]) == [f"{block}.mlp" for block in LANGUAGE]
    assert chosen(modules=["mlp.up"]) == [f"{block}.mlp.up" for block in LANGUAGE]
    assert chosen(modules=["layers.[02]", "mlp"]) == [LANGUAGE[0], f"{LANGUAGE[1]}.mlp", LANGUAGE[2]]
    assert chosen(modules=["mlp"], every=2) == [f"{LANGUAGE[0]}.mlp", f"{LANGUAGE[2]}.mlp"]
    assert not named("lp", "layers.0.mlp") and named("*.mlp", "layers.0.mlp")


def test_what_is_not_there_is_refused_with_what_is() -> None:
    with pytest.raises(ConfigError) as caught:
        chosen(scope="audio")
    assert caught.value.allowed == "all, vision, language, model.visual, model.text"
    with pytest.raises(ConfigError) as caught:
        chosen(scope="vision", modules=["attn", "mlp"])
    assert caught.value.asked == "'recompute.modules=[attn,mlp]'"
    assert caught.value.instead == "'recompute.modules=[attn]'"
    with pytest.raises(ConfigError, match=r"type     'recompute\.modules=\[attn\]'"):
        chosen(scope="vision", modules=["attnn"])
    with pytest.raises(ConfigError, match="no block in scope"):  # where only blocks are known
        recomputed_names(LANGUAGE, WORDS, {"scope": "all", "every": 1, "modules": ["mlp"]})


def test_towers_are_where_lists_of_blocks_lie_apart() -> None:
    assert towers([*VISION, *LANGUAGE]) == ["model.visual", "model.text"]
    assert towers(LANGUAGE) == ["model.text.layers"]
    assert towers(["encoder.0", "decoder.0"]) == ["encoder", "decoder"]
    assert towers([]) == []
