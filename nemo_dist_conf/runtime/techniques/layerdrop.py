"""Layers that a model skips at random (layerdrop): which ones is drawn once for all ranks.

Ranks that skip other layers would wait for each other in the collectives of those: a hang. Each rank draws, so that
its generators move as they would alone, and then takes the number of the first rank; without dropout that is what one
process draws.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
import types
from typing import Any, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.model.replaced_forwards import Around, code_of_forward
from nemo_dist_conf.runtime.torch_inside import hide_sharding

__all__ = ["refuse_layerdrop", "share_draws"]

log = logging.getLogger(__name__)


def _layerdrop_of(model: nn.Module) -> dict[str, float]:
    """Where the model says that it skips layers, and how often: ``encoder.layerdrop``, ``config.layerdrop`` -> 0.1."""
    found: dict[str, float] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        config = getattr(module, "config", None)
        places = {prefix: vars(module), f"{prefix}config.": getattr(config, "__dict__", {})}
        for place, values in places.items():
            for key, value in values.items():
                if _is_word(key) and isinstance(value, (int, float)) and value > 0:
                    found.setdefault(f"{place}{key}", float(value))
    return found


def share_draws(model: nn.Module, groups: Sequence[dist.ProcessGroup]) -> None:
    """Let every rank of the groups skip the same layers, in place. Of a model that skips none, nothing changes."""
    found = _layerdrop_of(model)
    if not found:
        return
    for module in model.modules():
        if _draws(module):
            module.forward = _SharedDraws(module, [group for group in groups if group.size() > 1])
    shown = ", ".join(f"{key}={value:g}" for key, value in list(found.items())[:3])
    log.info("layers are skipped alike on all ranks: %s", shown)


def refuse_layerdrop(model: nn.Module, asked: str, why: str, instead: str) -> None:
    """Raise ConfigError for a model that skips layers. asked: what does not go with it; instead: what does."""
    for key, value in _layerdrop_of(model).items():
        allowed = f"{instead}, or {key.rpartition('.')[2]}=0 in the model's config"
        raise ConfigError(Problem(what=f"{key}={value:g}: {why}", asked=asked, allowed=allowed, instead=instead))


def _is_word(name: str) -> bool:
    return "layerdrop" in name.replace("_", "").lower()


def _draws(module: nn.Module) -> bool:
    """Whether a module's own forward looks at such a number."""
    waiting = [code_of_forward(module)]
    while waiting:
        code = waiting.pop()
        if code is not None:
            if any(_is_word(name) for name in code.co_names):
                return True
            waiting += [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return False


class _SharedDraws(Around):
    """A module's forward in which single random numbers are the first rank's."""

    def __init__(self, module: nn.Module, groups: Sequence[dist.ProcessGroup]) -> None:
        super().__init__(module.forward)
        self.module, self.groups = module, groups

    def __deepcopy__(self, memo: dict[int, Any]) -> _SharedDraws:
        """Process groups cannot be copied."""
        copied = object.__new__(type(self))
        copied.__wrapped__, copied.module = copy.deepcopy((self.__wrapped__, self.module), memo)
        copied.groups = self.groups
        return copied

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.module.training:
            return self.__wrapped__(*args, **kwargs)
        hide_sharding(self.module)
        with _Shared(self.groups), _shared_numpy(self.groups):
            return self.__wrapped__(*args, **kwargs)


class _Shared(TorchFunctionMode):
    def __init__(self, groups: Sequence[dist.ProcessGroup]) -> None:
        super().__init__()
        self.groups = groups

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        single = func is torch.rand and isinstance(out, Tensor) and out.numel() == 1 and not out.is_meta
        return _of_first(out, self.groups) if single else out


@contextlib.contextmanager
def _shared_numpy(groups: Sequence[dist.ProcessGroup]) -> Iterator[None]:
    """transformers' adapters (wav2vec2) draw with numpy."""
    numpy: Any = sys.modules.get("numpy")
    if numpy is None:
        yield
        return
    draw = numpy.random.random

    def shared(size: Any = None) -> Any:
        drawn = draw(size)
        return drawn if size is not None else float(_of_first(torch.tensor(drawn, dtype=torch.float64), groups))

    numpy.random.random = shared
    try:
        yield
    finally:
        numpy.random.random = draw


@torch.no_grad()
def _of_first(value: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    for group in groups:
        device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
        sent = value.to(device)
        dist.broadcast(sent, dist.get_global_rank(group, 0), group=group)
        value = sent.to(value.device)
    return value
