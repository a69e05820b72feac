"""How often a good run ends badly: ``python -m tests.end_of_run [times] [without]`` starts one that ends on a
checkpoint, on 2 ranks, and counts those that torchrun takes for failed. without: as without runtime/
interpreter_exit.py.

Some 15 minutes for 200 on a machine without other work, so not in the suite, which has tests/runtime/
test_interpreter_exit.py.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

PROGRAM = textwrap.dedent(
    """
    import atexit, sys, tempfile
    import torch
    from hydra import compose, initialize
    from torch import nn
    import nemo_dist_conf
    from nemo_dist_conf.checkpoint import Checkpoints
    from nemo_dist_conf.runtime.interpreter_exit import let_gloo_rest

    if "without" in sys.argv:
        atexit.unregister(let_gloo_rest)
    with initialize(version_base="1.3", config_path=None):
        cfg = compose("nemo_dist_conf", overrides=["strategy=fsdp2", "strategy.mp_policy=null"])
    build = lambda: nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2)))
    setup, model, optimizer = nemo_dist_conf.instantiate(cfg, model=build, optimizer=lambda p: torch.optim.AdamW(p))
    model(torch.ones(2, 8)).sum().backward()
    optimizer.step()
    folder = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)
    with Checkpoints(folder[0], resume=None) as checkpoints:
        checkpoints.save(1, model, optimizer, config=cfg)
    print("done", flush=True)
    """
)


def main(times: int, words: list[str]) -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "app.py")
        program.write_text(PROGRAM)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        for number in range(1, times + 1):
            done = subprocess.run([*launcher, str(program), *words], capture_output=True, text=True, cwd=folder)
            if done.returncode or done.stdout.count("done") != 2:
                failed += 1
                print(done.stderr[-2000:])
            if number % 20 == 0 or number == times:
                print(f"{failed} of {number} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:] if word.isdigit()]
    raise SystemExit(main(numbers[0] if numbers else 200, [word for word in sys.argv[1:] if word == "without"]))
