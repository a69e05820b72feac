"""What tests of a config's fields share, and which fields they have shown."""

from __future__ import annotations

from typing import Any, Callable, TypeVar

import pytest
from torch.nn.parallel import DistributedDataParallel

from nemo_dist_conf.config import DDPConfig, FSDP2Config
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.instantiate import instantiate
from tests.dist.layouts import MODELS, composed

__all__ = ["BOTH", "FP32", "SHOWN", "TP", "inner", "net", "shows", "words_of"]

FP32 = "strategy.mp_policy=null"
TP = "parallelism.tp_size=2"
#: How a field of both strategies is tried: the words that choose each, in float32.
BOTH = pytest.mark.parametrize("words", [("strategy=ddp",), (FP32,)], ids=["ddp", "fsdp2"])

Test = TypeVar("Test", bound=Callable[..., None])
SHOWN: dict[type, set[str]] = {FSDP2Config: set(), DDPConfig: set()}


def shows(field: str, *configs: type) -> Callable[[Test], Test]:
    """Marks a test of a field's effect, for one or both configs."""

    def mark(test: Test) -> Test:
        for config in configs:
            SHOWN[config].add(field)
        return test

    return mark


def net(*words: str, model: str = "module") -> Any:
    """The wrapped model of a rank."""
    return instantiate(composed(*words, model=MODELS[model]))[1]


def inner(model: Any) -> Any:
    return model.module if isinstance(model, DistributedDataParallel) else model


def words_of(error: pytest.ExceptionInfo[ConfigError]) -> tuple[str, str]:
    return error.value.what, error.value.type
