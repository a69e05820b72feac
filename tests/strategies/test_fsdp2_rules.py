"""What strategy=fsdp2 asks of the installed torch, told without importing it."""

from __future__ import annotations

import dataclasses
import importlib.metadata

import pytest

from nemo_dist_conf.strategies import find_strategy
from nemo_dist_conf.strategies.fsdp2 import FSDP2Conf
from nemo_dist_conf.wording import Spelling

SPLIT = {"enable_compile": True, "sequence_parallel": True}


def types(tp_size: int, **changed: object) -> list[str]:
    conf = {**dataclasses.asdict(FSDP2Conf()), **changed}
    return [problem.instead for problem in find_strategy("fsdp2").rules(conf, {"tp_size": tp_size}, Spelling())]


@pytest.mark.parametrize("version, refused", [("2.11.0+cu130", True), ("2.13.0+cpu", False), ("3.0.0", False)])
def test_an_older_torch_does_not_compile_a_split_sequence(
    monkeypatch: pytest.MonkeyPatch, version: str, refused: bool
) -> None:
    """Seen with torch 2.11: the first backward fails inside torch."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    assert types(2, **SPLIT) == ["strategy.enable_compile=false"] * refused
    assert types(1, **SPLIT) == types(2, enable_compile=True) == types(2, sequence_parallel=True) == []
