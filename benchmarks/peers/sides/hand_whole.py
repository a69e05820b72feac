"""Plain torch again, compiled as one where the others compile layer by layer: whether that would be the faster way."""

from __future__ import annotations

from typing import Any, Callable

import hand
from work import Job

__all__ = ["prepare"]


def prepare(job: Job) -> Callable[[], tuple[Any, hand.Step]]:
    return hand.prepare(job, whole=True)
