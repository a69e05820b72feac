"""What people keep beside a model, saved under one layout and loaded under another: bit for bit, or refused."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from tests.checkpoint.beside import BESIDE, LAYOUTS, difference, go_on, save_beside
from tests.checkpoint.exchange import some_sources
from tests.conformance.case import Case
from tests.dist.pool import run_ranks

__all__ = ["CASES"]

_NUMBERED = ("averaged weights in a list", "a second optimizer alone")


@functools.cache
def _saved(layout: str) -> tuple[tempfile.TemporaryDirectory[str], dict[str, Any]]:
    """The folder of a layout's checkpoints, which goes with the process, and what was in them."""
    folder = tempfile.TemporaryDirectory()
    of = LAYOUTS[layout]
    return folder, run_ranks(of.ranks, save_beside, of, Path(folder.name), timeout_s=300)[0]


def _exchanged(kind: str, saved: str, loaded: str) -> float:
    folder, there = _saved(saved)
    if isinstance(there[kind], Exception):
        raise there[kind]
    of = LAYOUTS[loaded]
    found = run_ranks(of.ranks, go_on, of, [(Path(folder.name), kind)], timeout_s=300)[0][0]
    if isinstance(found, Exception):
        raise found
    return difference(there[kind], found)


def _refused(kind: str, saved: str, loaded: str) -> str | None:
    """What a pipeline's ranks number themselves, and what megatron-fsdp cut without a name, goes nowhere else."""
    if kind not in _NUMBERED:
        return None
    is_list = kind == _NUMBERED[0]
    if is_list and saved.startswith("megatron"):
        return "cut in a way which it does not tell"
    if saved.startswith("pp") and saved != loaded:
        return "was another on each"
    if is_list and loaded.startswith("megatron"):
        return "cut in a way which it does not tell"
    if loaded.startswith("pp") and saved != loaded:
        return "by number" if is_list else "other parameters than when it was saved"
    return None


CASES = [
    Case(
        "Objects beside a model, in checkpoints",
        kind,
        f"{saved} -> {loaded}",
        functools.partial(_exchanged, kind, saved, loaded),
        _refused(kind, saved, loaded),
        tolerance=0.0,
        in_suite=False,  # tests/checkpoint/test_objects.py has those of two ranks
    )
    for kind in BESIDE
    for loaded in LAYOUTS
    for saved in some_sources(LAYOUTS, loaded)
]
