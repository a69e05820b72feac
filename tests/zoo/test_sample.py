"""Families and kinds that between them have every mechanism, along the axes that concern it, as docs/zoo.json has them.

The whole table: ``python -m tests.zoo --again --write``.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest

from tests.zoo.__main__ import axes_of, tried
from tests.zoo.table import Cell

pytestmark = [pytest.mark.dist, pytest.mark.slow]

TABLE = Path(__file__).parents[2] / "docs" / "zoo.json"

SAMPLE: dict[str, tuple[str, ...]] = {
    # plain: the pairs, and what is done to blocks
    "llama": ("hsdp", "ac full", "ac selective", "compile", "fsdp2 x tp", "fsdp2 x pp", "tp x pp"),
    # query, key and value in one Conv1D, learned positions, tied embeddings
    "gpt2": ("dp", "tp", "tp+sp", "cp", "cp ulysses", "pp", "megatron"),
    # norms behind attention and MLP too, soft caps, scaled and tied embeddings, windows in turn
    "gemma2": ("tp", "tp+sp", "cp", "pp"),
    # attention and MLP beside each other, scaled logits
    "cohere": ("tp+sp", "pp"),
    # scaled residuals
    "granite": ("tp+sp", "pp"),
    # packed query, key and value, packed gate and up
    "phi3": ("tp", "tp+sp", "fsdp2 x tp"),
    # latent attention, shared experts, groups of experts
    "deepseek_v3": ("tp", "ep", "fsdp2 x ep", "tp x ep", "megatron"),
    # sinks, biases of experts
    "gpt_oss": ("tp", "cp", "cp ulysses", "ep", "cp x ep"),
    # a recurrence over the tokens and a convolution, in turn with attention
    "qwen3_next": ("fsdp2", "cp"),
    "mamba2": ("cp", "pp"),
    # biases by distance, query, key and value interleaved by heads, attention written by hand
    "bloom": ("tp", "cp", "pp"),
    # a position for each token of the row, counted
    "roberta": ("cp", "tp"),
    # adds in place to what selective checkpointing keeps
    "gemma3n_text": ("ac selective",),
    # reversible blocks
    "reformer": ("fsdp2",),
    "t5": ("fsdp2", "tp", "megatron", "frozen tp"),
    "vit": ("fsdp2", "tp"),
    "whisper_for_speech": ("fsdp2", "ac full"),
    "qwen2_5_vl": ("fsdp2", "ac full", "ac vision", "frozen fsdp2", "frozen megatron"),
    "dit": ("fsdp2", "hsdp"),
    "unet": ("fsdp2",),
    "several_lists": ("dp", "megatron"),
}


@functools.cache
def table() -> dict[tuple[str, str], Cell]:
    cells = [Cell(**line) for line in json.loads(TABLE.read_text(encoding="utf-8"))]
    return {(cell.family, cell.axis): cell for cell in cells}


@pytest.mark.parametrize(("family", "axis"), [(family, axis) for family, axes in SAMPLE.items() for axis in axes])
def test_a_cell_is_as_the_table_has_it(family: str, axis: str) -> None:
    assert axis in axes_of(family)
    found, told = tried(family, axis), table()[family, axis]
    assert found.is_right and found.kind == told.kind, (found, told)


def test_the_table_has_nothing_wrong() -> None:
    assert [cell for cell in table().values() if not cell.is_right] == []
