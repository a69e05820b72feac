"""Tensor and sequence parallelism: a model's layers sharded in place over one mesh axis, by style names.

Between modules activations are plain tensors, equal on every rank, but for two cases: what a ``colwise`` layer gives
is the rank's own part, and under sequence parallelism the residual stream is a DTensor split over the sequence. It
stays a DTensor because that knows its full length, so that lengths which the ranks do not divide are exact.
Tensors are [batch, seq, hidden].
"""

from __future__ import annotations

import logging
from typing import Any, Collection, Mapping

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ParallelStyle, SequenceParallel

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.families.config_facts import facts_from_config, fields_of
from nemo_dist_conf.families.model_rules import model_problems
from nemo_dist_conf.families.plan_rules import style_names
from nemo_dist_conf.families.plans import planned_families
from nemo_dist_conf.families.registry import find_family
from nemo_dist_conf.families.styles import SEQUENCE_STYLES, STYLES, find_style, match_pattern, unalias
from nemo_dist_conf.names import nearest
from nemo_dist_conf.runtime.model.materialise import tied_names
from nemo_dist_conf.runtime.techniques.tensor.adapted_layers import styles_inside
from nemo_dist_conf.runtime.techniques.tensor.brought_plan import (
    declared_plan,
    family_plan,
    has_other_adapters,
    is_pattern,
    is_transformers,
    model_type,
    with_tied,
)
from nemo_dist_conf.runtime.techniques.tensor.derived_plan import derived_plan
from nemo_dist_conf.runtime.techniques.tensor.layer_kinds import layer_kind
from nemo_dist_conf.runtime.techniques.tensor.repairs import pattern_of, repaired
from nemo_dist_conf.runtime.techniques.tensor.stream import (
    CannotFollow,
    not_followed,
)
from nemo_dist_conf.runtime.techniques.tensor.styles import SEQUENCE_DIM, apply_styles
from nemo_dist_conf.runtime.techniques.tensor.trial import CannotTry, Trial
from nemo_dist_conf.topology.solve import divisors
from nemo_dist_conf.wording import assigned

__all__ = ["apply_tensor_parallel"]

log = logging.getLogger(__name__)

#: Names of layers whose output features are heads.
_OF_HEADS = frozenset({"q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj"})

_Plan = Mapping[str, Any]


def apply_tensor_parallel(
    model: nn.Module,
    tp_mesh: DeviceMesh,
    *,
    plan: _Plan | None = None,
    sequence_parallel: bool = False,
    example: Mapping[str, Any] | None = None,
    apart: Collection[str] = (),
) -> dict[str, ParallelStyle]:
    """Style of each module that was sharded, by name; the model is changed in place.

    Parameters become DTensors on tp_mesh (1-D), each rank keeping its part of the values it has, which must be the
    same on all ranks; on the meta device nothing is read. Outputs of the model are plain tensors, equal on every rank.
    Tied parameters stay tied. Call it before activation checkpointing, compile and fully_shard.
    plan: pattern -> style name (families/styles.py) or torch ParallelStyle, relative to ``model``. None: the model's
    attribute ``tp_plan`` or ``_tp_plan``, or what is known of its family, or for a model of transformers of which
    nothing is known what is found in its blocks (derived_plan.py). But for families whose plan the tests hold against
    one process (``proven`` in the family's row), a plan is tried on a small input first.
    sequence_parallel: norms and the residual stream are split over the sequence, of any length.
    example: what the model's forward takes, by keyword, for that trial; None: ids or vectors are tried.
    apart: names of modules that stay whole here, because another axis splits them (experts).
    Raises ConfigError, with every problem found, where there is no plan, an entry matches no module or names no
    style, a layer or the heads do not split into this many ranks, tied parameters would be sharded apart, or the
    model split by the plan computes something else.
    """
    tp_size, ties = tp_mesh.size(), tied_names(model)
    own = plan is None and declared_plan(model) is None
    offers = _Offers(model, tp_mesh, example)
    entries = _checked_plan(model, plan, offers) if plan is not None else _own_plan(model, offers)
    named, problems = _resolve(model, entries, own, offers)
    held = [name for name in named if any(name == other or name.startswith(f"{other}.") for other in apart)]
    if held and (not own or len(held) == len(named)):
        problems.append(_split_twice(model, held, entries, own))
    named = {name: style for name, style in named.items() if name not in held}
    if entries is not offers.found:  # which was tried
        ConfigError.raise_if(problems or _misfits(model, named, tp_size) + _tie_problems(model, entries, named, ties))
        if not (own and _is_proven(model)):
            named, problems = _tried(model, entries, named, own, plan is None, offers)
            if problems and own and offers.derived():
                named, problems = _resolve(model, offers.derived(), own, offers)
                log.info("the tensor-parallel plan of %s does not fit it; found in its blocks: %s", *offers.told())
            ConfigError.raise_if(problems)
    if sequence_parallel and not any(map(_splits_sequence, named.values())):
        named, problems = _with_sequence(model, entries, named, own, plan is None, offers, apart)
        ConfigError.raise_if(problems)
    styles = apply_styles(model, named, tp_mesh)
    kind = "tensor and sequence" if any(map(_splits_sequence, named.values())) else "tensor"
    log.info("%s parallel over %d ranks: %d modules of %s", kind, tp_size, len(styles), type(model).__name__)
    return styles


def _is_proven(model: nn.Module) -> bool:
    """Whether a family's plan meets the family's own code, and not that of a class made of it."""
    family = find_family(model_type(model))
    return family is not None and "tp" in family.proven and type(model).__module__.startswith("transformers.models.")


def _tried(
    model: nn.Module, entries: _Plan, named: dict[str, Any], own: bool, declared: bool, offers: _Offers
) -> tuple[dict[str, Any], list[Problem]]:
    """The styles that were seen to compute what the plain model does, or what is wrong with the plan.

    own: a family's plan, which is repaired; one that a user has written is taken as it is.
    """
    where = f"the tensor-parallel plan of {type(model).__name__}" if declared else "tp_plan"
    asked = f"parallelism.tp_size={offers.mesh.size()}" if declared else _set(entries)
    try:
        if own:
            named, finding = repaired(model, named, offers.trial())
        else:
            finding = offers.trial().finding(named)
    except CannotTry as error:
        what = f"{where} cannot be tried before it is used: {error}"
        allowed = "a plan that was seen to compute what the plain model does; example: a small input of the model's"
        way_out = "nemo_dist_conf.instantiate(cfg, model, example={'x': tensor})"
        return named, [Problem(what=what, asked=asked, allowed=allowed, instead=way_out)]
    if finding is None:
        return named, []
    what = f"{where} computes something else than the plain model: {finding.text}"
    allowed, way_out = "a plan that computes the same, or tp_size=1", offers.plan(other_than=entries)
    return named, [Problem(what=what, asked=asked, allowed=allowed, instead=way_out)]


def _with_sequence(
    model: nn.Module,
    entries: _Plan,
    named: dict[str, Any],
    own: bool,
    declared: bool,
    offers: _Offers,
    apart: Collection[str],
) -> tuple[dict[str, Any], list[Problem]]:
    """The styles with those of sequence parallelism, or what is wrong: those of the family, else the first way to
    follow the residual stream that computes what the plain model does.

    apart: modules that another axis splits; a family's own styles do not know of them, and what they are in sees whole
    rows, whose parameters are laid out over nothing here.
    """
    known = family_plan(model, sequence_parallel=True) if own and not apart else None
    if known is not None:
        of_family, _ = _resolve(model, known, own, offers)
        if _is_proven(model) or offers.trial().finding(of_family) is None:
            return of_family, []
    why = ""
    try:
        for way in offers.trial().sequence_ways(named):
            holders = {name for name in way if any(f"{one}.".startswith(f"{name}.") for one in apart)}
            way |= {name: "whole_sequence" for name in holders if way[name] == "sequence_parallel"}
            found = offers.trial().finding(way)
            if found is None:
                return way, []
            why = found.text
    except CannotFollow as error:
        why = str(error)
    return named, [not_followed(model, why, "" if declared else _set(entries))]


# From a plan's patterns to the model's modules.


def _own_plan(model: nn.Module, offers: _Offers) -> _Plan:
    """The plan that a model comes with; ConfigError with the way out where it has none."""
    declared, family = declared_plan(model), model_type(model)
    if declared is not None:
        return _checked_plan(model, declared[1], offers, f"{type(model).__name__}.{declared[0]}")
    if has_other_adapters(model):
        raise ConfigError(_no_plan(model, offers))
    row, found = find_family(family), family_plan(model)
    if found is None:
        found = offers.derived() if is_transformers(model) else None
        if not found:
            raise ConfigError(_no_plan(model, offers))
        log.info("%s brings no tensor-parallel plan; found in its blocks and tried: %s", *offers.told())
        return found
    unknown = sorted({style for style in found.values() if find_style(style) is None})
    if unknown:
        what = f"the tp_plan of {family} asks for what is not supported: {', '.join(unknown)}"
        asked = f"parallelism.tp_size={offers.mesh.size()}"
        allowed = f"tp_size=1, or the families {planned_families()}"
        raise ConfigError(Problem(what=what, asked=asked, allowed=allowed, instead="parallelism.tp_size=1"))
    return found if row is not None and row.tensor_plan is not None else with_tied(model, found)


def _checked_plan(model: nn.Module, plan: Any, offers: _Offers, where: str = "strategy.tp_plan") -> _Plan:
    if isinstance(plan, Mapping) and plan:
        return {str(pattern): style for pattern, style in plan.items()}
    what = f"{where} is {'empty' if isinstance(plan, Mapping) else repr(plan)}, not styles by module name"
    own = f"{where}=null" if is_transformers(model) else offers.plan()
    raise ConfigError(
        Problem(
            what=what,
            asked=assigned(where, plan),
            allowed="a mapping from module names (* allowed) to styles",
            instead=own,
        )
    )


def _resolve(model: nn.Module, plan: _Plan, own: bool, offers: _Offers) -> tuple[dict[str, Any], list[Problem]]:
    """Style (name or object) by the full name of each module or parameter meant, and what is wrong with the entries.

    An entry that names one module overrules a pattern. A parameter is meant where no module has the name. A module that
    stands in several places has the first one's name in what is returned, whichever an entry means. own: a family's
    plan, some of whose entries mean nothing here.
    """
    modules: dict[str, Any] = {name: module for name, module in model.named_modules() if name}
    first, parameters = _first_names(model), dict(model.named_parameters())
    patterns = [pattern for pattern in plan if is_pattern(pattern)]
    named: dict[str, Any] = {}
    single: dict[str, str] = {}
    wrong: list[tuple[str, str, str]] = []
    fixed = dict(plan)
    for pattern in (*patterns, *(pattern for pattern in plan if pattern not in patterns)):
        style = plan[pattern]
        if isinstance(style, str) and find_style(style) is not None:
            style = unalias(style)
        elif not isinstance(style, ParallelStyle):
            near, allowed = style_names(style)
            wrong.append((f"tp_plan: {style!r} is not the name of a style", f"{pattern}: {style}", allowed))
            fixed[pattern] = style = near[0] if near else "replicated"
        matched = list(dict.fromkeys(name for other, name in first.items() if match_pattern(pattern, other)))
        matched = matched or [name for name in parameters if match_pattern(pattern, name)]
        if not matched and not own:
            fit = [pattern_of(name) for name, module in modules.items() if _takes(style, module)]
            free = [name for name in dict.fromkeys(fit) if name not in fixed]
            near = nearest(pattern, free)
            allowed = ", ".join(near) or ", ".join((*free[:5], "... (model.named_modules())"))
            wrong.append((f"tp_plan: no module is named {pattern}", f"{pattern}: {_words(style)}", allowed))
            fixed.pop(pattern)
            fixed |= {near[0]: style} if near else {}
        twice = [name for name in matched if name in named and pattern in patterns]
        if twice:
            others = [other for other in patterns if other != pattern and match_pattern(other, twice[0])]
            what = f"two entries of tp_plan mean the module {twice[0]}"
            wrong.append((what, f"{', '.join(others)} and {pattern}", f"one of them, or {twice[0]} by its full name"))
            fixed.pop(pattern, None)
        if pattern not in patterns:
            same = next((single[name] for name in matched if name in single and named[name] != style), None)
            if same is not None:
                what = f"{same} and {pattern} are one module, and tp_plan gives it two styles"
                wrong.append((what, f"{same}: {_words(plan[same])}, {pattern}: {_words(style)}", "one of them"))
                fixed.pop(pattern, None)
            single |= dict.fromkeys(matched, pattern)
        named |= {name: style for name in matched if name not in twice}
    named = styles_inside(model, named, any(map(_splits_sequence, named.values())))
    places = {**parameters, **modules}
    for name, style in named.items():
        if not _takes(style, places[name]):
            kinds, found = _kinds(style, places[name]), type(places[name]).__name__
            what = f"tp_plan: the style {style} is for {kinds}, and {name} is {found}"
            wrong.append((what, f"{name}: {style}", f"{name}: replicated, or no entry"))
            fixed = {key: value for key, value in fixed.items() if not match_pattern(key, name)}
    by_kind = {what: (asked, allowed) for what, asked, allowed in wrong}
    way_out = (_set(fixed) if fixed else offers.plan()) if by_kind else ""
    problems = [
        Problem(what=what, asked=asked, allowed=allowed, instead=way_out) for what, (asked, allowed) in by_kind.items()
    ]
    if not named and not problems:
        problems = [_no_plan(model, offers)]
    return {name: named[name] for name in (*modules, *parameters) if name in named}, problems


def _first_names(model: nn.Module) -> dict[str, str]:
    """The name of every place in the model -> the first name of the module that stands there."""
    first = {id(module): name for name, module in model.named_modules()}
    return {name: first[id(module)] for name, module in model.named_modules(remove_duplicate=False) if name}


def _kinds(style: Any, place: nn.Module | nn.Parameter) -> str:
    """What a style name is for, in words: kinds of modules, where a module was given it."""
    known = STYLES[style]
    if isinstance(place, nn.Parameter):
        return " or ".join(known.layers) or "modules"
    return " or ".join(known.layers) or "Parameter"


def _takes(style: Any, place: nn.Module | nn.Parameter) -> bool:
    """Whether a style, by its name or itself, is for such a module or parameter."""
    known = STYLES.get(style) if isinstance(style, str) else None
    if isinstance(place, nn.Parameter):
        return known is not None and (known.parameters or known is STYLES["replicated"])
    if known is None or (not known.layers and not known.splits):
        return True
    return layer_kind(place) in known.layers


def _splits_sequence(style: Any) -> bool:
    if isinstance(style, tuple):
        return any(map(_splits_sequence, style))
    if isinstance(style, str):
        return style in SEQUENCE_STYLES
    if isinstance(style, SequenceParallel):
        return True
    layouts = [p for name, value in vars(style).items() if "layouts" in name for p in _flat(value)]
    return Shard(SEQUENCE_DIM) in layouts


def _flat(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    return list(value) if isinstance(value, (tuple, list)) else [value]


def _misfits(model: nn.Module, named: Mapping[str, Any], tp_size: int) -> list[Problem]:
    """Heads and widths that tp_size does not divide; torch would fail at the first step, without naming the cause.

    Only where ranks keep their parts to themselves: what is gathered or summed may be split unevenly.
    """
    leaves = {name.rpartition(".")[2] for name, style in named.items() if style == "colwise"}
    config: Any = getattr(model, "config", None)
    if leaves & _OF_HEADS and hasattr(config, "to_dict"):
        problems = model_problems(facts_from_config(fields_of(config)), {"tp_size": tp_size}, dist.get_world_size())
        if problems:
            return problems
    return _odd_widths(model, named, tp_size)


def _odd_widths(model: nn.Module, named: Mapping[str, Any], tp_size: int) -> list[Problem]:
    """Layers whose ranks keep their parts to themselves, where tp_size does not divide the width."""
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    widths: dict[str, int] = {}
    for name, style in named.items():
        known = STYLES.get(style) if isinstance(style, str) else None
        if known is None or not known.keeps_part:
            continue
        weight = parameters[name] if name in parameters else modules[name].weight
        dim = known.split_dim(layer_kind(modules[name]) if name in modules else "", weight.dim())
        if dim is not None:
            widths[name] = weight.size(dim) // known.packed
    odd = [f"{name} ({width})" for name, width in widths.items() if width % tp_size]
    if not odd:
        return []
    legal = [d for d in divisors(min(widths.values())) if all(width % d == 0 for width in widths.values())]
    more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
    what = f"tp_size={tp_size} does not divide the width of {', '.join(odd[:3])}{more}"
    sizes = ", ".join(map(str, legal))
    fits = max(d for d in legal if d <= tp_size and dist.get_world_size() % d == 0)
    return [
        Problem(
            what=what,
            asked=f"parallelism.tp_size={tp_size}",
            allowed=f"tp_size: {sizes}",
            instead=f"parallelism.tp_size={fits}",
        )
    ]


def _tie_problems(model: nn.Module, plan: _Plan, named: Mapping[str, Any], ties: list[list[str]]) -> list[Problem]:
    """Ties between modules whose styles lay the shared parameter out differently."""
    problems, first = [], _first_names(model)
    for group in ties:
        places = [name.rpartition(".")[0] for name in group]
        owners = list(dict.fromkeys(first.get(place, place) for place in places))
        styles = {owner: named.get(owner) for owner in owners}
        if len({_layout(model.get_submodule(owner), style) for owner, style in styles.items()}) == 1:
            continue
        what = f"{' and '.join(group)} are one parameter, and the plan lays it out in different ways"
        asked = ", ".join(f"{owner}: {_words(style) if style else 'no style'}" for owner, style in styles.items())
        embeddings = {owner for owner in owners if isinstance(model.get_submodule(owner), nn.Embedding)}
        fix = {o: "embedding_rowwise" if o in embeddings else "colwise_gather_output" for o in owners}
        allowed = ", ".join(f"{owner}: {style}" for owner, style in fix.items())
        problems.append(Problem(what=what, asked=asked, allowed=allowed, instead=_set({**plan, **fix})))
    return problems


def _layout(module: nn.Module, style: Any) -> str:
    """Which dimension of a weight a style splits, in words that are equal where the layouts are."""
    if style is None:
        return "plain"
    kind = style if isinstance(style, str) else type(style).__name__.lower()  # torch's are called like ours
    known = STYLES.get(kind) or next((known for name, known in STYLES.items() if name in kind), None)
    dim = known.split_dim(layer_kind(module), 2) if known is not None else None
    return "replicated" if dim is None else f"dimension {dim}"


# What to say.


#: The way without tensor parallelism.
_WITHOUT = "parallelism.tp_size=1"


class _Offers:
    """What can be typed instead: plans that were tried, made only when they are asked for.

    found: the plan that was read off the model's blocks; None until it is asked for.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, example: Mapping[str, Any] | None) -> None:
        self.model, self.mesh, self.example = model, mesh, example
        self.found: dict[str, str] | None = None
        self._trial: Trial | None = None

    def trial(self) -> Trial:
        """Raises CannotTry."""
        if self._trial is None:
            self._trial = Trial(self.model, self.mesh, self.example)
        return self._trial

    def derived(self) -> dict[str, str]:
        """A plan for all rows of linear layers that split and compute the same; empty without any."""
        if self.found is None:
            self.found = {}  # what is tried for an offer makes none of its own
            try:
                self.found = derived_plan(self.model, self.trial(), self._fitting)
            except CannotTry:
                pass
        return self.found

    def _fitting(self, plan: _Plan) -> Mapping[str, Any] | None:
        named, problems = _resolve(self.model, plan, True, self)
        return None if problems or _odd_widths(self.model, named, self.mesh.size()) else named

    def told(self) -> tuple[str, str]:
        """(class of the model, the word that sets the plan which was found)."""
        return type(self.model).__name__, _set(self._short(self.derived()))

    def plan(self, other_than: _Plan | None = None) -> str:
        """The word that sets such a plan; without any, the way without tensor parallelism."""
        found = self._short(self.derived())
        return _set(found) if found and found != other_than else _WITHOUT

    def _short(self, plan: _Plan) -> _Plan:
        """With a pattern for all layers of a name in place of many, where it means no others."""
        short: dict[str, str] = {}
        for pattern, style in plan.items():
            if short.setdefault(pattern_of(pattern), style) != style:
                return plan
        meant, also = (_resolve(self.model, entries, True, self)[0] if entries else {} for entries in (plan, short))
        return short if meant == also else plan


def _words(style: Any) -> str:
    return style if isinstance(style, str) else f"{type(style).__name__}()"


def _set(plan: Mapping[str, Any]) -> str:
    """The plan as one word of a command line."""
    return assigned("strategy.tp_plan", {pattern: _words(style) for pattern, style in plan.items()})


def _no_plan(model: nn.Module, offers: _Offers) -> Problem:
    family = model_type(model)
    return Problem(
        what=f"no tensor-parallel plan is known for {type(model).__name__}" + (f" (family {family})" if family else ""),
        asked=f"parallelism.tp_size={offers.mesh.size()} strategy.tp_plan=null",
        allowed=f"tp_size=1, a tp_plan here or as an attribute of the model, or the families {planned_families()}",
        instead=offers.plan(),
    )


def _split_twice(model: nn.Module, held: list[str], plan: _Plan, own: bool) -> Problem:
    """held: names in the plan of what expert parallelism splits."""
    if own:
        what = (
            f"the tensor-parallel plan of {type(model).__name__} splits experts only, and expert parallelism has them"
        )
        asked, allowed = "parallelism.tp_size and parallelism.ep_size of 2 or more", "one of them"
        return Problem(what=what, asked=asked, allowed=allowed, instead=_WITHOUT)
    patterns = {p: style for p, style in plan.items() if any(match_pattern(p, name) for name in held)}
    rest = {p: style for p, style in plan.items() if p not in patterns}
    return Problem(
        what=f"tp_plan splits {held[0]}, and so does expert parallelism, which gives whole experts to ranks",
        asked=f"{_set(patterns)} and parallelism.ep_size of 2 or more",
        allowed="a plan without the experts, or parallelism.ep_size=1",
        instead=_set(rest) if rest else "strategy.tp_plan=null",
    )
