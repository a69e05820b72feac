"""The optimizers that a config can name, their settings, and what does not fit; no torch, so told before a start."""

from __future__ import annotations

import math
from typing import Any, Mapping

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.schema.optimizer_groups import settings_of_groups_problems
from nemo_dist_conf.schema.optimizer_setting import Setting
from nemo_dist_conf.wording import Spelling, typed, unknown_name

__all__ = ["SETTINGS", "optimizer_problems"]


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _flag_or_null(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _betas(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(_number(b) and 0 <= b < 1 for b in value)


_LR = Setting("a number, at least 0", lambda v: _number(v) and v >= 0, 0.001)
_FRACTION = Setting("0 to below 1", lambda v: _number(v) and 0 <= v < 1, 0.9)
_NOT_NEGATIVE = Setting("a number, at least 0", lambda v: _number(v) and v >= 0, 0.0)
_EPS = Setting("a number above 0", lambda v: _number(v) and v > 0, 1e-8)
_BETAS = Setting("two numbers, each 0 to below 1", _betas, [0.9, 0.95])
_BOOL = Setting("true, false", lambda v: isinstance(v, bool), False)
_SWITCH = Setting("true, false; null: the fastest that these parameters allow", _flag_or_null, None)
_DECAY_1D = Setting("true: norms and biases decay too; false: they do not", lambda v: isinstance(v, bool), False)

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
        return [
            unknown_name(
                name,
                SETTINGS,
                what=f"optimizer.name={typed(name)} is not an optimizer",
                asked=spelling.set("optimizer.name", name),
                allowed=f"{', '.join(SETTINGS)}; any other: a node with _target_",
                offer=lambda known: spelling.set("optimizer.name", known),
            )
        ]
    problems: list[Problem] = list(settings_of_groups_problems(values, settings, spelling))
    for key, value in values.items():
        if key in ("name", "groups"):
            continue
        setting = settings.get(key)
        asked = spelling.set(f"optimizer.{key}", value)
        if setting is None:
            problems.append(_unknown(str(key), value, str(name), settings, asked, spelling))
        elif not setting.fits(value):
            what = f"optimizer.{key}={typed(value)} does not fit"
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
                asked=spelling.set("optimizer.name", name),
                allowed=_LR.allowed,
                instead=spelling.set("optimizer.lr", _LR.example, "++"),
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
    without = f"~{spelling.key(f'optimizer.{key}')}"

    def offer(meant: str) -> str:
        if meant == "groups":
            return spelling.set("optimizer.groups", value)
        setting = settings[meant]
        return spelling.set(f"optimizer.{meant}", value if setting.fits(value) else setting.example)

    return unknown_name(
        key,
        (*settings, "groups"),
        what=f"optimizer.{key}: {name} has no such setting" + (f" ({', '.join(others)} has it)" if others else ""),
        asked=asked,
        allowed=", ".join((*settings, "groups")),
        offer=offer,
        otherwise=spelling.choose("optimizer", others[0]) if others else without,
    )
