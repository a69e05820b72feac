"""Optuna chooses layout and learning rate; each trial runs on two ranks, and Optuna gets rank 0's value.

python app.py -m
python app.py -m hydra.sweeper.n_trials=20 hydra.sweeper.study_name=lr hydra.sweeper.storage=sqlite:///study.db

Needs: pip install hydra-optuna-sweeper
"""

import hydra
import torch
from omegaconf import DictConfig
from torch import nn

import nemo_dist_conf


class Net(nn.Module):
    tp_plan = {"up": "colwise", "down": "rowwise"}

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    setup, model, optimizer = nemo_dist_conf.instantiate(
        cfg, model=Net, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=cfg.lr)
    )
    mesh = setup.mesh_context
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(cfg.seed))
    mine = x.chunk(mesh.data_size)[mesh.data_rank].to(mesh.device)
    for _ in range(cfg.steps):
        loss = (model(mine).float() - mine.square().mean(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    final = (mesh.sum_over_data(loss.detach()) / mesh.data_size).item()
    return final if final < 1e3 else float("nan")  # a trial without a finite value has failed


if __name__ == "__main__":
    main()
