"""Parameters with settings of their own, ``optimizer.groups``: the rules, and which group a parameter is in. No torch.

``groups: [{params: pattern, lr: ...}, ...]``: a parameter is in the first group that has a pattern of it, and has the
optimizer's own settings for all that the group does not say, or where it is in none.
"""

from __future__ import annotations

from typing import Any, Hashable, Iterator, Mapping, Sequence, TypeVar

from nemo_dist_conf.errors import Problem
from nemo_dist_conf.names import nearest
from nemo_dist_conf.schema.optimizer_setting import Setting
from nemo_dist_conf.schema.parameter_names import are_patterns, meant, not_found, patterns_in
from nemo_dist_conf.wording import Spelling, typed

__all__ = ["group_of_each", "names_of_groups_problems", "settings_of_groups_problems"]

_Key = TypeVar("_Key", bound=Hashable)

_KEY = "optimizer.groups"
_EXAMPLE = [{"params": "*.bias", "weight_decay": 0.0}]
#: Settings that say how one update of all parameters is computed.
_OF_ALL = ("foreach", "fused")


def group_of_each(groups: Sequence[Mapping[str, Any]], keys: Mapping[str, _Key]) -> dict[_Key, int]:
    """Parameter -> number of the group that it is in; those that are in none are left out.

    keys: which parameter each name means; tied names mean one.
    """
    found: dict[_Key, int] = {}
    for number, group in enumerate(groups):
        for pattern in patterns_in(group["params"]):
            for name in meant(pattern, keys):
                found.setdefault(keys[name], number)
    return found


def names_of_groups_problems(
    groups: Sequence[Mapping[str, Any]],
    keys: Mapping[str, _Key],
    trained: Mapping[_Key, int],
    decay_1d: bool = False,
    spelling: Spelling = Spelling(),
) -> list[Problem]:
    """Patterns that mean no parameter, or only frozen ones; groups without parameters, or whose decay reaches none.

    keys: which parameter each name means, frozen ones too. trained: dimensions of those that are trained.
    decay_1d: the optimizer's own setting.
    """
    better, found = _Better(groups), []
    taken: set[_Key] = set()
    for number, group in enumerate(groups):
        named = f"{_KEY}[{number}]"
        mine: set[_Key] = set()
        for pattern in patterns_in(group["params"]):
            meaning = {keys[name] for name in meant(pattern, keys)}
            if not meaning:
                told = not_found(f"{named}.params", pattern, list(keys))
                found.append((told.what, told.allowed))
                better.pattern(number, pattern, told.likely)
            elif meaning.isdisjoint(trained):
                found.append((f"{named}.params: all that {pattern} means is frozen", "parameters that are trained"))
                better.pattern(number, pattern, None)
            mine |= meaning
        mine &= set(trained)
        decays = bool(group.get("weight_decay")) and not group.get("decay_1d", decay_1d)
        if mine and mine <= taken:
            what = f"{named}: all parameters of {typed(group['params'])} are in groups before it, so that it has none"
            found.append((what, "groups of which each has parameters that no earlier one has"))
            better.groups[number] = None
        elif mine and decays and all(trained[key] <= 1 for key in mine - taken):
            what = f"{named}.weight_decay={typed(group['weight_decay'])} would spare all parameters of the group"
            allowed = "decay_1d=true in the group, by which parameters of one dimension decay too; weight_decay=0"
            found.append((what, allowed))
            better.set(number, "decay_1d", True)
        taken |= mine
    return _problems(found, groups, better, spelling)


class _Better:
    """The groups as they would be right; None in the place of one that is left out."""

    def __init__(self, groups: Sequence[Mapping[str, Any]]) -> None:
        self.groups: list[dict[str, Any] | None] = [dict(group) for group in groups]

    def set(self, number: int, key: str, value: Any) -> None:
        self.groups[number] = {**(self.groups[number] or {}), key: value}

    def leave_out(self, number: int, key: str) -> None:
        self.groups[number] = {other: value for other, value in (self.groups[number] or {}).items() if other != key}

    def pattern(self, number: int, pattern: str, other: str | None) -> None:
        """Another pattern in the place of one, or none; a group without patterns is left out."""
        group = self.groups[number]
        if group is None:
            return
        said = group["params"]
        left = [other if one == pattern else one for one in patterns_in(said)]
        left = [one for one in left if one is not None]
        self.groups[number] = {**group, "params": left[0] if isinstance(said, str) and left else left} if left else None


def _problems(
    found: Sequence[tuple[str, str]], groups: Sequence[Mapping[str, Any]], better: _Better, spelling: Spelling
) -> list[Problem]:
    """One problem for each finding (what, allowed); all of them offer the groups that are right."""
    asked = spelling.set(_KEY, groups)
    instead = spelling.set(_KEY, [group for group in better.groups if group is not None])
    return [Problem(what=what, asked=asked, allowed=allowed, instead=instead) for what, allowed in found]


def settings_of_groups_problems(
    values: Mapping[str, Any], settings: Mapping[str, Setting], spelling: Spelling = Spelling()
) -> Iterator[Problem]:
    """What is wrong with ``groups`` of a node of an optimizer, as far as that can be told without a model.

    settings: those that the optimizer has.
    """
    groups = values.get("groups")
    if groups is None:
        return
    if not isinstance(groups, (list, tuple)) or not all(isinstance(group, Mapping) for group in groups):
        what, allowed = f"{_KEY} is not a list of groups", f"a list as {typed(_EXAMPLE)}; [] for none"
        yield Problem(
            what=what, asked=spelling.set(_KEY, groups), allowed=allowed, instead=spelling.set(_KEY, _EXAMPLE)
        )
        return
    better = _Better(groups)
    found = [
        finding for number, group in enumerate(groups) for finding in _findings(values, number, group, settings, better)
    ]
    yield from _problems(found, groups, better, spelling)


def _findings(
    values: Mapping[str, Any], number: int, group: Mapping[str, Any], settings: Mapping[str, Setting], better: _Better
) -> Iterator[tuple[str, str]]:
    """(what, allowed) of all that is wrong in one group, which is put right in ``better``."""
    named, name, said = f"{_KEY}[{number}]", values["name"], group.get("params")
    if not said or not are_patterns(said):
        what = f"{named}.params={typed(said)} names no parameters" if "params" in group else f"{named} has no params"
        better.set(number, "params", "*.bias")
        yield what, "a pattern of names of parameters or modules, or a list of patterns"
    own = {key: setting for key, setting in settings.items() if key not in _OF_ALL}
    for key, value in group.items():
        setting = own.get(key)
        if key == "params":
            continue
        if key in _OF_ALL and key in settings:
            better.leave_out(number, key)
            yield f"{named}.{key} is said of the whole optimizer, not of a group", ", ".join(own)
        elif setting is None:
            better.leave_out(number, key)
            likely = nearest(str(key), [other for other in own if other not in group])
            if likely:
                better.set(number, likely[0], value if own[likely[0]].fits(value) else own[likely[0]].example)
            yield f"{named}.{key}: {name} has no such setting", ", ".join(dict.fromkeys([*likely, "params", *own]))
        elif not setting.fits(value):
            better.set(number, key, setting.example)
            yield f"{named}.{key}={typed(value)} does not fit", setting.allowed
    held = {**values, **group}
    says = {"momentum", "dampening", "nesterov"} & set(group)
    if says and held.get("nesterov") is True and (not held.get("momentum") or held.get("dampening")):
        better.set(number, "nesterov", False)
        yield (
            f"{named}: nesterov=true needs a momentum and no dampening",
            "nesterov=false in the group; momentum above 0 and dampening=0",
        )
