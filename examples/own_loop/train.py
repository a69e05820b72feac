"""A training loop to copy: rows shared out, averaged weights, validation, checkpoints, SIGTERM and going on.

python train.py strategy=ddp
torchrun --nproc-per-node 2 train.py strategy=fsdp2
The same command again goes on where the last one stopped, on any number of ranks and under any strategy.
"""

import hydra
import torch
from torch import nn
from torch.utils.data import TensorDataset

import nemo_dist_conf
from nemo_dist_conf.checkpoint import Checkpoints
from nemo_dist_conf.gradients import accumulate, clip_grad_norm_
from nemo_dist_conf.own_loop import GlobalBatches, Preemption, from_main


def build_model() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))


def make_rows(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = torch.randn(count, 8, generator=torch.Generator().manual_seed(0))
    return inputs, (inputs[:, :1] + inputs[:, 1:2].square() - 1).sign()


def validate(model: nn.Module, dataset: TensorDataset, batches: GlobalBatches) -> float:
    """The share of rows that are told right; every rank makes as many batches, and each row counts once."""
    device, right = batches.mesh.device, []
    model.eval()
    batches.rewind()
    with torch.no_grad():
        for inputs, targets in batches.loader(dataset):
            hits = (model(inputs.to(device)).float().sign() == targets.to(device)).float()
            right.append(hits[batches.counted.to(device)])
    model.train()
    return batches.mesh.gather_over_data(torch.cat(right)).mean().item()


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg) -> None:
    def adamw(parameters):
        return torch.optim.AdamW(parameters, lr=0.01)

    setup, model, optimizer = nemo_dist_conf.instantiate(cfg, model=build_model, optimizer=adamw)
    mesh = setup.mesh_context
    inputs, targets = from_main(lambda: make_rows(cfg.rows))  # what one rank fetches or makes, all ranks have
    held_out = cfg.rows // 5
    train, test = (TensorDataset(inputs[part], targets[part]) for part in (slice(held_out, None), slice(held_out)))
    rows = GlobalBatches(len(train), cfg.batch, mesh, seed=cfg.seed, epochs=cfg.epochs)
    unseen = GlobalBatches(len(test), cfg.batch, mesh, shuffle=False)
    ema = nemo_dist_conf.EMA(model, decay=0.9)
    state = {"rows": rows, "ema": ema}
    with Checkpoints(cfg.folder, keep=2) as checkpoints, Preemption() as preemption:
        restored = checkpoints.restore(model, optimizer, objects=state)
        step = restored.step if restored is not None else 0
        for x, y in rows.loader(train):
            preemption.begin_step()
            counted = rows.counted.to(mesh.device)
            total = mesh.sum_over_data(counted.sum())
            with accumulate(model, last=True):
                loss = (model(x.to(mesh.device)).float() - y.to(mesh.device)).square()[counted].sum()
                (loss * mesh.gradient_size / total).backward()
            clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            ema.update()
            step += 1
            mean = mesh.sum_over_data(loss.detach()) / total
            if mesh.is_main:
                print(f"step {step}  loss {mean:.4f}")
            is_due = preemption.is_due()
            if is_due or step % cfg.save_every == 0 or not len(rows):
                checkpoints.save(step, model, optimizer, objects=state, config=cfg)
            if is_due:
                preemption.end(f"stopped after step {step}; the same command goes on")
        with ema.applied():
            share = validate(model, test, unseen)
    if mesh.is_main:
        print(f"told right {share:.3f}")


if __name__ == "__main__":
    main()
