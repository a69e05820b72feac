"""Each benchmark still runs, checks what it measures, and writes its table; how fast anything is, is not asserted."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests import warm

ROOT = Path(__file__).parent.parent
#: These measure processes as they start, which has to be in a fresh interpreter.
FRESH = ("compose", "startup")
WORDS = {"result.json": "json", "result.md": "markdown", "chart.svg": "chart"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "rows", "shown"),
    [
        ("overhead", 1, ("wrap [ms]", "step [ms]", "memory [MB]")),
        ("checkpoint", 7, ("save", "pause", "plain dcp")),
        ("context", 7, ("causal, by hand with a mask", "packed documents", "512 tokens [MB]")),
        ("compose", 15, ("show a plain app's config", "groups typed", "complete strategy=", "refuse")),
        ("plan", 2, ("plan, 2,048 ranks", "search, 8 ranks", "Llama 3 70B, 64 A100, full")),
        ("layouts", 2, ("pp 2 x dp_shard 2", "dp_shard 2 x cp 2", "step [ms]")),
        ("scaling", 5, ("fsdp2, tp 8", "last fifth")),
        ("startup", 2, ("the recipe", "by hand")),
        ("launch", 2, ("torchrun, by hand", "hydra/launcher=torchrun, forkserver")),
    ],
)
def test_quick_run(tmp_path, name, rows, shown):
    files = [tmp_path / "result.json", tmp_path / "result.md"]
    words = ["python", f"benchmarks/{name}.py", "--quick", "--json", str(files[0]), "--markdown", str(files[1])]
    if name in FRESH:
        words[0] = sys.executable
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=280)
    else:
        done = warm.run(words, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(files[0].read_text())
    assert len(report["results"]) == rows
    assert {"date", "command", "hardware", "versions"} <= set(report)
    text = files[1].read_text()
    assert all(word in done.stdout and word in text for word in shown)
    assert report["versions"]["hydra-core"] in text


@pytest.mark.slow
def test_peers_do_the_same_work(tmp_path):
    """Those whose packages the extra test brings, in this environment; the benchmark itself compares every loss."""
    peers = ("ours", "accelerate_side", "fabric_side")
    names = ("result.json", "result.md", "chart.svg")
    written = [word for name in names for word in (f"--{WORDS[name]}", str(tmp_path / name))]
    words = ["--quick", "--side", *peers, "--checkpointing", "on"]
    done = warm.run(["python", "benchmarks/peers", *words, *written], cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "result.json").read_text())
    assert [result["strategy"] for result in report["results"]] == ["ddp", "fsdp2", "tp"]
    assert all(result["checkpointing"] for result in report["results"])
    for result in report["results"]:
        left_out = {"accelerate_side"} if result["strategy"] == "tp" else set()
        assert set(result["sides"]) == {"hand", *peers} - left_out
    text = (tmp_path / "result.md").read_text()
    assert all(title in text for title in ("by hand", "nemo_dist_conf", "Accelerate", "an empty Hydra app"))
    bars = ElementTree.parse(tmp_path / "chart.svg").getroot().iter("{http://www.w3.org/2000/svg}rect")
    assert len(list(bars)) == 2 * (3 * 3 - 1) + 3  # measures, jobs and sides beside the base; each name of the legend


@pytest.mark.slow
def test_bad_input_is_refused_before_anything_starts(tmp_path):
    """Three cases in this environment; every one of ours is refused or runs, whatever the others do."""
    files = [tmp_path / "result.json", tmp_path / "result.md"]
    words = ["python", "benchmarks/bad_input.py", "--quick", "--json", str(files[0]), "--markdown", str(files[1])]
    done = warm.run(words, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    results = {result["intent"]: result for result in json.loads(files[0].read_text())["results"]}
    misspelt, stages, doubtful = results.values()
    assert [one["ours"]["outcome"] for one in (misspelt, stages, doubtful)] == ["refused", "refused", "runs"]
    assert misspelt["ours"]["helps"] and stages["ours"]["helps"]
    assert {side: found["outcome"] for side, found in misspelt["others"].items()} == {
        "hand": "error in wrapping",
        "accelerate": "error in wrapping",
    }
    assert {side: found["held"] for side, found in doubtful["others"].items()} == {
        "fabric": pytest.approx(0.5, abs=0.02)
    }
    assert "FSDP2Conf" in files[1].read_text()


def test_the_operations_that_mfu_counts_are_those_that_torch_counts(monkeypatch):
    """Of forward and backward; attention written out, so that its products are matrix products like the others."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "peers")
    work = importlib.import_module("work")
    from torch.utils.flop_counter import FlopCounterMode

    job = work.Job("ddp", "0.04M", "fp32", 1)
    model, batch = work.build(job), next(work.batches(job, 0))
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counted:
        work.loss_of(model, batch).backward()
    tokens = batch[:, 1:].numel()
    assert counted.get_total_flops() == work.flops_per_token(job.size) * tokens
