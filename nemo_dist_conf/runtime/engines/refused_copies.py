"""What a copy of a wrapped model, or a file with it, is refused with."""

from __future__ import annotations

from typing import Any

from torch import nn

from nemo_dist_conf.errors import ConfigError, Problem

__all__ = ["RefusesCopy", "RefusesPickle", "refuse_copy"]


def refuse_copy(model: nn.Module, instead: str = "") -> ConfigError:
    """instead: a copy that can be made, as it is written."""
    what = f"{type(model).__name__} cannot be copied: a copy would have neither its process groups nor its hooks"
    ema = "nemo_dist_conf.EMA(model)"
    others = f"; {instead} for a whole copy on each rank" if instead else ""
    allowed = f"{ema}: averaged weights that lie as the model's do{others}; checkpoints for a second model"
    return ConfigError(
        Problem(
            what=what,
            asked="copy.deepcopy(model), or AveragedModel(model), which copies it",
            allowed=allowed,
            instead=ema,
        )
    )


class RefusesCopy:
    """Stands as ``__deepcopy__`` on a module of somebody else's."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, memo: Any) -> Any:
        raise refuse_copy(self.module)


class RefusesPickle:
    """Stands as ``__reduce_ex__`` on a module of somebody else's."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, protocol: int) -> Any:
        what = f"{type(self.module).__name__} cannot be pickled: its parameters lie on all ranks, in parts"
        save = "nemo_dist_conf.checkpoint.save(folder, model)"
        allowed = f"{save}, which writes it from all ranks; or model.state_dict(), the parts of this rank"
        raise ConfigError(Problem(what=what, asked="torch.save(model, ...), or pickle", allowed=allowed, instead=save))
