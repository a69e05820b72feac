"""The modes of activation checkpointing: what is none, and the one answer of the places that can hold it."""

from __future__ import annotations

from typing import Any, Mapping, Sequence

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.names import ACTIVATION_CHECKPOINTING_MODES, checkpointing_mode
from nemo_dist_conf.wording import Spelling, typed

__all__ = ["mode_problem", "one_mode"]


def mode_problem(
    key: str,
    value: Any,
    modes: Sequence[bool | str] = ACTIVATION_CHECKPOINTING_MODES,
    strategy: str = "",
    spelling: Spelling = Spelling(),
) -> Problem | None:
    """What is wrong with the value of ``key``; None where it is one of the modes. strategy: the one that has these."""
    mode = checkpointing_mode(value)
    if mode is not None and mode in modes:
        return None
    return Problem(
        what=f"{key}={value} is not a mode" + (f" of strategy={strategy}" if mode is not None and strategy else ""),
        asked=spelling.set(key, value),
        allowed=", ".join(map(typed, modes)),
        instead=spelling.set(key, True),
    )


def one_mode(
    given: Mapping[str, Any], modes: Sequence[bool | str], strategy: str, spelling: Spelling = Spelling()
) -> tuple[bool | str, list[Problem]]:
    """(the mode that is executed, what is wrong) of the values that the keys hold, the strategy's own after the
    one beside the groups: off where all are off, else the one that all that are on agree on.
    """
    found = [mode_problem(key, value, modes, strategy, spelling) for key, value in given.items()]
    problems = [problem for problem in found if problem is not None]
    on = [mode for mode in map(checkpointing_mode, given.values()) if mode]
    if not problems and any(mode != on[0] for mode in on):
        problems.append(
            Problem(
                what="activation checkpointing has two different answers",
                asked=" ".join(spelling.set(key, value) for key, value in given.items()),
                allowed="one of them, or both the same",
                instead=" ".join(spelling.set(key, on[0]) for key in given),
            )
        )
    return on[0] if on else False, problems
