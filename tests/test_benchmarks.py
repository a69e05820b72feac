"""Each benchmark still runs, checks what it measures, and writes its table; how fast anything is, is not asserted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("overhead", 1, ("wrap [ms]", "step [ms]", "memory [MB]")),
        ("checkpoint", 7, ("save", "pause", "plain dcp")),
        ("compose", 8, ("show a plain app's config", "complete db= in bash", "refuse a combination")),
        ("plan", 2, ("plan, 2,048 ranks", "search, 8 ranks", "Llama 3 70B, 64 A100, full")),
        ("layouts", 2, ("pp 2 x dp_shard 2", "dp_shard 2 x cp 2", "step [ms]")),
        ("launch", 2, ("torchrun, by hand", "hydra/launcher=torchrun, forkserver")),
    ],
)
def test_quick_run(tmp_path, name, rows, words):
    files = [tmp_path / "result.json", tmp_path / "result.md"]
    command = [sys.executable, f"benchmarks/{name}.py", "--quick", "--json", files[0], "--markdown", files[1]]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(files[0].read_text())
    assert len(report["results"]) == rows
    assert {"date", "command", "hardware", "versions"} <= set(report)
    text = files[1].read_text()
    assert all(word in done.stdout and word in text for word in words)
    assert report["versions"]["hydra-core"] in text
