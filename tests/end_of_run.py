"""How often a good run ends badly: ``python -m tests.end_of_run [times]`` starts one that ends on a checkpoint, on 2
ranks, and counts those that torchrun takes for failed. Some 15 minutes for 200, and not in the suite, which has
tests/runtime/test_ending.py.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

PROGRAM = textwrap.dedent(
    """
    import tempfile
    import torch
    from hydra import compose, initialize
    from torch import nn
    import nemo_dist_conf
    from nemo_dist_conf.checkpoint import Checkpoints

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


def main(times: int) -> int:
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "app.py")
        program.write_text(PROGRAM)
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        for number in range(1, times + 1):
            done = subprocess.run([*launcher, str(program)], capture_output=True, text=True, cwd=folder)
            if done.returncode or done.stdout.count("done") != 2:
                failed += 1
                print(done.stderr[-2000:])
            if number % 20 == 0 or number == times:
                print(f"{failed} of {number} failed", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]) if len(sys.argv) > 1 else 200))
