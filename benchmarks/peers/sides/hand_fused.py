"""Plain torch again, by someone who knows that ``fused=True`` exists: what the optimizer's kernel alone is worth."""

from __future__ import annotations

from typing import Any, Callable

import hand
from work import Job

__all__ = ["prepare"]


def prepare(job: Job) -> Callable[[], tuple[Any, hand.Step]]:
    return hand.prepare(job, fused=True)
