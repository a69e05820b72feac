"""``python -m nemo_dist_conf.plan [overrides]``."""

from __future__ import annotations

import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from nemo_dist_conf.errors import NemoDistConfError
from nemo_dist_conf.recipe.yaml_folder import config_folder, main_options

__all__ = ["checked_main", "main"]


@hydra.main(config_path=str(config_folder()), config_name="plan", **main_options())
def main(cfg: DictConfig) -> None:
    """Print the plan of the config."""
    from nemo_dist_conf.composition.agreement.shared_failure import end
    from nemo_dist_conf.composition.printed import show
    from nemo_dist_conf.plan.command import run

    try:
        show(run(cfg, HydraConfig.get()))
    except NemoDistConfError as error:
        end(error)


def checked_main() -> None:
    """``main``, once Hydra can read the words."""
    from nemo_dist_conf.recipe.group_words import refuse_words

    try:
        refuse_words(sys.argv[1:])
    except NemoDistConfError as error:
        from nemo_dist_conf.composition.agreement.shared_failure import end

        end(error)
    main()


if __name__ == "__main__":
    checked_main()
