"""The group ``adapter``: which adapter of peft is trained inside of a frozen model; none, lora or dora."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from typing import Any, Iterator, Mapping

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.names import DType
from nemo_dist_conf.schema.asked import Asked, Idle
from nemo_dist_conf.schema.option import option
from nemo_dist_conf.wording import Spelling, typed, unknown_name

__all__ = ["ALL_LINEAR", "AdapterConf", "adapter_problems", "idle_adapter", "patterns_of"]

#: What ``adapter.kind`` accepts, as the group's options are called.
_KINDS: tuple[str, ...] = ("none", "lora", "dora")
#: The target that means every linear layer but the output head.
ALL_LINEAR = "all-linear"
#: Not float16, which is too narrow to add small steps to.
_DTYPES = (DType.float32, DType.bfloat16)


@dataclass
class AdapterConf:
    """An adapter of peft in a frozen model's layers, the same under every strategy and axis."""

    kind: str = option("none", "none; lora: two narrow matrices beside a layer; dora: the length of its rows as well")
    rank: int = option(8, "rows of the one matrix and columns of the other")
    alpha: float = option(16.0, "what an adapter adds is scaled by alpha / rank")
    dropout: float = option(0.0, "of an adapter's input, in training; a rank of tp, pp or data draws its own")
    targets: Any = option(ALL_LINEAR, "layers by the end of their names, * within a part; all-linear: all but the head")
    modules_to_save: Any = option(list, "modules that are trained in full and saved with the adapter, by such patterns")
    dtype: DType = option(DType.float32, "of the adapter; the base keeps the dtype of its folder")


def patterns_of(value: Any) -> tuple[str, ...]:
    """The patterns in a field that takes one or several; none in what is neither."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (list, tuple)) else ()


def idle_adapter(asked: Asked) -> Idle | None:
    """There is no adapter."""
    return Idle("adapter", "none", "lora or dora") if asked.groups["adapter"]["kind"] == "none" else None


def adapter_problems(values: Mapping[str, Any], asked: Asked) -> Iterator[Problem]:
    """What cannot work in the settings."""
    spelling, kind = asked.spelling, values["kind"]
    if kind not in _KINDS:
        yield unknown_name(
            kind,
            _KINDS,
            what=f"adapter.kind={kind} is no adapter",
            asked=spelling.set("adapter.kind", kind),
            allowed=", ".join(_KINDS),
            offer=lambda known: spelling.choose("adapter", known),
        )
        return
    if kind == "none":
        return
    if importlib.util.find_spec("peft") is None:
        yield Problem(
            what="an adapter was asked for, and peft is not installed",
            asked=spelling.choose("adapter", kind),
            allowed="the extra peft",
            instead="pip install 'nemo_dist_conf[peft]'",
        )
    numbers = (
        ("rank", values["rank"] >= 1, "a whole number of 1 or more", 8),
        ("alpha", 0 < values["alpha"] < math.inf, "a number above 0", 16.0),
        ("dropout", 0 <= values["dropout"] < 1, "0 up to below 1", 0.0),
    )
    for name, is_right, allowed, instead in numbers:
        if not is_right:
            yield _wrong(name, values[name], allowed, instead, spelling)
    if values["dtype"] not in _DTYPES:
        yield _wrong("dtype", values["dtype"], ", ".join(dtype.name for dtype in _DTYPES), DType.float32, spelling)
    for name, default in (("targets", ALL_LINEAR), ("modules_to_save", [])):
        if not _are_patterns(values[name], may_be_empty=name != "targets"):
            yield _wrong(name, values[name], "a name or a list of names, * within a part", default, spelling)
    if values["kind"] == "dora" and values["dropout"] and asked.sizes["tp_size"] > 1:
        yield Problem(
            what="DoRA computes a layer a second time where its input drops out, which a split layer does not",
            asked=f"{spelling.set('adapter.dropout', values['dropout'])} "
            + spelling.set("parallelism.tp_size", asked.sizes["tp_size"]),
            allowed="adapter.dropout=0.0 with tp_size above 1, or adapter=lora",
            instead=spelling.set("adapter.dropout", 0.0),
        )


def _wrong(name: str, value: Any, allowed: str, instead: Any, spelling: Spelling) -> Problem:
    key = f"adapter.{name}"
    return Problem(
        what=f"{spelling.key(key)} cannot be {typed(value)}",
        asked=spelling.set(key, value),
        allowed=allowed,
        instead=spelling.set(key, instead),
    )


def _are_patterns(value: Any, may_be_empty: bool) -> bool:
    if isinstance(value, str):
        return bool(value)
    if not isinstance(value, (list, tuple)):
        return value is None and may_be_empty
    return all(isinstance(item, str) and item for item in value) and (bool(value) or may_be_empty)
