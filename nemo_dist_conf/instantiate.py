"""The hook: a composed tree becomes a DistributedSetup, the wrapped model and its optimizer."""

from __future__ import annotations

import sys
import types
from typing import Any

from nemo_dist_conf.runtime.instantiate import instantiate

__all__ = ["instantiate"]


class _CallableModule(types.ModuleType):
    """``import nemo_dist_conf.instantiate`` puts this module where the package's function of that name was."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return instantiate(*args, **kwargs)


setattr(sys.modules[__name__], "__class__", _CallableModule)
