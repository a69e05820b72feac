"""Composed tree -> checked config: stray keys, types and every cross-field rule, all problems at once. No torch."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any, Iterator, Mapping

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.models.facts import ModelFacts, facts_from_config, facts_from_folder
from nemo_dist_conf.models.plan_rules import plan_problems
from nemo_dist_conf.models.rules import model_problems
from nemo_dist_conf.names import ACTIVATION_CHECKPOINTING_MODES, nearest
from nemo_dist_conf.schema import MixedPrecisionConf, MoEConf, ParallelismConf, PipelineConf
from nemo_dist_conf.strategies import STRATEGIES, Strategy, find_strategy, strategy_of_target
from nemo_dist_conf.strategies.common import off_but_changed
from nemo_dist_conf.topology.paths import Paths
from nemo_dist_conf.topology.pipeline import pipeline_problems
from nemo_dist_conf.topology.solve import MeshSpec, solve
from nemo_dist_conf.topology.axes import AXES, Axis
from nemo_dist_conf.topology.world import launch_command, planned_world_size

__all__ = ["Checked", "SECTIONS", "check", "check_values", "find_roots", "is_root", "section_of", "typed_words"]

#: The sibling nodes of ``strategy``, with their schema classes.
SECTIONS: dict[str, type] = {"parallelism": ParallelismConf, "pipeline": PipelineConf, "moe": MoEConf}

#: Keys that Hydra or we add to a typed node; they are not options.
_BOOKKEEPING = ("_target_", "defaults")


@dataclass(frozen=True)
class Checked:
    """A config that passed every rule; plain values, torch-free.

    strategy_values, sizes, pipeline, moe: field -> value (enums for dtypes, mappings for policies).
    notes: requests that are satisfied trivially at these sizes, one sentence each.
    """

    strategy: Strategy
    strategy_values: Mapping[str, Any]
    sizes: Mapping[str, Any]
    pipeline: Mapping[str, Any]
    moe: Mapping[str, Any]
    activation_checkpointing: bool | str
    mesh: MeshSpec
    paths: Paths = Paths()
    facts: ModelFacts = ModelFacts()
    notes: tuple[str, ...] = field(default=())


def is_root(node: Any) -> bool:
    """Whether this mapping holds a strategy node of ours under the key ``strategy``."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing() or "strategy" not in node:
        return False
    strategy = node._get_node("strategy")
    if not isinstance(strategy, DictConfig) or strategy._is_none() or strategy._is_interpolation():
        return False
    target = strategy._get_node("_target_") if "_target_" in strategy else None
    return target is not None and strategy_of_target(str(target._value())) is not None


def find_roots(cfg: Any) -> Iterator[DictConfig]:
    """Every mapping of the tree that holds our groups: the tree itself, and packages such as ``dist``."""
    if not isinstance(cfg, DictConfig) or cfg._is_none() or cfg._is_missing() or cfg._is_interpolation():
        return
    if is_root(cfg):
        yield cfg
    for key in cfg:
        yield from find_roots(cfg._get_node(key))


def check(
    cfg: Any, world_size: int | None = None, *, facts: ModelFacts | None = None, seq_len: int | None = None
) -> Checked:
    """The checked config, or ConfigError with every problem found.

    cfg: a composed tree with our groups at its root or below a package, or that package's node.
    world_size None: of the ranks that a launcher is about to start, from torchrun's or Slurm's variables, else 1.
    facts, seq_len [tokens]: of the model and the data; None: read from cfg.model where it says them, else unknown.
    """
    root = _single_root(cfg)
    paths = Paths(_prefix(root))
    problems = _misspelt_sections(root, paths)
    strategy = strategy_of_target(str(root.strategy._target_))
    if strategy is None:
        raise AssertionError(f"{root.strategy._target_} was found as a strategy node")
    values = _section(root, "strategy", strategy.schema, paths, problems)
    sections = {name: _section(root, name, schema, paths, problems) for name, schema in SECTIONS.items()}
    ConfigError.raise_if(problems)  # the rules below need well-typed values
    facts = facts or _facts(cfg, root) or ModelFacts()
    mode, mode_problems = _activation_checkpointing(root, values, strategy, paths)
    checked, found = check_values(strategy, values, sections, mode, world_size, facts, seq_len, paths)
    problems += mode_problems + found
    ConfigError.raise_if(problems)
    if checked is None:
        raise AssertionError("not checked, but no problem either")
    return checked


def check_values(
    strategy: Strategy,
    values: Mapping[str, Any],
    sections: Mapping[str, Mapping[str, Any]],
    mode: bool | str,
    world_size: int | None = None,
    facts: ModelFacts = ModelFacts(),
    seq_len: int | None = None,
    paths: Paths = Paths(),
) -> tuple[Checked | None, list[Problem]]:
    """What ``check`` does with well-typed values: the checked config, or None and every problem.

    sections: values of the nodes in SECTIONS. mode: the one answer to ``activation_checkpointing``.
    """
    problems: list[Problem] = []
    sizes, pipeline, moe = sections["parallelism"], sections["pipeline"], sections["moe"]
    if world_size is None:
        world_size = planned_world_size()
    mesh = None
    try:
        mesh = solve(sizes, world_size, strategy.axes, paths, launch_command())
    except ConfigError as error:
        problems += error.problems
    # A size that was refused already must not be refused again by each rule that it meets.
    usable = {axis.size_field: _usable(sizes[axis.size_field], axis, strategy) for axis in AXES}
    problems += strategy.rules(values, usable, paths)
    answered = {**values, "activation_checkpointing": mode, "ep_size": usable["ep_size"], **moe}
    problems += _section_problems(pipeline, moe, sizes, usable, facts, paths, answered)
    problems += model_problems(facts, usable, world_size, seq_len, paths, moe)
    problems += plan_problems(values.get("tp_plan"), facts, paths)
    problems += _execution_problems(strategy, usable, paths)
    if problems or mesh is None:
        return None, problems
    notes = _notes(values, sizes)
    return Checked(strategy, values, sizes, pipeline, moe, mode, mesh, paths, facts, notes), []


def _usable(size: Any, axis: Axis, strategy: Strategy) -> Any:
    if size is None or not isinstance(size, int) or size < 1 or axis.name not in strategy.axes.allowed:
        return axis.default
    return size


def _prefix(node: DictConfig) -> str:
    full = str(node._get_full_key("strategy"))
    return full.removesuffix("strategy").rstrip(".")


def _single_root(cfg: Any) -> DictConfig:
    if isinstance(cfg, Mapping) and not isinstance(cfg, DictConfig):
        cfg = OmegaConf.create(dict(cfg))
    if is_root(cfg):
        return cfg
    roots = list(find_roots(cfg))
    if len(roots) == 1:
        return roots[0]
    if roots:
        where = [_prefix(root) or "the root" for root in roots]
        raise ConfigError(
            Problem(
                f"strategy nodes stand in {len(roots)} places: {', '.join(where)}",
                " and ".join(Paths(_prefix(root)).key("strategy") for root in roots),
                "one strategy for a model; hand that part of the config to the hook",
                f"instantiate(cfg.{where[0]})",
            )
        )
    value = OmegaConf.select(cfg, "strategy") if isinstance(cfg, DictConfig) else cfg
    if isinstance(value, str) and value in {name for s in STRATEGIES for name in s.names}:
        what = f"strategy is the word {value!r}, not a strategy's options"
        allowed = "the config group that nemo_dist_conf registers (pip install nemo_dist_conf; no + before strategy=)"
        instead = f"strategy={value}"
    elif isinstance(value, str):
        find_strategy(value)
        raise AssertionError("unreachable: the strategy is unknown")
    else:
        what = "the config holds no strategy of nemo_dist_conf"
        allowed = "one of " + ", ".join(name for s in STRATEGIES for name in s.names)
        instead = "+nemo_dist_conf@_global_=default" if value is None else "strategy=fsdp2"
    shown = value if isinstance(value, (str, type(None))) else type(value).__name__
    raise ConfigError(Problem(what, f"strategy={'null' if shown is None else shown}", allowed, instead))


def _section(root: DictConfig, name: str, schema: type, paths: Paths, problems: list[Problem]) -> dict[str, Any]:
    """The node's values by field, typed as its schema; problems are appended, defaults stand in for what is wrong."""
    node = root.get(name) if name in root else None
    if node is None and name not in root:
        return _defaults(schema)
    if isinstance(node, DictConfig):
        values = _already_typed(node, schema)
        if values is not None:
            return values
    typed = OmegaConf.structured(schema)
    if node is None:
        problems.append(
            Problem(
                f"{paths.key(name)} is null",
                f"{paths.key(name)}=null",
                "its own defaults are the way to leave it alone",
                _default_choice(name, paths),
            )
        )
    elif node is not None and not isinstance(node, DictConfig):
        problems.append(
            Problem(
                f"{paths.key(name)} is {node!r}, not a group of options",
                f"{paths.key(name)}={node}",
                ", ".join(item.name for item in dataclasses.fields(schema)),
                _default_choice(name, paths),
            )
        )
    elif node is not None:
        _merge(typed, node, schema, name, paths, problems)
    return _plain(typed)


@functools.cache
def _flat_defaults(schema: type) -> dict[str, Any]:
    return _leaves(_defaults(schema))


def _defaults(schema: type) -> dict[str, Any]:
    # Not through OmegaConf, which takes milliseconds to type what is typed: every rank's start checks its config.
    return {key: value for key, value in dataclasses.asdict(schema()).items() if key not in _BOOKKEEPING}


def _already_typed(node: DictConfig, schema: type) -> dict[str, Any] | None:
    """The values of a node that Hydra composed from our schema and that holds no stray key; None for any other.

    Such a node needs no second typing, which takes ten times as long.
    """
    kind = OmegaConf.get_type(node)
    if not (isinstance(kind, type) and issubclass(kind, schema)):
        return None
    try:
        values = OmegaConf.to_container(node, resolve=True)
    except OmegaConfBaseException:
        return None
    if not isinstance(values, dict):
        return None
    plain = {str(key): value for key, value in values.items() if key not in _BOOKKEEPING}
    known = {item.name: _nested_schema(item) for item in dataclasses.fields(schema)}
    for key, value in plain.items():
        inner = known.get(key)
        if key not in known or (inner and value is not None and set(value) != _names(inner)):
            return None
    return plain if set(plain) == set(known) else None


@functools.cache
def _names(schema: type) -> frozenset[str]:
    return frozenset(item.name for item in dataclasses.fields(schema))


def _merge(typed: DictConfig, node: DictConfig, schema: type, name: str, paths: Paths, problems: list[Problem]) -> None:
    known = {item.name: item for item in dataclasses.fields(schema)}
    for key in map(str, node):
        if key in _BOOKKEEPING and "." not in name:
            continue
        if key not in known:
            problems.append(_stray(f"{name}.{key}", _raw(node, key), known, paths))
            continue
        try:
            value = node[key]
            inner = getattr(known[key].default_factory, "__call__", None) and _nested_schema(known[key])
            if inner and isinstance(value, DictConfig):
                _merge(typed[key], value, inner, f"{name}.{key}", paths, problems)
            else:
                typed[key] = value
        except OmegaConfBaseException as error:
            refusal = _resolvers_refusal(error)
            if refusal is not None:  # it says more than OmegaConf's wrapping
                problems += [problem for problem in refusal.problems if problem not in problems]
                continue
            problems.append(
                Problem(
                    f"{paths.key(f'{name}.{key}')}: {str(error).splitlines()[0]}",
                    paths.set(f"{name}.{key}", _raw(node, key)),
                    known[key].metadata.get("help", "a value of its type"),
                    paths.set(f"{name}.{key}", _default_text(known[key])),
                )
            )


def _resolvers_refusal(error: BaseException | None) -> ConfigError | None:
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def _raw(node: DictConfig, key: str) -> Any:
    """What was written at a key, not resolved; a nested node as its inline text."""
    value = node._get_node(key)
    if OmegaConf.is_config(value):
        return _shown(OmegaConf.to_container(value))
    return value._value() if value is not None else None


def _nested_schema(item: dataclasses.Field[Any]) -> type | None:
    if item.default_factory is dataclasses.MISSING:
        return None
    value = item.default_factory()
    return type(value) if dataclasses.is_dataclass(value) else None


def _default_text(item: dataclasses.Field[Any]) -> Any:
    value = item.default if item.default is not dataclasses.MISSING else None
    return getattr(value, "name", value)


def _default_choice(section: str, paths: Paths) -> str:
    return paths.choose(section, {"pipeline": "1f1b", "strategy": "fsdp2"}.get(section, "default"))


def _plain(typed: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(typed, resolve=True)
    if not isinstance(values, dict):
        raise AssertionError(f"{typed} is not a mapping")
    return {str(key): value for key, value in values.items()}


def _stray(path: str, value: Any, known: Mapping[str, Any], paths: Paths) -> Problem:
    """A key that ``+`` or ``++`` slipped in: the nearest option, or the strategy or section that has it."""
    key = path.rsplit(".", 1)[-1]
    asked = f"+{paths.set(path, value)}"
    section = path.split(".", 1)[0]
    owners = [s.name for s in STRATEGIES if key in {item.name for item in dataclasses.fields(s.schema)}]
    other = section_of(key)
    likely = nearest(key, known)
    if section == "strategy" and owners:
        what = f"{paths.key(path)} is not an option of this strategy; {' and '.join(owners)} has it"
        instead = f"{paths.choose('strategy', owners[0])} {paths.set(path, value)}"
    elif other and other != section:
        what = f"{paths.key(path)} is not an option; {other} has it"
        instead = paths.set(f"{other}.{key}", value)
    elif likely:
        what = f"{paths.key(path)} is not an option; did you mean {likely[0]}?"
        instead = paths.set(f"{path.rsplit('.', 1)[0]}.{likely[0]}", value)
    else:
        what = f"{paths.key(path)} is not an option"
        instead = f"~{paths.key(path)}"
    ordered = likely + [name for name in known if name not in likely]
    return Problem(what, asked, ", ".join(ordered), instead)


def _misspelt_sections(root: DictConfig, paths: Paths) -> list[Problem]:
    """Siblings of ours that look like one of our sections but are not, so that their values would be ignored."""
    names = ["strategy", *SECTIONS, "activation_checkpointing"]
    problems = []
    for key in map(str, root):
        likely = [] if key in names else nearest(key, names, cutoff=0.8)
        if not likely or likely[0] in _closer(root, key, likely[0]):
            continue
        words = typed_words(root, key)
        problems.append(
            Problem(
                f"{paths.key(key)} is not a section of nemo_dist_conf; did you mean {likely[0]}?",
                " ".join(f"+{paths.key(word)}" for word in words),
                ", ".join(names),
                " ".join(paths.key(word.replace(key, likely[0], 1)) for word in words),
            )
        )
    return problems


def typed_words(node: DictConfig, key: str) -> list[str]:
    """The overrides that would set a key, one for each value below it."""
    value = node._get_node(key)
    if isinstance(value, DictConfig) and not value._is_none() and len(value):
        return [f"{key}.{word}" for inner in value for word in typed_words(value, str(inner))]
    return [Paths().set(key, _raw(node, key))]


def section_of(option: str) -> str | None:
    """The section that has an option of this name, if exactly one has."""
    owners = [name for name, schema in SECTIONS.items() if option in {item.name for item in dataclasses.fields(schema)}]
    return owners[0] if len(owners) == 1 else None


def _closer(root: DictConfig, key: str, likely: str) -> list[str]:
    """An app may own a key that merely resembles ours; ours is meant only where the key holds our options."""
    schema = SECTIONS.get(likely)
    node = root._get_node(key)
    if schema is None or not isinstance(node, DictConfig) or node._is_none():
        return [likely] if likely in SECTIONS else []
    options = {item.name for item in dataclasses.fields(schema)}
    return [] if options & {str(k) for k in node} else [likely]


def _facts(cfg: Any, root: DictConfig) -> ModelFacts | None:
    """The model's shape, where ``model`` is a transformers config or names a local checkpoint folder."""
    for tree in (root, cfg):
        model = tree.get("model") if isinstance(tree, DictConfig) and "model" in tree else None
        if not isinstance(model, DictConfig):
            continue
        config = model.get("config")
        facts = facts_from_folder(model.name_or_path) if model.get("name_or_path") else None
        if facts is None and isinstance(config, DictConfig) and "model_type" in config:
            facts = facts_from_config(OmegaConf.to_container(config, resolve=True))  # type: ignore[arg-type]
        if facts is not None:
            return facts
    return None


def _activation_checkpointing(
    root: DictConfig, values: Mapping[str, Any], strategy: Strategy, paths: Paths
) -> tuple[bool | str, list[Problem]]:
    """One answer from the two places that can hold it."""
    outer = root.get("activation_checkpointing", False)
    inner = values["activation_checkpointing"]
    outer_key, inner_key = "activation_checkpointing", "strategy.activation_checkpointing"
    problems = []
    for key, mode in ((outer_key, outer), (inner_key, inner)):
        known = any(mode is m or (isinstance(m, str) and mode == m) for m in ACTIVATION_CHECKPOINTING_MODES)
        if not known or not (mode in strategy.activation_checkpointing):
            what = f"{key}={mode} is not a mode" + (f" of strategy={strategy.name}" if known else "")
            allowed = ", ".join(str(m).lower() for m in strategy.activation_checkpointing)
            problems.append(Problem(what, paths.set(key, mode), allowed, paths.set(key, True)))
    if not problems and outer is not False and inner is not False and outer != inner:
        problems.append(
            Problem(
                "activation checkpointing has two different answers",
                f"{paths.set(outer_key, outer)} {paths.set(inner_key, inner)}",
                "one of them, or both the same",
                f"{paths.set(outer_key, outer)} {paths.set(inner_key, outer)}",
            )
        )
    return (outer if outer is not False else inner), problems


def _section_problems(
    pipeline: Mapping[str, Any],
    moe: Mapping[str, Any],
    sizes: Mapping[str, Any],
    usable: Mapping[str, Any],
    facts: ModelFacts,
    paths: Paths,
    strategy: Mapping[str, Any],
) -> list[Problem]:
    problems = []
    if usable["pp_size"] > 1:
        problems += pipeline_problems(pipeline, usable["pp_size"], facts.num_layers, paths, strategy)
    elif sizes["pp_size"] == 1:
        problems += _changed_while_off("pipeline", pipeline, PipelineConf, "pp_size", paths)
    if usable["ep_size"] > 1:
        problems += off_but_changed(moe["mp_policy"], MixedPrecisionConf(enabled=False), "moe.mp_policy", paths)
    elif sizes["ep_size"] == 1:
        problems += _changed_while_off("moe", moe, MoEConf, "ep_size", paths)
    return problems


def _changed_while_off(
    section: str, values: Mapping[str, Any], schema: type, size: str, paths: Paths
) -> list[Problem]:
    defaults = _flat_defaults(schema)
    changed = {key: value for key, value in _leaves(dict(values)).items() if value != defaults.get(key)}
    if not changed:
        return []
    shown = [paths.set(f"{section}.{key}", _shown(value)) for key, value in changed.items()]
    return [
        Problem(
            f"{section} settings were changed, but {size} is 1, so they would do nothing",
            " ".join(shown),
            f"the defaults while {size}=1, or {size} of 2 or more",
            _default_choice(section, paths),
        )
    ]


def _leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found.update(_leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found


def _shown(value: Any) -> Any:
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_shown(v)}" for k, v in value.items()) + "}"
    value = getattr(value, "name", value)
    return str(value).lower() if isinstance(value, bool) else value


def _execution_problems(strategy: Strategy, sizes: Mapping[str, Any], paths: Paths) -> list[Problem]:
    """What composes and has a mesh, but is not executed by this version."""
    problems = []
    for axis in AXES:
        size = sizes[axis.size_field] or 1
        if isinstance(size, int) and size > 1 and axis.name in strategy.axes.allowed - strategy.executes:
            key = f"parallelism.{axis.size_field}"
            problems.append(
                Problem(
                    f"{axis.title} composes and has a mesh, but this version does not execute it",
                    paths.set(key, size),
                    f"{axis.size_field}=1",
                    paths.set(key, axis.default),
                )
            )
    return problems


def _notes(values: Mapping[str, Any], sizes: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    if (sizes["tp_size"] or 1) == 1:
        for name in ("sequence_parallel", "tp_plan"):
            if values.get(name):
                notes.append(f"strategy.{name} has nothing to split while parallelism.tp_size=1")
    return tuple(notes)
