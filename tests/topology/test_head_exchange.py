"""When tokens are exchanged for heads: where that sends less than all keys and values."""

import math

import pytest

from nemo_dist_conf.topology.head_exchange import chosen_method, sent_kv_heads


def rows_sent(method: str, heads: int, kv_heads: int, ranks: int) -> float:
    """Rows of a head that a rank is sent for each of its tokens, by the formulas at the top of the module."""
    if method == "gather":
        return (ranks - 1) * 2 * kv_heads
    return (ranks - 1) / ranks * (2 * heads + 2 * sent_kv_heads(kv_heads, ranks))


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16])
def test_auto_is_what_sends_less_and_gather_where_both_send_as_much(ranks: int) -> None:
    chosen = set()
    for heads in (4, 8, 12, 16, 32, 48):
        for kv_heads in (each for each in range(1, heads + 1) if heads % each == 0):
            method = chosen_method("auto", heads, kv_heads, ranks)
            chosen.add(method)
            if heads % ranks:
                assert method == "gather"
                continue
            other = {"gather": "ulysses", "ulysses": "gather"}[method]
            mine, others = (rows_sent(each, heads, kv_heads, ranks) for each in (method, other))
            assert mine < others or (mine == others and method == "gather")
    assert chosen == ({"gather"} if ranks == 2 else {"gather", "ulysses"})


def test_keys_are_copied_as_often_as_every_rank_needs_some_and_no_more() -> None:
    found = {(kv, ranks): sent_kv_heads(kv, ranks) for kv in (1, 2, 3, 6, 8) for ranks in (2, 4, 8)}
    assert found == {(kv, ranks): math.lcm(kv, ranks) for kv, ranks in found}
    assert found[8, 4] == 8 and found[2, 8] == 8 and found[6, 4] == 12


def test_what_is_asked_for_is_taken_and_unknown_heads_are_gathered() -> None:
    assert chosen_method("ulysses", 4, 4, 2) == "ulysses" and chosen_method("gather", 32, 32, 8) == "gather"
    assert chosen_method("auto", None, None, 8) == "gather" and chosen_method("auto", 32, None, 8) == "gather"
    assert chosen_method("auto", 32, 5, 8) == "gather"
