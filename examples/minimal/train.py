"""The smallest complete app: a module of your own, any strategy, any number of ranks.

python train.py strategy=ddp
torchrun --nproc-per-node 2 train.py strategy=fsdp2 activation_checkpointing=true
"""

import hydra
import torch
from torch import nn

import nemo_dist_conf
from nemo_dist_conf.gradients import accumulate, clip_grad_norm_


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


def build_model() -> nn.Module:
    return nn.Sequential(*(Block(32) for _ in range(4)), nn.Linear(32, 1))


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg) -> None:
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr=0.1)

    setup, model, optimizer = nemo_dist_conf.instantiate(cfg, model=build_model, optimizer=sgd, blocks="[0-3]")
    mesh = setup.mesh_context
    for step in range(5):
        inputs = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))  # the global batch of this step
        mine = inputs.chunk(mesh.data_size)[mesh.data_rank].to(mesh.device)
        with accumulate(model, last=True):
            loss = (model(mine).float() - mine.sum(1, keepdim=True)).square().mean()
            loss.backward()
        clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = mesh.sum_over_data(loss.detach()) / mesh.data_size
        if mesh.is_main:
            print(f"step {step}  loss {mean:.4f}  {mesh.layout()}")


if __name__ == "__main__":
    main()
