"""Imports go down the table of layers only, and composing stays torch-free; types, style and format."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LINT = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LINT, "--config", "setup.cfg", "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_imports_go_down_the_layers_only() -> None:
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "module, line, contract",
    [
        ("topology/solve.py", "from nemo_dist_conf.strategies import STRATEGIES", "Layers of nemo_dist_conf"),
        ("composition/check.py", "import nemo_dist_conf.runtime", "Layers of nemo_dist_conf"),
        ("stray.py", "", "Layers of nemo_dist_conf"),
        ("plan/plan.py", "from nemo_dist_conf.plan.text_report import table", "Layers of the plan"),
        ("schema/moe.py", "def later():\n    import torch", "Names, schemas and topology"),
    ],
    ids=["upwards", "runtime", "without a place", "inside the plan", "torch"],
)
def test_a_breach_is_found(tmp_path: Path, module: str, line: str, contract: str) -> None:
    """The contracts above are not empty: a copy with one wrong import (or a module without a place) breaks them."""
    for part in ("nemo_dist_conf", "hydra_plugins"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "setup.cfg", tmp_path)
    with (tmp_path / "nemo_dist_conf" / module).open("a") as file:
        file.write(f"\n{line}\n")
    done = lint(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    broken = [text for text in done.stdout.splitlines() if " BROKEN" in text]
    assert any(text.startswith(contract) for text in broken), done.stdout


def test_composing_loads_neither_torch_nor_the_runtime() -> None:
    """Nothing that a composed config needs imports torch, whatever way it would take."""
    script = """
import importlib, pkgutil, sys
import nemo_dist_conf
layers = "errors names wording schema topology families strategies composition compose hooks".split()
for layer in layers:
    module = importlib.import_module("nemo_dist_conf." + layer)
    for found in pkgutil.walk_packages(getattr(module, "__path__", []), module.__name__ + "."):
        importlib.import_module(found.name)
import hydra_plugins.nemo_dist_conf.search_path
heavy = ("torch", "transformers", "megatron_fsdp", "nemo_dist_conf.runtime", "nemo_dist_conf.train")
print(*[name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_mypy_has_nothing_to_say() -> None:
    command = [sys.executable, "-m", "mypy", "--cache-dir", os.devnull]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def ruff(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ruff", *words, "--no-cache"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_ruff_finds_neither_style_nor_import_order_to_change() -> None:
    done = ruff("check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_file_is_as_ruff_formats_it() -> None:
    done = ruff("format", "--check")
    assert done.returncode == 0, done.stdout + done.stderr


def test_ruff_leaves_out_no_folder_of_ours() -> None:
    """Its own list leaves out every folder that is called dist, and so tests/dist."""
    seen = {Path(line).relative_to(ROOT) for line in ruff("check", "--show-files").stdout.splitlines()}
    folders = ("benchmarks", "conf", "docs", "examples", "hydra_plugins", "nemo_dist_conf", "tests", ".ci")
    files = {path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py")}
    assert files - seen == set()


# One line of bad style each, otherwise as the formatter writes it: what pyflakes and pycodestyle know, import order.
CHECKED = [
    "import sys\nimport os\n\nprint(os, sys)\n",
    "import os\n",
    "print(nowhere)\n",
    "def twice():\n    pass\n\n\ndef twice():\n    pass\n",
    "def unused():\n    value = 1\n",
    'print("%s" % (1, 2))\n',
    'print(f"")\n',
    'assert (1, "always true")\n',
    "if print == None:\n    pass\n",
    "value = lambda: 1\n",
    "try:\n    pass\nexcept:\n    pass\n",
    "if type(1) == type(2):\n    pass\n",
    "l = 1\n",
    'print("\\d")\n',
    f"# {'word ' * 30}end\n",
    "print(1)  # noqa: E501\n",
]
FORMATTED = [
    "def close():\n    pass\ndef by():\n    pass\n",
    "print( 1 )\n",
    "print(1,2)\n",
    "if print:\n  pass\n",
    "print(1); print(2)\n",
    "print(1) \n",
    "print(1)\n\n\n",
    "print(1)",
    "\tprint(1)\n",
]


@pytest.mark.parametrize(
    "words, texts", [(["check"], CHECKED), (["format", "--check"], FORMATTED)], ids=["check", "format"]
)
def test_bad_style_is_found(tmp_path: Path, words: list[str], texts: list[str]) -> None:
    for number, text in enumerate(texts):
        (tmp_path / f"sample{number}.py").write_text(text)
    done = ruff(*words, "--config", str(ROOT / "ruff.toml"), folder=tmp_path)
    said = done.stdout + done.stderr
    assert [text for number, text in enumerate(texts) if f"sample{number}.py" not in said] == []
