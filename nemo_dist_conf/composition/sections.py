"""The sections of a composed tree: each node's values typed as its schema says, and the keys that belong to none.

No rule between fields: those are compose.py's. No torch.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Mapping

from omegaconf import AnyNode, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_dist_conf.composition.hydra_inside import flag_of, has_values, is_null, node_at, written
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.names import OWN_GROUPS, DType, nearest
from nemo_dist_conf.schema import MoEConf, ParallelismConf, PipelineConf
from nemo_dist_conf.schema.own_groups import OWN_SCHEMAS
from nemo_dist_conf.strategies import STRATEGIES, Strategy, default_strategy, strategy_of_target
from nemo_dist_conf.wording import Spelling, unknown_name

__all__ = [
    "SECTIONS",
    "default_choice",
    "flat_defaults",
    "leaves",
    "misspelt_sections",
    "read_section",
    "section_of",
    "strategy_of",
    "values_below",
]

#: The sibling nodes of ``strategy``, with their schema classes.
SECTIONS: dict[str, type] = {
    "parallelism": ParallelismConf,
    "pipeline": PipelineConf,
    "moe": MoEConf,
    **OWN_SCHEMAS,
}

#: Keys that Hydra or we add to a typed node; they are not options.
_BOOKKEEPING = ("_target_", "defaults")
#: Class names of torch's policies, which Python code and YAML with a ``_target_`` give in place of our nodes.
_POLICIES = ("CPUOffloadPolicy", "MixedPrecisionPolicy")


def strategy_of(node: Any) -> Strategy | None:
    """The strategy whose options a node holds: as composed, or as Hydra leaves it once it is instantiated.

    hydra.utils.instantiate makes the typed config of a node. Where it stands in a tree it is a node of that class again
    with OmegaConf 2.3, and the object itself with 2.4.
    """
    node = _as_node(node)
    if not isinstance(node, DictConfig) or not has_values(node):
        return None
    target = node_at(node, "_target_") if "_target_" in node else None
    if target is not None:
        return strategy_of_target(str(written(target)))
    kind = OmegaConf.get_type(node)
    classes = kind.__mro__ if isinstance(kind, type) else ()
    return next(filter(None, (strategy_of_target(f"{c.__module__}.{c.__name__}") for c in classes)), None)


def _as_node(value: Any) -> Any:
    """A typed config or a policy as a node of its fields; anything else as it is."""
    value = written(value) if isinstance(value, AnyNode) else value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return OmegaConf.structured(value, flags={"allow_objects": True})
    return value


def read_section(
    root: DictConfig, name: str, schema: type, spelling: Spelling, problems: list[Problem]
) -> dict[str, Any]:
    """The node's values by field, typed as its schema; problems are appended, defaults stand in for what is wrong."""
    node = _as_node(root.get(name)) if name in root else None
    if name not in root or (name in OWN_SCHEMAS and not _means(name, node, schema)):
        return _defaults(schema)
    if isinstance(node, DictConfig):
        values = _already_typed(node, schema)
        if values is not None:
            return values
    typed = OmegaConf.structured(schema, flags={"allow_objects": True} if flag_of(root, "allow_objects") else None)
    objects: dict[str, Any] = {}
    if node is None:
        problems.append(
            Problem(
                what=f"{spelling.key(name)} is null",
                asked=spelling.set(name, None),
                allowed="its own defaults are the way to leave it alone",
                instead=default_choice(name, spelling),
            )
        )
    elif node is not None and not isinstance(node, DictConfig):
        problems.append(
            Problem(
                what=f"{spelling.key(name)} is {node!r}, not a group of options",
                asked=spelling.set(name, node),
                allowed=", ".join(item.name for item in dataclasses.fields(schema)),
                instead=default_choice(name, spelling),
            )
        )
    elif node is not None:
        objects = _merge(typed, node, schema, name, spelling, problems)
    return {**_plain(typed), **objects}


def _means(name: str, node: Any, schema: type) -> bool:
    """Whether what stands under the name of a group of ours is that group's, and not something of the app's.

    A node of our type is, one that has an option of ours or what looks like one, and the name of a choice.
    """
    if isinstance(node, str):
        return node in OWN_GROUPS[name]
    if not isinstance(node, DictConfig) or not has_values(node):
        return False
    kind = OmegaConf.get_type(node)
    if isinstance(kind, type) and issubclass(kind, schema):
        return True
    target = str(node_at(node, "_target_")).rpartition(".")[2] if "_target_" in node else ""
    names = [item.name for item in dataclasses.fields(schema)]
    return target == schema.__name__ or any(nearest(str(key), names, cutoff=0.8) for key in node)


def _defaults(schema: type) -> dict[str, Any]:
    # Not through OmegaConf, which takes milliseconds to type what is typed: every rank's start checks its config.
    return {key: value for key, value in dataclasses.asdict(schema()).items() if key not in _BOOKKEEPING}


@functools.cache
def flat_defaults(schema: type) -> dict[str, Any]:
    """A schema's defaults by dotted key."""
    return leaves(_defaults(schema))


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
        if callable(value) or _is_of_torch(value):
            return None
    return plain if set(plain) == set(known) else None


@functools.cache
def _names(schema: type) -> frozenset[str]:
    return frozenset(item.name for item in dataclasses.fields(schema))


def _is_of_torch(value: Any) -> bool:
    return type(value).__module__ == "torch"


def _by_name(value: Any) -> Any:
    """A dtype of torch, or its path, as the name that our nodes have for it; anything else as it is."""
    if not isinstance(value, str) and not _is_of_torch(value):
        return value
    name = str(value).removeprefix("torch.")
    return name if name in DType.__members__ or _is_of_torch(value) else value


def _is_policy(node: DictConfig) -> bool:
    """Whether a node is a policy of torch itself, which is on by being there, and not one of ours with its switch."""
    kind = OmegaConf.get_type(node)
    target = str(node_at(node, "_target_")) if "_target_" in node else getattr(kind, "__name__", "")
    return target.rpartition(".")[2] in _POLICIES


def _merge(
    typed: DictConfig, node: DictConfig, schema: type, name: str, spelling: Spelling, problems: list[Problem]
) -> dict[str, Any]:
    """Put the node's values into the typed one; returns what only Python can say (functions), by key."""
    known = {item.name: item for item in dataclasses.fields(schema)}
    objects = {}
    for key in map(str, node):
        if key in _BOOKKEEPING and ("." not in name or key == "_target_"):
            continue
        if key not in known:
            problems.append(_stray(f"{name}.{key}", _raw(node, key), known, spelling))
            continue
        try:
            value = _as_node(node[key])
            inner = getattr(known[key].default_factory, "__call__", None) and _nested_schema(known[key])
            if inner and isinstance(value, DictConfig):
                if _is_policy(value):
                    typed[key].enabled = True
                _merge(typed[key], value, inner, f"{name}.{key}", spelling, problems)
            elif callable(value):
                objects[key] = value
            else:
                typed[key] = _by_name(value)
        except OmegaConfBaseException as error:
            refusal = _resolvers_refusal(error)
            if refusal is not None:  # it says more than OmegaConf's wrapping
                problems += [problem for problem in refusal.problems if problem not in problems]
                continue
            problems.append(
                Problem(
                    what=f"{spelling.key(f'{name}.{key}')}: {str(error).splitlines()[0]}",
                    asked=spelling.set(f"{name}.{key}", _raw(node, key)),
                    allowed=known[key].metadata.get("help", "a value of its type"),
                    instead=spelling.set(f"{name}.{key}", _default_text(known[key])),
                )
            )
    return objects


def _resolvers_refusal(error: BaseException | None) -> ConfigError | None:
    while error is not None and not isinstance(error, ConfigError):
        error = error.__cause__ or error.__context__
    return error


def _raw(node: DictConfig, key: str) -> Any:
    """What was written at a key, not resolved."""
    value = node_at(node, key)
    if OmegaConf.is_config(value):
        return OmegaConf.to_container(value)
    return written(value) if value is not None else None


def _nested_schema(item: dataclasses.Field[Any]) -> type | None:
    if item.default_factory is dataclasses.MISSING:
        return None
    value = item.default_factory()
    return type(value) if dataclasses.is_dataclass(value) else None


def _default_text(item: dataclasses.Field[Any]) -> Any:
    value = item.default if item.default is not dataclasses.MISSING else None
    return getattr(value, "name", value)


def default_choice(section: str, spelling: Spelling) -> str:
    """The words that choose the section's default option."""
    first = {"pipeline": "1f1b", "strategy": default_strategy()}
    first |= {group: next(iter(options)) for group, options in OWN_GROUPS.items()}
    return spelling.choose(section, first.get(section, "default"))


def _plain(typed: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(typed, resolve=True)
    if not isinstance(values, dict):
        raise AssertionError(f"{typed} is not a mapping")
    return {str(key): value for key, value in values.items()}


def _stray(path: str, value: Any, known: Mapping[str, Any], spelling: Spelling) -> Problem:
    """A key that ``+`` or ``++`` slipped in: the nearest option, or the strategy or section that has it."""
    key = path.rsplit(".", 1)[-1]
    asked = spelling.set(path, value, "+")
    section = path.split(".", 1)[0]
    owners = [s.name for s in STRATEGIES if key in {item.name for item in dataclasses.fields(s.schema)}]
    other = section_of(key)
    problem = unknown_name(
        key,
        known,
        what=f"{spelling.key(path)} is not an option",
        asked=asked,
        offer=lambda name: spelling.set(f"{path.rsplit('.', 1)[0]}.{name}", value),
        otherwise=f"~{spelling.key(path)}",
        hint=True,
    )
    if section == "strategy" and owners:
        what = f"{spelling.key(path)} is not an option of this strategy; {' and '.join(owners)} has it"
        instead = f"{spelling.choose('strategy', owners[0])} {spelling.set(path, value)}"
        return dataclasses.replace(problem, what=what, instead=instead)
    if other and other != section:
        what = f"{spelling.key(path)} is not an option; {other} has it"
        return dataclasses.replace(problem, what=what, instead=spelling.set(f"{other}.{key}", value))
    return problem


def misspelt_sections(root: DictConfig, spelling: Spelling) -> list[Problem]:
    """Siblings of ours that look like one of our sections but are not, so that their values would be ignored."""
    names = ["strategy", *SECTIONS, "activation_checkpointing", "batch_statistics"]
    problems = []
    for key in map(str, root):
        likely = [] if key in names else nearest(key, names, cutoff=0.8)
        if not likely or likely[0] in _closer(root, key, likely[0]):
            continue
        values = values_below(root, key)
        renamed = {name.replace(key, likely[0], 1): value for name, value in values.items()}
        problems.append(
            Problem(
                what=f"{spelling.key(key)} is not a section of nemo_dist_conf; did you mean {likely[0]}?",
                asked=" ".join(spelling.set(name, value, "+") for name, value in values.items()),
                allowed=", ".join(names),
                instead=" ".join(spelling.set(name, value) for name, value in renamed.items()),
            )
        )
    return problems


def values_below(node: DictConfig, key: str) -> dict[str, Any]:
    """What was written at a key of the node, not resolved: its value, or each value below it, by dotted key."""
    value = node_at(node, key)
    if isinstance(value, DictConfig) and not is_null(value) and len(value):
        below = (values_below(value, str(inner)) for inner in value)
        return {f"{key}.{name}": its for values in below for name, its in values.items()}
    return {key: _raw(node, key)}


def section_of(option: str) -> str | None:
    """The section that has an option of this name, if exactly one has."""
    owners = [name for name, schema in SECTIONS.items() if option in {item.name for item in dataclasses.fields(schema)}]
    return owners[0] if len(owners) == 1 else None


def _closer(root: DictConfig, key: str, likely: str) -> list[str]:
    """An app may own a key that merely resembles ours; ours is meant only where the key holds our options."""
    schema = SECTIONS.get(likely)
    node = node_at(root, key)
    if schema is None or not isinstance(node, DictConfig) or is_null(node):
        return [likely] if likely in SECTIONS else []
    options = {item.name for item in dataclasses.fields(schema)}
    return [] if options & {str(k) for k in node} else [likely]


def leaves(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of a nested mapping by dotted key."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found.update(leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return found
