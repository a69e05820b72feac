"""A Hydra app that existed before: own groups, own model by _target_, own loop; distribution below ``dist``.

python app.py strategy@dist.strategy=ddp model=wide
torchrun --nproc-per-node 2 app.py dist.parallelism.tp_size=2
"""

import hydra
import torch
from omegaconf import DictConfig
from torch import nn

import nemo_dist_conf
from nemo_dist_conf.gradients import accumulate


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Regressor(nn.Module):
    """Says itself where its blocks are and how they split over tensor-parallel ranks."""

    distributed_blocks = "layers"
    tp_plan = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.inp = nn.Linear(1, width)
        self.layers = nn.ModuleList(Layer(width) for _ in range(depth))
        self.out = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inp(x)
        for layer in self.layers:
            x = layer(x)
        return self.out(x)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    # The hook finds our groups wherever they stand; model and seed are the app's own keys.
    setup, model, optimizer = nemo_dist_conf.instantiate(cfg, optimizer=lambda p: torch.optim.Adam(p, lr=cfg.lr))
    mesh = setup.mesh_context
    x = torch.arange(cfg.data.rows, dtype=torch.float32).view(-1, 1) / cfg.data.rows
    mine = x.chunk(mesh.data_size)[mesh.data_rank].to(mesh.device)
    for _ in range(cfg.steps):
        with accumulate(model, last=True):
            loss = (model(mine).float() - torch.sin(6 * mine)).square().mean()
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    final = (mesh.sum_over_data(loss.detach()) / mesh.data_size).item()
    if mesh.is_main:
        print(f"{type(setup.strategy_config).__name__} on {mesh.layout()}: loss {final:.5f}")
    return final


if __name__ == "__main__":
    main()
