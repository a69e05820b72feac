"""Composing, help, completion and refusing never import torch: proven in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

TORCH_FREE_MODULES = [
    "nemo_dist_conf",
    "hydra_plugins.nemo_dist_conf.torchrun_launcher",
    "nemo_dist_conf.composition.sweep_check",
    "nemo_dist_conf.launch.sweep",
    "nemo_dist_conf.composition.agreement.config_agreement",
    "hydra_plugins.nemo_dist_conf.search_path",
    "nemo_dist_conf.composition.check",
    "nemo_dist_conf.explain",
    "nemo_dist_conf.composition.groups",
    "nemo_dist_conf.hooks",
    "nemo_dist_conf.families.config_facts",
    "nemo_dist_conf.families.plans",
    "nemo_dist_conf.families.registry",
    "nemo_dist_conf.families.model_rules",
    "nemo_dist_conf.composition.resolvers",
    "nemo_dist_conf.schema",
    "nemo_dist_conf.composition.store",
    "nemo_dist_conf.strategies",
    "nemo_dist_conf.topology",
    "nemo_dist_conf.topology.gpu_presence",
    "nemo_dist_conf.topology.launched_ranks",
    "nemo_dist_conf.train",
    "nemo_dist_conf.train.__main__",
    "nemo_dist_conf.recipe.checks",
    "hydra_plugins.nemo_dist_conf.layouts_sweeper",
    "nemo_dist_conf.families.shapes",
    "nemo_dist_conf.plan",
    "nemo_dist_conf.plan.__main__",
    "nemo_dist_conf.plan.command",
    "nemo_dist_conf.plan.drawing",
    "nemo_dist_conf.plan.sweeper",
]


def test_importing_them_does_not_import_torch():
    """One after the other in one process: the first that imports torch is named."""
    code = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
"""
    command = [sys.executable, "-c", code, *TORCH_FREE_MODULES]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _recipe(*words: str, env: dict[str, str] | None = None, cwd: Path) -> subprocess.CompletedProcess:
    """Run the recipe with an import of torch turned into an error."""
    (cwd / "torch").mkdir(exist_ok=True)
    (cwd / "torch" / "__init__.py").write_text("raise AssertionError('torch was imported')")
    path = os.pathsep.join([str(cwd), str(ROOT)])
    return subprocess.run(
        [sys.executable, "-m", "nemo_dist_conf.train", *words],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
    )


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["--cfg", "job", "strategy=ddp"], "find_unused_parameters: false"),
        (["--cfg", "job", "--resolve"], "param_dtype: float32"),
        (["--help"], "strategy: ddp, fsdp2, megatron-fsdp, megatron_fsdp, mfsdp"),
        (["--help"], "strategy.reshard_after_forward"),
        (["--info", "defaults"], "nemo_dist_conf"),
    ],
)
def test_showing_a_config_does_not_import_torch(words, shown, tmp_path):
    run = _recipe(*words, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert shown in run.stdout


def test_a_config_is_composed_with_the_chosen_strategy_alone():
    """Without the rules of others, of sizes, of checks: each is imported by what asks for it."""
    code = """
import sys
from hydra import compose, initialize
with initialize(config_path=None, version_base="1.3"):
    cfg = compose("nemo_dist_conf", ["strategy=ddp"])
assert cfg.strategy.find_unused_parameters is False
print(*(name for name in sys.modules if name.startswith("nemo_dist_conf.")))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = set(done.stdout.split())
    assert "nemo_dist_conf.strategies.ddp" in found
    others = ("strategies.fsdp2", "strategies.megatron_fsdp", "topology.solve", "topology.pipeline", "compose")
    assert not found & {f"nemo_dist_conf.{name}" for name in others}


def test_tab_completion_lists_our_options_without_torch(tmp_path):
    line = "train.py strategy="
    env = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    run = _recipe("-sc", "query=bash", env=env, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert {"strategy=ddp", "strategy=fsdp2", "strategy=mfsdp"} <= set(run.stdout.split())


def test_a_refusal_comes_before_torch_is_imported_and_before_a_folder_is_made(tmp_path):
    run = _recipe("strategy=ddp", "parallelism.tp_size=2", cwd=tmp_path)
    assert run.returncode == 1
    assert run.stdout == ""
    assert run.stderr == (
        "strategy=ddp: tp_size=2 is not possible\n"
        "  asked    strategy=ddp parallelism.tp_size=2\n"
        "  allowed  tp_size=1 (ddp keeps the whole model on every rank)\n"
        "  type     torchrun --nproc-per-node 2 -m nemo_dist_conf.train strategy=fsdp2 parallelism.tp_size=2\n"
    )
    assert not (tmp_path / "outputs").exists()


def test_the_guard_itself_notices_torch(tmp_path):
    run = _recipe("train.steps=1", "train.warmup_steps=0", cwd=tmp_path)
    assert run.returncode != 0 and "torch was imported" in run.stderr
