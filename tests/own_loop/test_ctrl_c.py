"""Ctrl-C before the training begins."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os, signal
from nemo_dist_conf.own_loop.ctrl_c import end_at_once
end_at_once()
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    raise SystemExit("interrupted as ever")
"""


@pytest.mark.parametrize(
    ("environ", "outcome"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, (130, "stopped by Ctrl-C before the first step\n")),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (130, "")),
        ({}, (1, "interrupted as ever\n")),
    ],
    ids=["rank 0", "rank 1", "alone"],
)
def test_a_rank_that_is_stopped_before_it_begins_ends_with_one_line(environ, outcome):
    environ = {**environ, "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"} if environ else {}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env={**os.environ, **environ}, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == outcome
