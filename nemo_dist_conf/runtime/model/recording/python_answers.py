"""What a constructor asks its tensors in Python, before any operator runs, while it is recorded.

Its tensors are on the meta device, and have no values there. To the constructor they say that they are on the CPU, and
where their values are asked for, these are played back (runtime/model/recording/recorder.py).
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nemo_dist_conf.runtime.model.recording.recorder import Recorder

__all__ = ["Answers"]

_CPU, _META = torch.device("cpu"), torch.device("meta")

_Answer = Callable[[Recorder, Any, Any, dict[str, Any]], Any]


class Answers(TorchFunctionMode):
    """Answers for the tensors of a recorder while it is entered. Raises what the recorder raises."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        recorder, answer = self._recorder, _ANSWERS.get(func)
        if recorder.is_idle:
            return func(*args, **(kwargs or {}))
        if kwargs and _is_meta(kwargs.get("device")) or func is Tensor.to and len(args) > 1 and _is_meta(args[1]):
            raise recorder.give_up("it uses the meta device itself")
        if answer is None or not isinstance(args[0], Tensor):
            return func(*args, **(kwargs or {}))
        recorder.is_idle = True
        try:
            if not recorder.holds(args[0]):
                answer = _as_it_is
        finally:
            recorder.is_idle = False
        return answer(recorder, func, args, kwargs or {})


def _is_meta(place: Any) -> bool:
    return isinstance(place, (str, torch.device)) and torch.device(place) == _META


def _as_it_is(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _says(value: Any) -> _Answer:
    return lambda recorder, func, args, kwargs: value


def _with_values(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensor = args[0]
    requires_grad = tensor.requires_grad
    value, is_its_own = recorder.value(tensor)
    result = func(value.cpu().requires_grad_(requires_grad), *args[1:], **kwargs)
    if hasattr(result, "flags"):  # an array
        if is_its_own:
            recorder.hand_out(tensor, result)
        else:
            result.flags.writeable = False  # what is written there would be lost
    return result


def _type(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``type()`` names the device too."""
    if len(args) > 1 or kwargs:
        return func(*args, **kwargs)
    recorder.is_idle = True
    try:
        return torch.empty(0, dtype=args[0].dtype).type()
    finally:
        recorder.is_idle = False


def _refused(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    raise recorder.give_up(f"it reaches for the memory of a tensor ({func.__name__})")


def _moved(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """``to``: to the CPU nothing moves, so that without another dtype it is the tensor itself."""
    tensor, *rest = args
    names = ["device", "dtype", "non_blocking", "copy"]
    if rest and isinstance(rest[0], torch.dtype):
        del names[0]
    asked = {**dict(zip(names, rest)), **kwargs}
    place = asked.get("device")
    if isinstance(place, Tensor) or "other" in asked:
        other = asked.pop("other", place)
        asked |= {"dtype": other.dtype, "device": other.device}
        place = other.device
    if place is not None and torch.device(place) != _CPU:
        return func(*args, **kwargs)
    dtype, copy = asked.get("dtype") or tensor.dtype, bool(asked.get("copy"))
    layout = {"memory_format": asked["memory_format"]} if asked.get("memory_format") is not None else {}
    return func(tensor, dtype, copy=copy, **layout)


def _on_cpu(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return args[0]


def _made_like(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    return func(*args, **{"device": _CPU, **kwargs})


def _indexed(recorder: Recorder, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Lists among indices and values become tensors: torch would make them on the device of what is indexed."""
    data = [tuple(map(_as_tensor, arg)) if isinstance(arg, tuple) else _as_tensor(arg) for arg in args[1:]]
    return func(args[0], *data, **kwargs)


def _as_tensor(value: Any) -> Any:
    is_data = isinstance(value, list) and not any(isinstance(item, (slice, Tensor, type(None))) for item in value)
    return torch.as_tensor(value) if is_data or hasattr(value, "__array_interface__") else value


_ANSWERS: dict[Any, _Answer] = {
    Tensor.device.__get__: _says(_CPU),
    Tensor.is_meta.__get__: _says(False),  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: _says(True),  # type: ignore[attr-defined]
    Tensor.get_device: _says(-1),
    Tensor.to: _moved,
    Tensor.cpu: _on_cpu,
    Tensor.type: _type,
    Tensor.new_tensor: _made_like,
    Tensor.__getitem__: _indexed,
    Tensor.__setitem__: _indexed,
}
_ANSWERS |= dict.fromkeys(
    (Tensor.tolist, Tensor.numpy, Tensor.__array__, Tensor.__repr__, Tensor.__format__), _with_values
)
_ANSWERS |= dict.fromkeys(
    (Tensor.untyped_storage, Tensor.storage, Tensor.__reduce_ex__, Tensor.share_memory_, Tensor.__dlpack__), _refused
)
#: The first would be an address that is none; the others do nothing on meta, without a word.
_ANSWERS |= dict.fromkeys((Tensor.data_ptr, Tensor.apply_, Tensor.map_, Tensor.map2_), _refused)
