"""The optimizers that a config can name, their settings, and what does not fit; no torch, so told before a start."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Callable, Mapping

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.names import nearest
from nemo_dist_conf.wording import Spelling

__all__ = ["SETTINGS", "Setting", "optimizer_problems"]


@dataclass(frozen=True)
class Setting:
    """A setting of an optimizer: what fits, in words and as a predicate, and a value to suggest."""

    allowed: str
    fits: Callable[[Any], bool]
    example: str


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _flag_or_null(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _betas(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(_number(b) and 0 <= b < 1 for b in value)


_LR = Setting("a number, at least 0", lambda v: _number(v) and v >= 0, "0.001")
_FRACTION = Setting("0 to below 1", lambda v: _number(v) and 0 <= v < 1, "0.9")
_NOT_NEGATIVE = Setting("a number, at least 0", lambda v: _number(v) and v >= 0, "0.0")
_EPS = Setting("a number above 0", lambda v: _number(v) and v > 0, "1e-8")
_BETAS = Setting("two numbers, each 0 to below 1", _betas, "[0.9,0.95]")
_BOOL = Setting("true, false", lambda v: isinstance(v, bool), "false")
_SWITCH = Setting("true, false; null: the fastest that these parameters allow", _flag_or_null, "null")
_DECAY_1D = Setting("true: norms and biases decay too; false: they do not", lambda v: isinstance(v, bool), "false")

_COMMON = {
    "lr": _LR,
    "weight_decay": _NOT_NEGATIVE,
    "decay_1d": _DECAY_1D,
    "foreach": _SWITCH,
    "fused": _SWITCH,
    "maximize": _BOOL,
}
_ADAM = {**_COMMON, "betas": _BETAS, "eps": _EPS, "amsgrad": _BOOL}

#: ``optimizer.name`` -> its settings by torch's argument names. All but lr may be left out: torch's default holds then.
SETTINGS: Mapping[str, Mapping[str, Setting]] = {
    "adamw": _ADAM,
    "adam": _ADAM,
    "sgd": {**_COMMON, "momentum": _FRACTION, "dampening": _NOT_NEGATIVE, "nesterov": _BOOL},
}


def optimizer_problems(values: Mapping[str, Any], spelling: Spelling = Spelling()) -> list[Problem]:
    """Everything wrong with a node ``{name: ..., lr: ..., ...}``."""
    name = values.get("name")
    settings = SETTINGS.get(name) if isinstance(name, str) else None
    if settings is None:
        best = nearest(str(name).lower(), SETTINGS) or ["adamw"]
        return [
            Problem(
                what=f"optimizer.name={_text(name)} is not an optimizer",
                asked=spelling.set("optimizer.name", _text(name)),
                allowed=f"{', '.join(SETTINGS)}; any other: a node with _target_",
                instead=spelling.set("optimizer.name", best[0]),
            )
        ]
    problems: list[Problem] = []
    for key, value in values.items():
        if key == "name":
            continue
        setting = settings.get(key)
        asked = spelling.set(f"optimizer.{key}", _text(value))
        if setting is None:
            problems.append(_unknown(str(key), value, str(name), settings, asked, spelling))
        elif not setting.fits(value):
            what = f"optimizer.{key}={_text(value)} does not fit"
            problems.append(
                Problem(
                    what=what,
                    asked=asked,
                    allowed=setting.allowed,
                    instead=spelling.set(f"optimizer.{key}", setting.example),
                )
            )
    if "lr" not in values:
        what = "optimizer.lr is missing"
        problems.append(
            Problem(
                what=what,
                asked=f"optimizer.name={name}",
                allowed=_LR.allowed,
                instead="++" + spelling.set("optimizer.lr", _LR.example),
            )
        )
    if values.get("fused") is True and values.get("foreach") is True:
        problems.append(
            Problem(
                what="optimizer.fused=true and optimizer.foreach=true ask for two ways of one update",
                asked=f"{spelling.set('optimizer.fused', True)} {spelling.set('optimizer.foreach', True)}",
                allowed="one of them; null for both: the fastest that these parameters allow",
                instead=spelling.set("optimizer.foreach", None),
            )
        )
    nesterov_alone = values.get("nesterov") is True and (not values.get("momentum") or values.get("dampening"))
    if not problems and nesterov_alone:
        problems.append(
            Problem(
                what="optimizer.nesterov=true needs a momentum and no dampening",
                asked=spelling.set("optimizer.nesterov", True),
                allowed="true with optimizer.momentum above 0 and optimizer.dampening=0; false",
                instead=spelling.set("optimizer.nesterov", False),
            )
        )
    return problems


def _unknown(
    key: str, value: Any, name: str, settings: Mapping[str, Setting], asked: str, spelling: Spelling
) -> Problem:
    others = [other for other, its in SETTINGS.items() if key in its]
    alike = nearest(key, settings)
    type_ = f"~{spelling.key(f'optimizer.{key}')}"
    if alike:
        meant = settings[alike[0]]
        type_ = spelling.set(f"optimizer.{alike[0]}", _text(value) if meant.fits(value) else meant.example)
    elif others:
        type_ = spelling.choose("optimizer", others[0])
    hint = f" ({', '.join(others)} has it)" if others else ""
    return Problem(
        what=f"optimizer.{key}: {name} has no such setting{hint}",
        asked=asked,
        allowed=", ".join(settings),
        instead=type_,
    )


def _text(value: Any) -> str:
    """As typed on the command line."""
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_text, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)
