"""A Lightning Fabric script: Fabric has the loop and the data, the config decides about meshes and wrapping.

python app.py strategy=ddp
torchrun --nproc-per-node 2 app.py strategy.mp_policy=null parallelism.tp_size=2
python app.py -m hydra/launcher=torchrun hydra.launcher.nproc_per_node=2 strategy=ddp,fsdp2

Needs: pip install lightning-fabric
"""

import os

import hydra
import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import ModelParallelStrategy
from omegaconf import DictConfig
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import nemo_dist_conf
from nemo_dist_conf.gradients import clip_grad_norm_
from nemo_dist_conf.strategies.ddp import DDPManager
from nemo_dist_conf.strategies.fsdp2 import FSDP2Manager


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    tp_plan = {"layers.*.up": "colwise", "layers.*.down": "rowwise"}

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(Layer(width), Layer(width))
        self.out = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.layers(x))


def fabric_for(setup: nemo_dist_conf.DistributedSetup) -> Fabric:
    """Fabric on the ranks, the process group and the meshes that are there already; it starts none itself."""
    mesh = setup.mesh_context
    kind = DDPManager if isinstance(setup.strategy_config, nemo_dist_conf.DDPConfig) else FSDP2Manager
    manager = kind(setup.strategy_config, mesh.device_mesh)
    strategy = ModelParallelStrategy(
        lambda model, _: manager.parallelize(model),  # our mesh has more axes than Fabric's own
        data_parallel_size=mesh.data_size,
        tensor_parallel_size=mesh.tp_size,
    )
    nodes, ranks = int(os.environ.get("GROUP_WORLD_SIZE", 1)), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    fabric = Fabric(accelerator=mesh.device.type, devices=ranks, num_nodes=nodes, strategy=strategy)
    fabric.launch()
    return fabric


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> float:
    setup, _, _ = nemo_dist_conf.instantiate(cfg)
    fabric = fabric_for(setup)
    fabric.seed_everything(cfg.seed)
    model = fabric.setup_module(Net(cfg.width))
    optimizer = fabric.setup_optimizers(torch.optim.SGD(model.parameters(), lr=cfg.lr))
    inputs = torch.randn(cfg.rows, cfg.width)
    rows = TensorDataset(inputs, inputs.sin().mean(1, keepdim=True))
    # Fabric gives each data rank its rows; those of a step are the same ones under every layout.
    loader = fabric.setup_dataloaders(DataLoader(rows, cfg.batch_size // setup.mesh_context.data_size))
    for step, (x, y) in enumerate(loader):
        loss = (model(x).float() - y).square().mean()
        fabric.backward(loss)
        clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        mean = fabric.all_reduce(loss.detach())
        fabric.print(f"step {step}  loss {mean:.5f}  {setup.mesh_context.layout()}")
    return mean.item()


if __name__ == "__main__":
    main()
