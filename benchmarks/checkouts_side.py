"""One rank of one side of checkouts.py: seconds of wrapping and of a step, as rank 0 sees them between barriers.

Uses nothing but the public names, which every checkout has.
"""

from __future__ import annotations

import gc
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hydra import compose, initialize_config_dir

from nemo_dist_conf import instantiate
from nemo_dist_conf.gradients import accumulate, clip_grad_norm_

BUILDS, STEPS = 8, 20
#: 0.4 million parameters: where what surrounds torch's own work shows most.
MODEL = {"model_type": "llama", "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
MODEL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 259}


def main(strategy: str, out: Path, quick: bool) -> None:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    place = out.parent / "conf"
    place.mkdir(exist_ok=True)
    Path(place, "app.yaml").write_text(f"defaults: [nemo_dist_conf, _self_]\nmodel: {{config: {json.dumps(MODEL)}}}\n")
    with initialize_config_dir(str(place), version_base="1.3"):
        cfg = compose("app", overrides=[f"strategy={strategy}", "+optimizer={name: sgd, lr: 0.01}"])
    made = instantiate(cfg)  # the first one starts the ranks
    wraps = []
    for _ in range(2 if quick else BUILDS):
        del made
        gc.collect()
        seconds, made = timed(lambda: instantiate(cfg))
        wraps.append(seconds)
    _, model, optimizer = made
    ids = torch.randint(0, 259, (4, 64))

    def step() -> None:
        with accumulate(model, last=True):
            model(input_ids=ids, labels=ids).loss.backward()
        clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    step()
    steps = [timed(step)[0] for _ in range(2 if quick else STEPS)]
    if dist.get_rank() == 0:
        out.write_text(json.dumps({"wrap": statistics.median(wraps), "step": statistics.median(steps)}))
    dist.barrier()
    dist.destroy_process_group()


def timed(call: Any) -> tuple[float, Any]:
    dist.barrier()
    began = time.perf_counter()
    result = call()
    dist.barrier()
    return time.perf_counter() - began, result


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), len(sys.argv) > 3)
