"""State that is not a tensor of the model, as JSON and back: nothing is pickled, so nothing can run when it is read."""

from __future__ import annotations

import base64
import random
import sys
from typing import Any

import torch

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.checkpoint.tensor_file import DTYPES, bytes_of, tensor_of

__all__ = ["from_json", "random_state", "set_random_state", "to_json"]

_KIND = "__is__"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def to_json(value: Any, path: str) -> Any:
    """A value as JSON keeps it: numbers, texts, lists, tuples, dictionaries, and small tensors among them.

    Raises ConfigError, naming where it stands, for anything else.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, tuple):
        return {_KIND: "tuple", "items": [to_json(item, f"{path}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, list):
        return [to_json(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value) and _KIND not in value:
            return {key: to_json(item, f"{path}.{key}") for key, item in value.items()}
        pairs = [[to_json(key, path), to_json(item, f"{path}[{key!r}]")] for key, item in value.items()]
        return {_KIND: "dict", "items": pairs}
    if isinstance(value, torch.Tensor) and value.dtype in _NAMES and not value.is_meta:
        packed = base64.b64encode(bytes_of(value.detach())).decode()
        return {_KIND: "tensor", "dtype": _NAMES[value.dtype], "shape": list(value.shape), "data": packed}
    what = f"{path} is a {type(value).__name__}, which a checkpoint cannot keep without pickling it"
    allowed = "numbers, texts, lists, tuples, dictionaries and tensors"
    raise ConfigError(Problem(what, path, allowed, "a state_dict() that holds such values only"))


def from_json(value: Any) -> Any:
    """What ``to_json`` was given."""
    if isinstance(value, list):
        return [from_json(item) for item in value]
    if not isinstance(value, dict):
        return value
    kind = value.get(_KIND)
    if kind is None:
        return {key: from_json(item) for key, item in value.items()}
    if kind == "tuple":
        return tuple(from_json(item) for item in value["items"])
    if kind == "dict":
        return {from_json(key): from_json(item) for key, item in value["items"]}
    return tensor_of(bytearray(base64.b64decode(value["data"])), value["dtype"], value["shape"])


def random_state() -> dict[str, Any]:
    """Where this rank's random numbers stand: Python's, torch's, and numpy's where it is in use."""
    version, words, gauss = random.getstate()
    state: dict[str, Any] = {"python": [version, list(words), gauss], "torch": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    if "numpy" in sys.modules:
        import numpy

        words_of: Any = numpy.random.get_state()
        kind, keys, position, has_gauss, cached = words_of
        state["numpy"] = [kind, keys.tolist(), position, has_gauss, cached]
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Let this rank's random numbers go on from there."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if "numpy" in state:
        try:
            import numpy
        except ImportError:
            return
        kind, keys, position, has_gauss, cached = state["numpy"]
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, cached))
