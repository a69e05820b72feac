"""Two launchers on this machine are the nodes of a sweep: they do the same, or both say why not."""

import json
import socket
import subprocess
import textwrap
import threading

import pytest
from omegaconf import OmegaConf

from nemo_dist_conf.launch.nodes import Nodes
from nemo_dist_conf.launch.settings import read_settings
from nemo_dist_conf.schema.launcher import TorchrunConf
from tests import warm

pytestmark = [pytest.mark.dist, pytest.mark.slow]

APP = """
    import os, random, time
    import hydra
    import torch.distributed as dist
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("draw", random.random)

    @hydra.main(version_base="1.3", config_path=".", config_name="config")
    def main(cfg):
        dist.init_process_group("gloo")
        rank = dist.get_rank()
        mine = [OmegaConf.to_container(cfg, resolve=True), HydraConfig.get().runtime.output_dir]
        all_of_them = [None] * dist.get_world_size()
        dist.all_gather_object(all_of_them, mine)
        assert all(other == mine for other in all_of_them), all_of_them
        if cfg.fails_on == rank:
            raise RuntimeError("no more")
        dist.barrier()
        dist.destroy_process_group()
        time.sleep(cfg.late_s[rank])
        return cfg.x * 10 + rank

    if __name__ == "__main__":
        main()
"""
CONFIG = """
x: 0
fails_on: null
late_s: [0, 0]
now: ${now:%f}
random: ${draw:}
"""


@pytest.fixture
def port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture
def start(tmp_path, port):
    """Starts the launcher of one node; what still runs at the end of the test is killed."""
    (tmp_path / "app.py").write_text(textwrap.dedent(APP))
    (tmp_path / "config.yaml").write_text(CONFIG)
    started = []

    def start(*words, patience_s=60):
        launcher = [
            "hydra/launcher=torchrun",
            "hydra.launcher.nnodes=2",
            "hydra.launcher.nproc_per_node=1",
            "hydra.launcher.start_method=fork",  # the quickest; which one it is makes no difference to nodes
            f"hydra.launcher.rdzv_endpoint=127.0.0.1:{port}",
            f"hydra.launcher.rdzv_timeout_s={patience_s}",
        ]
        started.append(warm.Program(["python", "app.py", "-m", *launcher, *words], cwd=tmp_path))
        return started[-1]

    yield start
    for child in started:
        child.kill()


@pytest.fixture
def both(start):
    """Runs two nodes to their end: (status, stdout, stderr) of each."""

    def both(*words, first=(), second=(), **options):
        children = [start(*words, *first, **options), start(*words, *second, **options)]
        outputs = [child.communicate(timeout=120) for child in children]
        return [(child.returncode, *output) for child, output in zip(children, outputs)]

    return both


def _sweep(folder):
    found = list(folder.glob("multirun/*/*"))
    assert len(found) == 1, "one folder for the sweep"
    records = [json.loads(line) for line in (found[0] / "sweep.jsonl").read_text().splitlines()]
    return found[0], records


def test_the_nodes_share_one_sweep_and_the_ranks_of_a_job_one_tree(both, tmp_path):
    """One record a job: the file is written by one node. That trees and folders are equal is asserted in the ranks."""
    ends = both("x=1,2")
    assert [status for status, *_ in ends] == [0, 0], ends
    folder, records = _sweep(tmp_path)
    assert [(r["job"], r["status"], r["value"], r["ranks"]) for r in records] == [
        (0, "completed", 10, 2),
        (1, "completed", 20, 2),
    ]
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["0", "1"]
    assert len(list(folder.rglob(".hydra"))) == 2
    trees = [OmegaConf.load(folder / job / ".hydra" / "resolved.yaml") for job in "01"]
    assert trees[0].random != trees[1].random
    assert {path.name for path in (folder / "0").iterdir()} >= {"app.log", "app.rank1.log"}
    assert sum("sweep.md" in out for _, out, _ in ends) == 1, "one node shows the table"


def test_ranks_may_end_further_apart_than_nodes_wait_for_one_another(both, tmp_path):
    ends = both("late_s=[6,0],[0,6]", patience_s=4)
    assert [status for status, *_ in ends] == [0, 0], ends
    assert [record["value"] for record in _sweep(tmp_path)[1]] == [0, 0]


def test_a_static_rendezvous_runs_several_jobs(both, tmp_path):
    """Its leading node is node_rank 0, whichever comes first, and rank 0 runs there."""
    words = ["x=1,2,3", "hydra.launcher.rdzv_backend=static"]
    ends = both(*words, first=["hydra.launcher.node_rank=1"], second=["hydra.launcher.node_rank=0"])
    assert [status for status, *_ in ends] == [0, 0], ends
    assert [record["value"] for record in _sweep(tmp_path)[1]] == [10, 20, 30]
    assert "sweep.md" in ends[1][1]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_job_that_fails_on_one_node_fails_on_both_with_what_came_first(both, tmp_path, rank):
    """Not with the connection that the other rank lost then; with one node leading or the other."""
    ends = both("x=1,2", f"fails_on={rank}")
    assert [status for status, *_ in ends] == [1, 1]
    for _, _, stderr in ends:
        assert stderr.startswith(f"job #0 failed: x=1 fails_on={rank}\n  rank {rank}: RuntimeError: no more\n"), ends
    assert [record["status"] for record in _sweep(tmp_path)[1]] == ["failed", "not started"]


def test_a_sweep_goes_on_on_both_nodes_after_a_job_that_failed(both, tmp_path):
    ends = both("fails_on=1,null", "hydra.launcher.on_failure=continue")
    assert [status for status, *_ in ends] == [1, 1]
    assert [record["status"] for record in _sweep(tmp_path)[1]] == ["failed", "completed"]


def test_nodes_with_different_overrides_are_refused_on_both(both, tmp_path):
    ends = both(first=["x=1,2"], second=["x=1,3"])
    assert [status for status, *_ in ends] == [1, 1]
    for _, _, stderr in ends:
        what, asked, _, instead = stderr.splitlines()[:4]
        assert what.startswith("the nodes of this sweep have different jobs: #1 ")
        assert {asked.split()[-1], instead.split()[-1]} == {"x=1,2", "x=1,3"}
        assert "Traceback" not in stderr
    assert not list(tmp_path.glob("multirun/*/*")), "a refused sweep leaves nothing"


def test_what_the_leading_node_refuses_is_said_on_both(both, tmp_path):
    """Here its folder, where another sweep is running."""
    import fcntl

    (tmp_path / "taken").mkdir()
    with (tmp_path / "taken" / "sweep.jsonl").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        ends = both("x=1", "hydra.sweep.dir=taken")
    assert [status for status, *_ in ends] == [1, 1]
    assert all("another sweep is running in" in stderr for _, _, stderr in ends), ends


def test_a_second_node_that_does_not_come_is_named_after_the_time_given(start, tmp_path):
    child = start("x=1", patience_s=3)
    _, stderr = child.communicate(timeout=60)
    assert child.returncode == 1
    assert stderr.startswith("another node of this sweep did not answer within 3 s\n"), stderr
    assert "type     hydra.launcher.rdzv_timeout_s=6" in stderr
    assert not list(tmp_path.glob("multirun/*/*"))


def test_a_node_that_ends_without_a_word_does_not_leave_the_other_waiting(start, port):
    """The launcher that does not serve the meeting is killed before the first job."""
    waiting = start("x=1", patience_s=5)
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    store.wait(["nemo_dist_conf/sweep/joined"])
    assert store.add("nemo_dist_conf/sweep/joined", 1) == 2, "this test joins as the second node and says nothing"
    store.add("nemo_dist_conf/sweep/alive/1", 1)
    _, stderr = waiting.communicate(timeout=60)
    assert waiting.returncode == 1 and "did not answer within 5 s" in stderr


@pytest.mark.parametrize("backend", ["c10d", "static"])
def test_a_node_that_ends_waits_for_one_that_joined_and_showed_no_life_yet(port, monkeypatch, backend):
    """Which would else find the store gone instead of what the leading node refused."""
    from torch.distributed import PrefixStore, TCPStore

    monkeypatch.setattr("atexit.register", lambda function: None)
    options = TorchrunConf(nnodes=2, rdzv_endpoint=f"127.0.0.1:{port}", rdzv_backend=backend)
    options.node_rank = 0 if backend == "static" else None
    nodes = Nodes(read_settings(vars(options)))
    other = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    store = PrefixStore("nemo_dist_conf/sweep", other)
    store.add("joined" if backend == "c10d" else "joined/1", 1)
    leaving = threading.Thread(target=nodes._leave)
    leaving.start()
    leaving.join(0.5)
    assert leaving.is_alive()
    store.set("left/1", "1")
    leaving.join(5)
    assert not leaving.is_alive()


def test_a_third_node_is_refused_and_the_two_go_on(start, tmp_path):
    nodes = [start("late_s=[8,8]"), start("late_s=[8,8]")]
    folder = tmp_path / "multirun"
    for _ in range(300):
        if list(folder.glob("*/*/0/.hydra")):
            break
        try:
            nodes[0].wait(0.1)
        except subprocess.TimeoutExpired:
            pass
    third = start("late_s=[8,8]")
    _, stderr = third.communicate(timeout=60)
    assert third.returncode == 1
    assert stderr.startswith("2 nodes have joined the sweep 'sweep' at 127.0.0.1:"), stderr
    assert "type     hydra.launcher.rdzv_id=sweep2" in stderr
    assert [node.wait(60) for node in nodes] == [0, 0]


def test_a_node_rank_is_taken_once(both):
    words = ["hydra.launcher.rdzv_backend=static", "hydra.launcher.node_rank=0"]
    ends = both(*words, "x=1", patience_s=5)
    assert [status for status, *_ in ends] == [1, 1]
    stderr = [stderr.splitlines()[0] for _, _, stderr in ends]
    assert sum("did not answer within 5 s" in line for line in stderr) == 1, stderr
    assert sum("cannot meet" in line or "node_rank=0" in line for line in stderr) == 1, stderr
