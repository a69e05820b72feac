"""``python -m nemo_dist_conf.train [overrides]``.

What checks a config is imported only when there is one to check, not for --help, --cfg and completion; torch only
after the config has passed.
"""

from __future__ import annotations

import logging
import signal
import sys

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, open_dict

from nemo_dist_conf.errors import NemoDistConfError, Preempted
from nemo_dist_conf.recipe.yaml_folder import config_folder, main_options

__all__ = ["checked_main", "main"]


@hydra.main(config_path=str(config_folder()), config_name="train", **main_options())
def main(cfg: DictConfig) -> float:
    """Train as the config says; the last loss is the job's value for sweepers."""
    from nemo_dist_conf.composition.agreement.shared_failure import end
    from nemo_dist_conf.composition.command_line import raw_words
    from nemo_dist_conf.own_loop.ctrl_c import BEFORE, hear_once, was_heard
    from nemo_dist_conf.recipe.checks import check_recipe, typed_model_config
    from nemo_dist_conf.topology.launched_ranks import launched

    hear_once()
    try:
        check_recipe(cfg)
        if cfg.model.get("name_or_path"):
            overrides = raw_words(HydraConfig.get().overrides.task)
            with open_dict(cfg.model):
                cfg.model.config = typed_model_config(cfg.model.get("config"), overrides)
        from nemo_dist_conf.train.loop import run

        return run(cfg)
    except Preempted as stop:
        if launched().rank == 0:
            print(stop, file=sys.stderr, flush=True)
        raise SystemExit(128 + stop.by) from None
    except (KeyboardInterrupt, Exception) as error:
        if was_heard():
            logging.disable()  # what modules that are half imported log at their end
            if launched().rank == 0:
                print(BEFORE, file=sys.stderr, flush=True)
            raise SystemExit(128 + signal.SIGINT) from None
        if isinstance(error, NemoDistConfError):
            end(error)
        raise


def checked_main() -> None:
    """``main``, once Hydra can read the words."""
    from nemo_dist_conf.own_loop.ctrl_c import end_at_once
    from nemo_dist_conf.recipe.group_words import refuse_words

    end_at_once()
    try:
        refuse_words(sys.argv[1:])
    except NemoDistConfError as error:
        from nemo_dist_conf.composition.agreement.shared_failure import end

        end(error)
    main()


if __name__ == "__main__":
    checked_main()
