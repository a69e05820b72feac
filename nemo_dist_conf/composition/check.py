"""Composed tree -> checked config: its sections, and every rule between fields, all problems at once. No torch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Iterator, Mapping

from omegaconf import DictConfig, OmegaConf

from nemo_dist_conf.composition.command_line import as_typed_here, is_chosen
from nemo_dist_conf.composition.hydra_inside import full_key, has_values, is_missing, is_null, node_at
from nemo_dist_conf.composition.sections import (
    SECTIONS,
    default_choice,
    flat_defaults,
    leaves,
    misspelt_sections,
    read_section,
    strategy_of,
)
from nemo_dist_conf.composition.store import is_ours
from nemo_dist_conf.composition.text_values import text_problems, told_as_texts, unread_problems
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.families.config_facts import ModelFacts, facts_from_config, facts_from_folder
from nemo_dist_conf.families.model_rules import layerdrop_problems, model_problems
from nemo_dist_conf.families.plan_rules import plan_problems
from nemo_dist_conf.names import BATCH_STATISTICS
from nemo_dist_conf.schema import MixedPrecisionConf, MoEConf, PipelineConf
from nemo_dist_conf.schema.asked import Asked, Idle
from nemo_dist_conf.schema.own_groups import OWN_SCHEMAS, own_group
from nemo_dist_conf.strategies import STRATEGIES, Strategy, default_strategy, find_strategy
from nemo_dist_conf.strategies.common import off_but_changed
from nemo_dist_conf.topology.axes import AXES, Axis
from nemo_dist_conf.topology.checkpointing_modes import one_mode
from nemo_dist_conf.topology.launched_ranks import launch_command, planned_world_size
from nemo_dist_conf.topology.schedule_rules import pipeline_problems
from nemo_dist_conf.topology.solve import MeshSpec, number_problem, solve
from nemo_dist_conf.wording import Spelling, assigned, typed

__all__ = ["Checked", "check", "check_values", "find_roots"]


@dataclass(frozen=True)
class Checked:
    """A config that passed every rule; plain values, torch-free.

    strategy_values, sizes, pipeline, moe: field -> value (enums for dtypes, mappings for policies).
    groups: of each group of ours beyond the page's, field -> value.
    notes: requests that are satisfied trivially at these sizes, one sentence each.
    """

    strategy: Strategy
    strategy_values: Mapping[str, Any]
    sizes: Mapping[str, Any]
    pipeline: Mapping[str, Any]
    moe: Mapping[str, Any]
    activation_checkpointing: bool | str
    mesh: MeshSpec
    spelling: Spelling = Spelling()
    facts: ModelFacts = ModelFacts()
    notes: tuple[str, ...] = field(default=())
    batch_statistics: str = "local"
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _is_root(node: Any) -> bool:
    """Whether this mapping holds a strategy node of ours under the key ``strategy``."""
    if not isinstance(node, DictConfig) or is_null(node) or is_missing(node) or "strategy" not in node:
        return False
    return strategy_of(node_at(node, "strategy")) is not None


def find_roots(cfg: Any) -> Iterator[DictConfig]:
    """Every mapping of the tree that holds our groups: the tree itself, and packages such as ``dist``."""
    if not isinstance(cfg, DictConfig) or not has_values(cfg):
        return
    if _is_root(cfg):
        yield cfg
    for key in cfg:
        yield from find_roots(node_at(cfg, key))


def check(
    cfg: Any, world_size: int | None = None, *, facts: ModelFacts | None = None, seq_len: int | None = None
) -> Checked:
    """The checked config, or ConfigError with every problem found.

    cfg: a composed tree with our groups at its root or below a package, or that package's node.
    world_size None: of the ranks that a launcher is about to start, from torchrun's or Slurm's variables, else 1.
    facts, seq_len [tokens]: of the model and the data; None: read from cfg.model where it says them, else unknown.
    """
    try:
        return _check(cfg, world_size, facts, seq_len)
    except ConfigError as error:
        told = told_as_texts(error, cfg, lambda read: _check(read, world_size, facts, seq_len))
        raise as_typed_here(told, cfg) from None


def _check(cfg: Any, world_size: int | None, facts: ModelFacts | None, seq_len: int | None) -> Checked:
    root = _single_root(cfg)
    spelling = Spelling(_prefix(root))
    problems = misspelt_sections(root, spelling)
    strategy = strategy_of(root.strategy)
    if strategy is None:
        raise AssertionError(f"{root.strategy} was found as a strategy node")
    values = read_section(root, "strategy", strategy.schema, spelling, problems)
    sections = {name: read_section(root, name, schema, spelling, problems) for name, schema in SECTIONS.items()}
    problems += _model_texts(cfg, root)
    problems += unread_problems(root, ("activation_checkpointing", "batch_statistics"))
    ConfigError.raise_if(problems)  # the rules below need well-typed values
    facts = facts or _facts(cfg, root) or ModelFacts()
    said = {
        "activation_checkpointing": root.get("activation_checkpointing", False),
        "strategy.activation_checkpointing": values["activation_checkpointing"],
    }
    mode, mode_problems = one_mode(said, strategy.activation_checkpointing, strategy.name, spelling)
    checked, found = check_values(strategy, values, sections, mode, world_size, facts, seq_len, spelling)
    statistics, statistics_problems = _batch_statistics(root, spelling)
    problems += mode_problems + statistics_problems + found
    if checked is not None:
        problems += layerdrop_problems(
            _model_config(cfg, root), values, checked.sizes, checked.mesh.world_size, spelling
        )
    ConfigError.raise_if(problems)
    if checked is None:
        raise AssertionError("not checked, but no problem either")
    return dataclasses.replace(checked, batch_statistics=statistics)


def check_values(
    strategy: Strategy,
    values: Mapping[str, Any],
    sections: Mapping[str, Mapping[str, Any]],
    mode: bool | str,
    world_size: int | None = None,
    facts: ModelFacts = ModelFacts(),
    seq_len: int | None = None,
    spelling: Spelling = Spelling(),
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
        mesh = solve(sizes, world_size, strategy.axes, spelling, launch_command())
    except ConfigError as error:
        problems += error.problems
    # A size that was refused already must not be refused again by each rule that it meets.
    usable = {axis.size_field: _usable(sizes[axis.size_field], axis, strategy) for axis in AXES}
    problems += strategy.rules(values, usable, spelling)
    answered = {**values, "activation_checkpointing": mode, "ep_size": usable["ep_size"], **moe}
    problems += _section_problems(pipeline, moe, sizes, usable, facts, spelling, answered)
    problems += model_problems(facts, usable, world_size, seq_len, spelling, moe)
    problems += plan_problems(values.get("tp_plan"), facts, spelling)
    own = {name: sections[name] for name in OWN_SCHEMAS}
    refused = any(sizes[name] != size for name, size in usable.items())
    problems += _own_problems(own, Asked(strategy, values, usable, mode, facts, own, spelling), refused)
    if problems or mesh is None:
        return None, problems
    notes = _notes(values, sizes)
    return Checked(strategy, values, sizes, pipeline, moe, mode, mesh, spelling, facts, notes, groups=own), []


def _usable(size: Any, axis: Axis, strategy: Strategy) -> Any:
    possible = number_problem(axis, size) is None and axis.name in strategy.axes.allowed
    return size if possible else axis.default


def _prefix(node: DictConfig) -> str:
    full = full_key(node, "strategy")
    return full.removesuffix("strategy").rstrip(".")


def _single_root(cfg: Any) -> DictConfig:
    if isinstance(cfg, Mapping) and not isinstance(cfg, DictConfig):
        cfg = OmegaConf.create(dict(cfg), flags={"allow_objects": True})
    if _is_root(cfg):
        return cfg
    roots = list(find_roots(cfg))
    if len(roots) == 1:
        return roots[0]
    if roots:
        where = [_prefix(root) or "the root" for root in roots]
        raise ConfigError(
            Problem(
                what=f"strategy nodes stand in {len(roots)} places: {', '.join(where)}",
                asked=" and ".join(Spelling(_prefix(root)).key("strategy") for root in roots),
                allowed="one strategy for a model; hand that part of the config to the hook",
                instead=f"instantiate(cfg.{where[0]})",
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
    elif (extended := _meant_by(value)) is not None:
        what = f"the config holds no strategy of nemo_dist_conf, only options of {extended}, whose file takes in none"
        allowed = f"a preset that begins with defaults: [{extended}, _self_]"
        instead = f"defaults: [{extended}, _self_]"
    else:
        what = "the config holds no strategy of nemo_dist_conf"
        allowed = "one of " + ", ".join(name for s in STRATEGIES for name in s.names)
        instead = _choice_of_a_strategy(cfg)
    shown = value if isinstance(value, (str, type(None))) else type(value).__name__
    raise ConfigError(Problem(what=what, asked=assigned("strategy", shown), allowed=allowed, instead=instead))


def _choice_of_a_strategy(cfg: Any) -> str:
    """The words that choose one: where the other sections stand, and by the name that the group has in this app."""
    package = _package_of_sections(cfg)
    place = Spelling(package).key("strategy")
    choice = Spelling(package).choose("strategy", default_strategy())
    if not is_ours("strategy"):
        return f"+nemo_dist/strategy@{place}={default_strategy()}"
    return choice if is_chosen(cfg, choice.partition("=")[0]) else f"+{choice}"


def _package_of_sections(node: Any) -> str:
    """Where sections of ours stand without a strategy; "" where none does."""
    if not isinstance(node, DictConfig) or not has_values(node):
        return ""
    if any(OmegaConf.is_dict(node_at(node, name)) for name in SECTIONS if name in node):
        return full_key(node, "")
    return next((found for key in node if (found := _package_of_sections(node_at(node, key)))), "")


def _meant_by(node: Any) -> str | None:
    """The strategy that has all keys of a node, which is no strategy of ours."""
    keys = set(map(str, node)) if isinstance(node, DictConfig) and not is_null(node) else set()
    fields = ((s.name, {item.name for item in dataclasses.fields(s.schema)}) for s in STRATEGIES)
    return next((name for name, known in fields if keys and keys <= known), None)


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


def _model_config(cfg: Any, root: DictConfig) -> Mapping[str, Any]:
    """Fields that the tree gives to the model's config."""
    for tree in (root, cfg):
        held = isinstance(tree, DictConfig) and "model" in tree
        config = OmegaConf.select(tree, "model.config", throw_on_missing=False) if held else None
        if isinstance(config, DictConfig):
            return {str(key): config.get(key) for key in config}
    return {}


def _model_texts(cfg: Any, root: DictConfig) -> list[Problem]:
    """Fields of a transformers config that are texts: the config would keep them as such, whatever they say."""
    models = [tree.get("model") for tree in (root, cfg) if isinstance(tree, DictConfig) and "model" in tree]
    configs = [model.get("config") for model in models[:1] if isinstance(model, DictConfig)]
    return [problem for config in configs for problem in text_problems(config)]


def _batch_statistics(root: DictConfig, spelling: Spelling) -> tuple[str, list[Problem]]:
    value, key = root.get("batch_statistics", "local"), "batch_statistics"
    if value in BATCH_STATISTICS:
        return value, []
    what, allowed = f"{key}={value} is not one of its values", ", ".join(BATCH_STATISTICS)
    return "local", [
        Problem(what=what, asked=spelling.set(key, value), allowed=allowed, instead=spelling.set(key, "global"))
    ]


def _section_problems(
    pipeline: Mapping[str, Any],
    moe: Mapping[str, Any],
    sizes: Mapping[str, Any],
    usable: Mapping[str, Any],
    facts: ModelFacts,
    spelling: Spelling,
    strategy: Mapping[str, Any],
) -> list[Problem]:
    problems = []
    if usable["pp_size"] > 1:
        problems += pipeline_problems(pipeline, usable["pp_size"], facts.num_layers, spelling, strategy)
    elif sizes["pp_size"] == 1:
        problems += _changed_while_off("pipeline", pipeline, PipelineConf, _alone("pp_size"), spelling)
    if usable["ep_size"] > 1:
        problems += off_but_changed(moe["mp_policy"], MixedPrecisionConf(enabled=False), "moe.mp_policy", spelling)
    elif sizes["ep_size"] == 1:
        problems += _changed_while_off("moe", moe, MoEConf, _alone("ep_size"), spelling)
    return problems


def _alone(size: str) -> Idle:
    return Idle(size, 1, "2 or more")


def _own_problems(groups: Mapping[str, Mapping[str, Any]], asked: Asked, sizes_are_refused: bool) -> list[Problem]:
    problems: list[Problem] = []
    for name, values in groups.items():
        group = own_group(name)
        wrong = list(group.problems(values, asked))
        idle = None if sizes_are_refused else group.idle(asked)
        if idle is not None and not wrong:
            wrong = _changed_while_off(name, values, group.schema, idle, asked.spelling)
        problems += wrong
    return problems


def _changed_while_off(
    section: str, values: Mapping[str, Any], schema: type, idle: Idle, spelling: Spelling
) -> list[Problem]:
    defaults = flat_defaults(schema)
    changed = {key: value for key, value in leaves(dict(values)).items() if value != defaults.get(key)}
    if not changed:
        return []
    shown = [spelling.set(f"{section}.{key}", value) for key, value in changed.items()]
    instead = [
        default_choice(section, spelling)
        if key == "pp_schedule"
        else spelling.set(f"{section}.{key}", defaults.get(key))
        for key in changed
    ]
    return [
        Problem(
            what=f"{section} settings were changed, but {idle.key} is {typed(idle.value)}, so they would do nothing",
            asked=" ".join(shown),
            allowed=f"the defaults while {idle.key}={typed(idle.value)}, or {idle.key} of {idle.needed}",
            instead=" ".join(instead),
        )
    ]


def _notes(values: Mapping[str, Any], sizes: Mapping[str, Any]) -> tuple[str, ...]:
    notes = []
    if (sizes["tp_size"] or 1) == 1:
        for name in ("sequence_parallel", "tp_plan"):
            if values.get(name):
                notes.append(f"strategy.{name} has nothing to split while parallelism.tp_size=1")
    return tuple(notes)
