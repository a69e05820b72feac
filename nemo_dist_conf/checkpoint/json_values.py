"""State that is not a tensor of the model, as JSON and back: nothing is pickled, so nothing can run when it is read."""

from __future__ import annotations

import base64
import json
import random
import sys
from typing import Any, Callable, Iterator, Mapping, Sequence

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from nemo_dist_conf.checkpoint.tensor_file import DTYPES, bytes_of, tensor_of
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.torch_inside import local_tensor

__all__ = [
    "LEFT_OUT",
    "from_json",
    "merged",
    "random_state",
    "refuse_tensor",
    "renamed_keys",
    "set_random_state",
    "step_to",
    "tensors_in",
    "to_json",
]

_KIND = "__is__"
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def to_json(
    value: Any,
    path: str,
    tensor: Callable[[torch.Tensor, str], Any] | None = None,
    rename: Callable[[Any], Any] = lambda key: key,
) -> Any:
    """A value as JSON keeps it: numbers, texts, lists, tuples, dictionaries, and tensors among them.

    path: where it stands, in words; no two values of one tree have the same. tensor: what stands for a tensor of that
    path, any JSON; None: the tensor itself, packed, which is for small ones. rename: what a key of a dictionary is kept
    as, where no two become one.
    Raises ConfigError, naming where it stands, for anything else.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value

    def inner(item: Any, at: str) -> Any:
        return to_json(item, f"{path}{at}", tensor, rename)

    if isinstance(value, tuple):
        return {_KIND: "tuple", "items": [inner(item, f"[{index}]") for index, item in enumerate(value)]}
    if isinstance(value, list):
        return [inner(item, f"[{index}]") for index, item in enumerate(value)]
    if isinstance(value, dict):
        renamed = renamed_keys(value, rename)
        if all(isinstance(key, str) for key in value) and _KIND not in value:
            return {renamed[key]: inner(item, step_to(renamed[key])) for key, item in value.items()}
        pairs = [[to_json(renamed[key], path), inner(item, step_to(renamed[key]))] for key, item in value.items()]
        return {_KIND: "dict", "items": pairs}
    if isinstance(value, torch.Tensor):
        return {_KIND: "tensor", **(_packed(value, path) if tensor is None else tensor(value, path))}
    what = f"{path} is a {type(value).__name__}, which a checkpoint cannot keep without pickling it"
    allowed, instead = "numbers, texts, lists, tuples, dictionaries and tensors", "a state_dict() of such values only"
    if type(value).__module__.partition(".")[0] == "numpy":
        instead = f"torch.as_tensor({path})" if getattr(value, "ndim", 0) else f"{path}.item()"
    elif isinstance(value, torch.Generator):
        instead = f"{path}.get_state()"
    if hasattr(value, "state_dict"):
        allowed, instead = f"{allowed}; an object with a state_dict of its own", f"objects={{'a name': {path}, ...}}"
    raise ConfigError(Problem(what=what, asked=path, allowed=allowed, instead=instead))


def renamed_keys(value: Mapping[Any, Any], rename: Callable[[Any], Any]) -> dict[Any, Any]:
    """Key of a dictionary -> what it is renamed to; all stay as they are where two would be one."""
    found = {key: rename(key) for key in value}
    return found if len(set(found.values())) == len(found) else {key: key for key in value}


def step_to(key: Any) -> str:
    """The end of a path to a value of a dictionary: ``.key`` where that reads as a name, else ``['a key']``."""
    return f".{key}" if isinstance(key, str) and key.isidentifier() else f"[{key!r}]"


def refuse_tensor(value: torch.Tensor, path: str) -> None:
    """Raise ConfigError, naming where it stands, for a tensor whose numbers cannot be read and put back as they are."""
    kept = "tensors with values of their own, of a dtype of the format safetensors"
    local = local_tensor(value) if isinstance(value, DTensor) else value
    if is_lazy(value):
        what = f"{path} has no shape yet: its layer takes it from the first input"
        raise ConfigError(
            Problem(what=what, asked=path, allowed=kept, instead="model(torch.zeros(...)) before it is saved")
        )
    if isinstance(value, DTensor) and any(placement.is_partial() for placement in value.placements):
        what = f"{path} is a DTensor of which each rank holds a summand"
        raise ConfigError(
            Problem(what=what, asked=path, allowed=kept, instead=f"{path}.redistribute(placements=[Replicate()])")
        )
    if local.dtype not in _NAMES:
        what = f"{path} is of dtype {str(local.dtype).removeprefix('torch.')}, which a checkpoint cannot keep"
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in _NAMES)
        instead = f"torch.view_as_real({path})" if local.is_complex() else f"{path}.float()"
        instead = f"{path}.dequantize()" if local.is_quantized else instead
        raise ConfigError(Problem(what=what, asked=path, allowed=known, instead=instead))
    if local.layout is not torch.strided or local.is_meta or (local.numel() and not _address(local)):
        kind = str(local.layout).removeprefix("torch.") if local.layout is not torch.strided else type(local).__name__
        what = f"{path} is a {'tensor on meta' if local.is_meta else kind}, whose values a checkpoint cannot read"
        raise ConfigError(
            Problem(
                what=what,
                asked=path,
                allowed=kept,
                instead=f"a state_dict() without {path}, or with a plain tensor for it",
            )
        )


def _address(value: torch.Tensor) -> int:
    """Address of a tensor's numbers; 0 where it has none of its own, as wrappers of other tensors."""
    try:
        return value.data_ptr()
    except RuntimeError:
        return 0


def _packed(value: torch.Tensor, path: str) -> dict[str, Any]:
    refuse_tensor(value, path)
    if isinstance(value, DTensor):
        what = f"{path} is a DTensor in the middle of settings, which every rank keeps as they are"
        raise ConfigError(
            Problem(
                what=what, asked=path, allowed="numbers, texts, lists, plain tensors", instead=f"{path}.full_tensor()"
            )
        )
    data = base64.b64encode(bytes_of(value.detach())).decode()
    return {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data": data}


def _is_tensor(tree: Any) -> bool:
    """Whether this node of what ``to_json`` gave stands for a tensor."""
    return isinstance(tree, dict) and tree.get(_KIND) == "tensor"


def tensors_in(tree: Any) -> Iterator[dict[str, Any]]:
    """What stands for a tensor in what ``to_json`` gave, in order."""
    if _is_tensor(tree):
        yield tree
    elif isinstance(tree, (dict, list)):
        for item in tree.values() if isinstance(tree, dict) else tree:
            yield from tensors_in(item)


def from_json(
    value: Any,
    tensor: Callable[[dict[str, Any]], Any] | None = None,
    like: Any = None,
    rename: Callable[[Any], Any] = lambda key: key,
) -> Any:
    """What ``to_json`` was given.

    tensor: the tensor for what stands for it, or ``LEFT_OUT``, which takes the entry out of its dictionary.
    like: a value of the same kind, whose keys are taken where ``rename`` makes one of them that is there.
    """

    def inner(item: Any, beside: Any) -> Any:
        return from_json(item, tensor, beside, rename)

    if isinstance(value, list):
        return [inner(item, beside) for item, beside in zip(value, _as_many(like, len(value)))]
    if not isinstance(value, dict):
        return value
    kind = value.get(_KIND)
    if kind == "tuple":
        return tuple(inner(item, beside) for item, beside in zip(value["items"], _as_many(like, len(value["items"]))))
    if kind in (None, "dict"):
        pairs = value.items() if kind is None else [(from_json(key), item) for key, item in value["items"]]
        there = like if isinstance(like, dict) else {}
        theirs = {name: key for key, name in renamed_keys(there, rename).items()}
        found = {theirs.get(key, key): inner(item, there.get(theirs.get(key, key))) for key, item in pairs}
        return {key: item for key, item in found.items() if item is not LEFT_OUT}
    if tensor is not None and "data" not in value:
        return tensor(value)
    return tensor_of(bytearray(base64.b64decode(value["data"])), value["dtype"], value["shape"])


def _as_many(like: Any, count: int) -> list[Any]:
    """The first so many elements of a list, filled up with None; of anything else None alone, so many times."""
    return [*like[:count], *[None] * (count - len(like))] if isinstance(like, (list, tuple)) else [None] * count


#: Stands for a tensor that is not for this rank.
LEFT_OUT: Any = object()


def merged(trees: Sequence[Any]) -> Any:
    """One tree of several ranks': entries of dictionaries that only some have are put together.

    Raises ValueError where that would not give each rank its own again: something else than a tensor is on some ranks
    only, or differs.
    """
    first = trees[0]
    if all(tree == first for tree in trees):
        return first
    if not all(isinstance(tree, dict) and tree.get(_KIND) in (None, "dict") for tree in trees):
        raise ValueError("the ranks hold different values")
    if len({tree.get(_KIND) for tree in trees}) > 1:
        raise ValueError("the ranks hold different dictionaries")
    if first.get(_KIND) == "dict":
        pairs = [[json.dumps(key), item] for key, item in _merged_entries([_by_key(tree["items"]) for tree in trees])]
        return {_KIND: "dict", "items": [[json.loads(key), item] for key, item in pairs]}
    return dict(_merged_entries(trees))


def _by_key(pairs: Sequence[Any]) -> dict[str, Any]:
    return {json.dumps(key): item for key, item in pairs}


def _merged_entries(trees: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Any]]:
    for key in dict.fromkeys(key for tree in trees for key in tree):
        held = [tree[key] for tree in trees if key in tree]
        if len(held) < len(trees) and not all(map(_only_tensors, held)):
            raise ValueError(f"{key} is on some ranks only")
        yield key, merged(held)


def _only_tensors(tree: Any) -> bool:
    if _is_tensor(tree):
        return True
    return isinstance(tree, dict) and _KIND not in tree and all(map(_only_tensors, tree.values()))


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
