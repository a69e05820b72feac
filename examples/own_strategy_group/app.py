"""An app whose own group is called ``strategy``; ours is reached by its namespaced name.

python app.py strategy=ddp nemo_dist/strategy@dist.strategy=ddp
"""

import hydra
from omegaconf import DictConfig

from nemo_dist_conf.composition.check import check


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg: DictConfig) -> None:
    print(f"decoding: {cfg.strategy.name}, training: {check(cfg).strategy.name}")


if __name__ == "__main__":
    main()
