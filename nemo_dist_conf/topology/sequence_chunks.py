"""How context parallelism cuts a sequence: into two equal chunks for each of its ranks."""

from __future__ import annotations

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.wording import Spelling

__all__ = ["chunk_problem", "splits_evenly"]


def splits_evenly(tokens: int, cp_size: int) -> bool:
    """Whether so many tokens are cut into 2 * cp_size equal chunks; one rank has no need to cut."""
    return cp_size == 1 or tokens % (2 * cp_size) == 0


def chunk_problem(tokens: int, cp_size: int, spelling: Spelling | None = None) -> Problem | None:
    """What is wrong with a sequence of so many tokens; None where it is cut into equal chunks.

    spelling: of the keys that say both; None: the tokens are what a call was given.
    """
    if splits_evenly(tokens, cp_size):
        return None
    chunks = 2 * cp_size
    near = max(chunks, round(tokens / chunks) * chunks)
    asked, instead = f"{tokens} tokens", f"{near} tokens"
    if spelling is not None:
        asked = f"{spelling.set('parallelism.cp_size', cp_size)} data.seq_len={tokens}"
        instead = f"data.seq_len={near}"
    return Problem(
        what=f"cp_size={cp_size} splits a sequence into {chunks} equal chunks, and {tokens} tokens do not split so",
        asked=asked,
        allowed=f"a multiple of {chunks} tokens",
        instead=instead,
    )
