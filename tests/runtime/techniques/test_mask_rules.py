"""Rules that masks of transformers are read as: the same queries see the same keys, whatever part of a row is asked."""

from __future__ import annotations

import functools
from typing import Any, Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, masking_utils
from transformers.masking_utils import AttentionMaskInterface

from nemo_dist_conf.runtime.techniques.context.mask_rules import (
    Documents,
    Function,
    Packed,
    Rule,
    read_rule,
    simplified,
)

ROWS, TOKENS = 2, 24
POSITIONS = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in ([5, 9, 10], [24])])
BLOCKS = torch.tensor([[-1] * 4 + [0] * 6 + [-1] * 4 + [1] * 10, [-1] * 24])


def others(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (query + key) % 3 != 1


def knows(tokens: Tensor) -> Callable[..., Tensor]:
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return tokens[batch, key] == tokens[batch, query]

    return visible


#: name -> (function of masking_utils, what it is given beside the usual)
MASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "causal": ("create_causal_mask", {}),
    "window": ("create_sliding_window_causal_mask", {}),
    "chunks": ("create_chunked_causal_mask", {}),
    "both ways": ("create_bidirectional_mask", {}),
    "window both ways": ("create_bidirectional_sliding_window_mask", {}),
    "documents": ("create_causal_mask", {"position_ids": POSITIONS}),
    "documents, window": ("create_sliding_window_causal_mask", {"position_ids": POSITIONS}),
    "documents, chunks": ("create_chunked_causal_mask", {"position_ids": POSITIONS}),
    "blocks, none": ("create_causal_mask", {"block_sequence_ids": torch.full((ROWS, TOKENS), -1)}),
    "any other function": ("create_causal_mask", {"and_mask_function": others}),
    "blocks": ("create_causal_mask", {"block_sequence_ids": BLOCKS}),
    "a function that knows tokens": ("create_causal_mask", {"or_mask_function": knows(BLOCKS)}),
    "the same, as a default": ("create_causal_mask", {"or_mask_function": functools.partial(others, head=BLOCKS)}),
    "something that is called": ("create_causal_mask", {"or_mask_function": Documents}),
}


def made(name: str) -> tuple[Tensor, Rule]:
    """The mask [B, 1, S, S] that transformers makes, and the rule that it is read as."""
    seen: dict[str, Any] = {}

    def interface(mask_function: Callable[..., Any], **given: Any) -> Tensor:
        given.update(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
        seen["rule"], seen["packed"] = read_rule(mask_function, TOKENS, bool)
        mask: Tensor = masking_utils.sdpa_mask(mask_function=mask_function, **given)
        return mask

    AttentionMaskInterface.register("tests", interface)
    config: Any = LlamaConfig(attn_implementation="tests", sliding_window=5, attention_chunk_size=8)
    function, given = MASKS[name]
    mask = getattr(masking_utils, function)(
        config=config, inputs_embeds=torch.zeros(ROWS, TOKENS, 4), attention_mask=None, past_key_values=None, **given
    )
    assert seen["packed"] == name.startswith("documents")
    documents = Documents.of(POSITIONS)
    assert documents is not None
    rule = Packed(seen["rule"], documents) if seen["packed"] else seen["rule"]
    return mask, simplified(rule, TOKENS)


def asked(rule: Rule, queries: range, keys: range) -> Tensor:
    batch = torch.arange(ROWS).view(-1, 1, 1, 1)
    return rule.seen(batch, torch.tensor(queries).view(1, 1, -1, 1), torch.tensor(keys).view(1, 1, 1, -1))


REFUSED = list(MASKS)[-4:]


@pytest.mark.parametrize("name", [name for name in MASKS if name not in REFUSED])
def test_a_rule_says_what_the_mask_says(name: str) -> None:
    mask, rule = made(name)
    everything = asked(rule, range(TOKENS), range(TOKENS)).expand(ROWS, -1, -1, -1)
    assert torch.equal(everything, mask)
    for first, last in ((0, 3), (4, 4), (3, 11), (12, 23), (0, 23)):
        begin, end = rule.reach(first, last, TOKENS)
        rows = mask[:, :, first : last + 1]
        assert not rows[..., :begin].any() and not rows[..., end:].any(), "it sees beyond its reach"
        for keys in (range(0, 4), range(3, 9), range(8, 16), range(15, 16)):
            if rule.sees_all(first, last, keys.start, keys.stop):
                assert rows[..., keys.start : keys.stop].all()


def test_what_is_common_is_read_and_not_evaluated() -> None:
    """Else attention would go over all keys, for a mask of each block."""
    for name in ("causal", "window", "chunks", "both ways", "window both ways", "documents, window"):
        rule = made(name)[1]
        assert not isinstance(rule, Function) and Function not in map(type, getattr(rule, "rules", ()))
        assert rule.reach(20, 23, TOKENS)[0] > 0 or name in ("causal", "both ways", "documents")
    reach = made("documents, window")[1].reach(16, 17, TOKENS)
    assert isinstance(made("documents, window")[1], Packed) and reach == (12, 18)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_made_of_a_rank_s_own_tokens_is_refused(name: str) -> None:
    """It may have counted them, as blocks of images are numbered: gathered it would be wrong without a word."""
    with pytest.raises(NotImplementedError):
        made(name)


def test_windows_that_hold_all_of_a_row_are_left_out() -> None:
    rule, packed = read_rule(masking_utils.sliding_window_causal_mask_function(24), 12, bool)
    assert str(simplified(rule, 24)) == "Causal()" and str(simplified(rule, 25)) != "Causal()" and not packed
