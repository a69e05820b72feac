"""How attention sees the tokens of other ranks of the axis cp: by their keys and values, or by heads.

Sizes: L tokens of a rank, H heads of queries, K of keys and values, of one rank along tp; cp ranks.

gather: every rank is sent the keys and values of all tokens, (cp - 1) * L * 2K rows of a head.
ulysses: every rank is sent all tokens of H / cp heads, and sends back what they come to: (cp - 1) / cp * L * (2H + 2K')
rows, where K' is how many heads of keys are sent (``sent_kv_heads``). Source: DeepSpeed Ulysses, arXiv:2309.14509.
"""

from __future__ import annotations

import math

__all__ = ["chosen_method", "sent_kv_heads"]


def sent_kv_heads(kv_heads: int, ranks: int) -> int:
    """Heads of keys and values that ulysses sends: as few copies of each as give every rank its own.

    A multiple of ``ranks`` and of ``kv_heads`` that divides the heads of queries, where both of them do.
    """
    return math.lcm(kv_heads, ranks)


def chosen_method(method: str, heads: int | None, kv_heads: int | None, ranks: int) -> str:
    """``gather`` or ``ulysses``: what ``method`` is for an attention of so many heads; None: they are not known.

    auto: ulysses where ``ranks`` divides the heads and it sends less, which is where heads + sent key/value heads are
    fewer than ranks x key/value heads; else gather.
    """
    if method != "auto":
        return method
    if not heads or not kv_heads or heads % ranks or heads % kv_heads:
        return "gather"
    return "ulysses" if heads + sent_kv_heads(kv_heads, ranks) < ranks * kv_heads else "gather"
