"""What strategy=megatron_fsdp asks of the machine and of class paths, told without torch and without the library."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

from nemo_dist_conf.strategies import find_strategy
from nemo_dist_conf.strategies.common import unknown_class
from nemo_dist_conf.strategies.megatron_fsdp import MegatronFSDPConf
from nemo_dist_conf.topology.launched_ranks import Start, about_to_start
from nemo_dist_conf.wording import Spelling

RULES = find_strategy("mfsdp").rules


def findings(**changed: object) -> list[tuple[str, str]]:
    """(what, type) of each problem."""
    conf = {**vars(MegatronFSDPConf()), **changed}
    return [(problem.what, problem.instead) for problem in RULES(conf, {}, Spelling())]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_dist_conf.strategies.megatron_fsdp.cuda_present", lambda: True)


def test_nothing_is_wrong_where_there_is_a_gpu(cuda: None) -> None:
    assert findings() == []


def test_registered_buffers_need_an_allocator(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda: None) -> None:
    """Seen on a GPU: the library asserts in the middle of wrapping."""
    ((what, instead),) = findings(nccl_ub=True)
    assert "neither is installed" in what and instead == "strategy.nccl_ub=false"
    (tmp_path / "apex" / "contrib" / "nccl_allocator").mkdir(parents=True)
    for folder in ("apex", "apex/contrib", "apex/contrib/nccl_allocator"):
        (tmp_path / folder / "__init__.py").write_text("raise SystemExit\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert findings(nccl_ub=True) == []


def test_a_machine_without_gpus_may_start_jobs_on_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_dist_conf.strategies.megatron_fsdp.cuda_present", lambda: False)
    with about_to_start(Start(8, "command")):
        assert len(findings()) == 1
    with about_to_start(Start(8, "command", elsewhere=True)):
        assert findings() == []


def test_the_way_out_shards_as_much_as_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_dist_conf.strategies.megatron_fsdp.cuda_present", lambda: False)
    types = {stage: findings(zero_dp_strategy=stage)[0][1] for stage in range(4)}
    assert types == {
        0: "strategy=ddp",
        1: "strategy=ddp",
        2: "strategy=fsdp2 strategy.reshard_after_forward=false",
        3: "strategy=fsdp2",
    }


@pytest.mark.parametrize(
    ("version", "text"), [(None, "needs the package megatron-fsdp"), ("0.5.1", "megatron-fsdp 0.5.1 is installed")]
)
def test_the_package_is_there_in_a_known_version(
    monkeypatch: pytest.MonkeyPatch, cuda: None, version: str | None, text: str
) -> None:
    def answer(name: str) -> str:
        if version is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr(importlib.metadata, "version", answer)
    ((what, instead),) = findings()
    assert text in what and instead == "pip install 'nemo_dist_conf[megatron]'"


def test_classes_are_looked_up_without_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("from mine.blocks import Block\n")
    (tmp_path / "mine" / "blocks.py").write_text("raise SystemExit\nclass Block: ...\n")
    (tmp_path / "alone.py").write_text("raise SystemExit\nclass Layer: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    for path in ("mine.blocks.Block", "mine.Block", "alone.Layer", "__main__.Block"):
        assert unknown_class(path) is None
    assert unknown_class("alone.Layer.Inner") == "names no class: alone.py has no Inner"
    assert unknown_class("Block") == "is not a class path"
    assert unknown_class("mine.2.Block") == "is not a class path"
    assert unknown_class("mine.blocks.Blok") == "names no class: blocks.py has no Blok"
    assert unknown_class("mine.layers.Block") == "is in no module: mine has no layers"
    assert unknown_class("absent_here.Block") == "is in no module that is installed: there is no absent_here"
    assert "mine" not in sys.modules and "alone" not in sys.modules
