"""Each example runs as its first lines say, and apps with names of their own are untouched by the plugin."""

import os
import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests import warm

ROOT = Path(__file__).parent.parent
EXAMPLES = ROOT / "examples"


def run(app: Path, *words: str, cwd: Path, env: dict[str, str] | None = None, code: int = 0):
    done = subprocess.run(
        [sys.executable, str(app), *words],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def train(app: Path, *words: str, ranks: int = 1, cwd: Path) -> str:
    launcher = ["torchrun", "--nproc-per-node", str(ranks)] if ranks > 1 else ["python"]
    done = warm.run([*launcher, str(app), *words], cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def losses(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"loss ([\d.]+)", text)]


@pytest.mark.slow
def test_minimal_gives_the_same_losses_under_every_strategy(tmp_path):
    app = EXAMPLES / "minimal" / "train.py"
    reference = losses(train(app, "strategy=ddp", cwd=tmp_path))
    assert len(reference) == 5 and reference[-1] < reference[0]
    assert losses(train(app, "strategy.mp_policy=null", "activation_checkpointing=true", cwd=tmp_path)) == reference
    sharded = losses(train(app, "strategy.mp_policy=null", ranks=2, cwd=tmp_path))
    assert sharded == pytest.approx(reference, rel=1e-3)
    assert "tp_size=2 is not possible" in run(app, "strategy=ddp", "parallelism.tp_size=2", cwd=tmp_path, code=1)


@pytest.mark.slow
def test_own_loop_goes_on_under_another_strategy_and_on_other_ranks_where_a_signal_stopped_it(tmp_path):
    app, words = EXAMPLES / "own_loop" / "train.py", ("rows=2500", "epochs=1", "strategy.mp_policy=null")
    whole = train(app, "strategy=ddp", *words[:2], "folder=whole", cwd=tmp_path)
    assert len(losses(whole)) == 63 and losses(whole)[-1] < losses(whole)[0] / 2
    command = [sys.executable, str(app), *words]
    environ = {**os.environ, "PYTHONUNBUFFERED": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, env=environ, stdout=pipe, stderr=pipe, text=True) as stopped:
        assert stopped.stdout is not None and stopped.stderr is not None
        read = next(line for line in iter(stopped.stdout.readline, "") if "loss" in line)
        stopped.send_signal(signal.SIGTERM)
        before = read + stopped.stdout.read()
        assert stopped.wait(60) == 128 + signal.SIGTERM, before
        assert "; the same command goes on" in stopped.stderr.read()
    after = train(app, "strategy=ddp", *words[:2], ranks=2, cwd=tmp_path)
    assert 0 < len(losses(before)) < 63
    assert losses(before) + losses(after) == pytest.approx(losses(whole), abs=2e-4)
    share = [float(re.findall(r"told right ([\d.]+)", text)[0]) for text in (whole, after)]
    assert share[0] == share[1] > 0.9
    assert "loss" not in (again := train(app, "strategy=ddp", *words[:2], cwd=tmp_path)) and "told right" in again


@pytest.mark.slow
def test_foreign_app_with_its_own_tree_below_a_package(tmp_path):
    app = EXAMPLES / "foreign_app" / "app.py"
    one = train(app, "strategy@dist.strategy=ddp", cwd=tmp_path)
    assert "DDPConfig on 1 rank: loss" in one
    two = train(app, "dist.strategy.mp_policy=null", "dist.parallelism.tp_size=2", ranks=2, cwd=tmp_path)
    assert "FSDP2Config on tp 2: loss" in two
    assert losses(two) == pytest.approx(losses(one), rel=1e-3)
    assert losses(train(app, "model=wide", "strategy@dist.strategy=ddp", cwd=tmp_path)) != losses(one)
    refused = run(app, "strategy@dist.strategy=ddp", "dist.parallelism.cp_size=2", cwd=tmp_path, code=1)
    assert "asked    strategy@dist.strategy=ddp dist.parallelism.cp_size=2" in refused


def test_an_own_group_called_strategy_is_untouched(tmp_path):
    app = EXAMPLES / "own_strategy_group" / "app.py"
    assert "decoding: greedy, training: fsdp2" in run(app, cwd=tmp_path)
    text = run(app, "strategy=ddp", "nemo_dist/strategy@dist.strategy=ddp", cwd=tmp_path)
    assert "decoding: decode_dual_path, training: ddp" in text
    assert "Could not find 'strategy/fsdp2'" in run(app, "strategy=fsdp2", cwd=tmp_path, code=1)


HIDE_PLUGIN = """
    import hydra_plugins, importlib.abc, sys

    class Hide(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name.startswith("hydra_plugins.nemo_dist_conf"):
                raise ModuleNotFoundError(name)

    sys.meta_path.insert(0, Hide())
"""

APP = """
    {hide}
    import dataclasses
    import hydra
    from hydra.core.config_store import ConfigStore

    @dataclasses.dataclass
    class Mine:
        speed: int = 3

    if {stored}:
        ConfigStore.instance().store(group="strategy", name="ddp", node=Mine)
        ConfigStore.instance().store(group="strategy", name="fast", node=Mine(speed=9))

    @hydra.main(version_base="1.3", config_path="conf", config_name="config")
    def main(cfg):
        print(cfg)

    if __name__ == "__main__":
        main()
"""


def _app(folder: Path, stored: bool, hidden: bool) -> Path:
    (folder / "conf").mkdir(parents=True)
    (folder / "conf" / "config.yaml").write_text("defaults:\n  - strategy: ddp\n  - _self_\nlr: 0.1\n")
    if not stored:
        (folder / "conf" / "strategy").mkdir()
        (folder / "conf" / "strategy" / "ddp.yaml").write_text("speed: 3\n")
        (folder / "conf" / "strategy" / "fast.yaml").write_text("speed: 9\n")
    text = textwrap.dedent(APP).format(hide=textwrap.dedent(HIDE_PLUGIN) if hidden else "", stored=stored)
    (folder / "app.py").write_text(text)
    return folder / "app.py"


@pytest.mark.parametrize("stored", [False, True], ids=["in YAML", "in its ConfigStore"])
@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--cfg", "job"], 0),
        (["strategy=fast"], 0),
        (["strategy=fast", "strategy.speed=1", "--cfg", "all"], 0),
        (["strategy=fsdp2"], 1),
        (["+parallelism.tp_size=2"], 0),
        (["-m", "strategy=ddp,fast"], 0),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_app_with_its_own_strategy_behaves_as_without_the_plugin(tmp_path, stored, words, code):
    with_plugin = run(_app(tmp_path / "with", stored, hidden=False), *words, cwd=tmp_path / "with", code=code)
    without = run(_app(tmp_path / "without", stored, hidden=True), *words, cwd=tmp_path / "without", code=code)

    def plain(text: str, folder: str) -> str:
        return re.sub(r"\d\d(\d\d)?[-:]\d\d[-:]\d\d(,\d+)?", "", text.replace(str(tmp_path / folder), ""))

    assert plain(with_plugin, "with") == plain(without, "without")


def test_our_options_are_listed_and_completed_in_a_foreign_app(tmp_path):
    app = _app(tmp_path, stored=True, hidden=False)
    (tmp_path / "conf" / "config.yaml").write_text((EXAMPLES / "minimal" / "conf" / "config.yaml").read_text())
    assert "strategy: ddp, fsdp2, megatron-fsdp, megatron_fsdp, mfsdp" in run(app, "--help", cwd=tmp_path)
    assert "nemo_dist_conf" in run(app, "--info", "defaults-tree", cwd=tmp_path)
    line = "train.py parallelism.tp"
    env = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    assert "parallelism.tp_size=" in run(app, "-sc", "query=bash", cwd=tmp_path, env=env)
