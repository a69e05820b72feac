"""What the recipe refuses before it starts: its own keys and sizes, on top of the package's rules. No torch."""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any, Callable, Iterable

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_dist_conf.composition.callback import DistributedCallback
from nemo_dist_conf.composition.check import Checked, check
from nemo_dist_conf.composition.command_line import as_typed_here, raw_words
from nemo_dist_conf.composition.hydra_inside import node_at
from nemo_dist_conf.composition.sections import SECTIONS, section_of, values_below
from nemo_dist_conf.composition.text_values import told_as_texts
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.families.config_facts import facts_from_config, facts_from_folder
from nemo_dist_conf.names import nearest
from nemo_dist_conf.recipe.earlier import keep_snapshot
from nemo_dist_conf.recipe.node_checks import node_problems
from nemo_dist_conf.recipe.saving_checks import saving_problems
from nemo_dist_conf.recipe.value_checks import value_problems
from nemo_dist_conf.recipe.yaml_folder import config_folder
from nemo_dist_conf.strategies import default_strategy
from nemo_dist_conf.topology.launched_ranks import launched, planned_world_size
from nemo_dist_conf.topology.solve import model_ranks
from nemo_dist_conf.wording import assigned, unknown_name

__all__ = [
    "RecipeCallback",
    "batch_problems",
    "check_recipe",
    "typed_model_config",
]


class RecipeCallback(DistributedCallback):
    """The package's callback, with the recipe's rules."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        super().on_run_start(config, **kwargs)
        if launched().rank == 0:
            earlier = keep_snapshot(config)
            if earlier is not None:
                print(f"the config of an earlier run in this folder is now {earlier}", file=sys.stderr, flush=True)

    def check(self, config: DictConfig) -> Checked:
        return check_recipe(config)


def typed_model_config(config: Any, overrides: Iterable[str]) -> dict[str, Any]:
    """``model.config`` as it holds beside a checkpoint folder: only the fields that the user typed.

    The rest of the preset describes another model; the folder's own config stands in its place.
    """
    keys = {word.lstrip("+").partition("=")[0] for word in overrides}
    fields: Any = OmegaConf.to_container(config, resolve=True) if OmegaConf.is_config(config) else dict(config or {})
    return {str(key): value for key, value in fields.items() if f"model.config.{key}" in keys}


def check_recipe(config: DictConfig, world_size: int | None = None) -> Checked:
    """The checked recipe config (with or without its ``hydra`` node), or ConfigError with every problem."""
    try:
        return _check_recipe(config, world_size)
    except ConfigError as error:
        told = told_as_texts(error, config, lambda read: _check_recipe(read, world_size))
        raise as_typed_here(told, config) from None


def _check_recipe(config: DictConfig, world_size: int | None) -> Checked:
    ConfigError.raise_if(node_problems(config))  # the rules below look into these nodes
    checked = None
    problems = list(_stray_keys(config))
    problems += saving_problems(config, OmegaConf.load(config_folder() / "train.yaml").checkpoint)
    problems += value_problems(config)
    facts = None
    model = config.model
    if "_target_" not in model:
        overrides = raw_words(OmegaConf.select(config, "hydra.overrides.task"))
        if model.get("name_or_path"):
            facts = facts_from_folder(model.name_or_path)
            fields = typed_model_config(model.get("config"), overrides)
        else:
            fields = typed_model_config(
                model.get("config"), [f"model.config.{key}=" for key in model.get("config") or {}]
            )
        facts = facts or facts_from_config(fields)
    try:
        seq_len = OmegaConf.select(config, "data.seq_len")
        checked = check(config, world_size, facts=facts, seq_len=seq_len if isinstance(seq_len, int) else None)
        problems += _dtype_problems(config.train.get("dtype"), checked)
        data_size = checked.mesh.size("dp")
        train = config.train
        problems += batch_problems(train.get("global_batch_size"), train.get("micro_batch_size"), data_size)
        if checked.sizes["pp_size"] > 1 and not problems:
            problems += _pipeline_batch_problems(config.train, checked.pipeline["pp_batch_size"], data_size)
    except ConfigError as error:
        problems += filter(None, (_in_recipe_words(problem, config, world_size) for problem in error.problems))
    ConfigError.raise_if(problems)
    if checked is None:
        raise AssertionError("not checked, but no problem either")
    return checked


def _dtype_problems(dtype: Any, checked: Checked) -> list[Problem]:
    """``train.dtype`` and the strategy's own option, where a preset or a typed word answers otherwise."""
    strategy = checked.strategy
    if dtype == "float16" and not strategy.loss_scaling:
        return [_unscaled_problem(checked)]
    if dtype == "auto" or strategy.compute_dtype is None:
        return []
    *holder, option = strategy.compute_dtype.split(".")
    values: Any = checked.strategy_values
    for name in holder:
        values = values.get(name) or {"enabled": False}
    own = values[option] if values.get("enabled", True) else None
    name = getattr(own, "name", own) or "float32"
    if name == dtype:
        return []
    key = f"strategy.{strategy.compute_dtype}"
    return [
        Problem(
            what="what the model computes in has two different answers",
            asked=f"{assigned('train.dtype', dtype)} {assigned(key, None if own is None else name)}",
            allowed="one of them, or both the same",
            instead="train.dtype=auto",
        )
    ]


def _unscaled_problem(checked: Checked) -> Problem:
    """float16 under a strategy in which nothing scales the loss."""
    name = checked.strategy.name
    return Problem(
        what=f"strategy={name} has no loss scaling here, without which gradients in float16 become zero",
        asked=f"{checked.spelling.choose('strategy', name)} train.dtype=float16",
        allowed=f"auto, float32, bfloat16; or strategy={default_strategy()}",
        instead="train.dtype=bfloat16",
    )


def _in_recipe_words(problem: Problem, config: DictConfig, world_size: int | None) -> Problem | None:
    """A way out that sets ``pipeline.pp_batch_size`` said by the keys that it follows from in the recipe.

    None: one of these cannot be read, which is a problem of its own.
    """
    key, _, rows = problem.instead.partition("=")
    if key != "pipeline.pp_batch_size":
        return problem
    sizes = config.parallelism
    try:
        data_ranks = (world_size or planned_world_size()) // model_ranks({name: sizes[name] for name in sizes})
    except OmegaConfBaseException:
        return None
    words = f"train.global_batch_size={int(rows) * max(1, data_ranks)}"
    if config.train.micro_batch_size:
        words = f"train.micro_batch_size={rows} {words}"
    return dataclasses.replace(problem, instead=words)


def _pipeline_batch_problems(train: DictConfig, pp_batch_size: int, data_size: int) -> list[Problem]:
    """The rows that a pipeline is given at a time are told twice; two different numbers cannot both hold."""
    rows = train.micro_batch_size or train.global_batch_size // data_size
    if pp_batch_size == rows:
        return []
    said = "train.micro_batch_size" if train.micro_batch_size else f"train.global_batch_size / {data_size} data ranks"
    return [
        Problem(
            what=f"the pipeline is to take {pp_batch_size} rows at a time, but {said} gives it {rows}",
            asked=f"pipeline.pp_batch_size={pp_batch_size}",
            allowed=f"{rows}, or to leave it alone: the recipe fills it in",
            instead=f"pipeline.pp_batch_size={rows}",
        )
    ]


def _stray_keys(config: DictConfig) -> Iterable[Problem]:
    """Keys that ``+`` added where nothing reads them."""
    own: Any = OmegaConf.load(config_folder() / "train.yaml")
    groups = ["strategy", *SECTIONS, "activation_checkpointing", "batch_statistics"]
    groups += ["model", "data", "optimizer"]
    others = [str(key) for key in own if key not in (*groups, "defaults", "hydra")]
    known: dict[str, list[str]] = {"": [*groups, *others]}
    for section in ("train", "checkpoint"):
        known[section] = [str(key) for key in own[section]]
    if "_target_" not in (config.get("data") or {}):
        known["data"] = [str(key) for key in OmegaConf.load(config_folder() / "data" / "text.yaml")]
    if "_target_" not in (config.get("model") or {}):
        known["model"] = [str(key) for key in OmegaConf.load(config_folder() / "model" / "llama_tiny.yaml")]
    for section, names in known.items():
        node = config if not section else config.get(section)
        if not isinstance(node, DictConfig):
            yield Problem(
                what=f"{section} is {node!r}, not a group of options",
                asked=assigned(section, OmegaConf.to_container(node) if OmegaConf.is_config(node) else node),
                allowed=", ".join(names),
                instead=f"~{section}",
            )
            continue
        for key in map(str, node):
            if key in names or (not section and key == "hydra"):
                continue
            if not section and nearest(key, ("strategy", *SECTIONS), cutoff=0.8):
                continue  # told by the package's own check
            path = f"{section}.{key}" if section else key
            inside, values = f"{section}." if section else "", values_below(node, key)
            owners = [section_of(name.rpartition(".")[2]) for name in values]
            if all(owners):
                options = [f"{owner}.{name.rpartition('.')[2]}" for name, owner in zip(values, owners)]
                yield Problem(
                    what=f"{path} is not an option of the recipe; {owners[0]} has what it holds",
                    asked=" ".join(assigned(f"+{inside}{name}", value) for name, value in values.items()),
                    allowed=", ".join(names),
                    instead=" ".join(map(assigned, options, values.values())),
                )
                continue
            spell = _bare if OmegaConf.is_config(node_at(node, key)) else assigned
            yield unknown_name(
                key,
                names,
                what=f"{path} is not an option of the recipe",
                asked=spell(f"+{path}", values.get(key)),
                offer=functools.partial(_offered, spell, inside, values.get(key)),
                otherwise=f"~{path}",
                hint=True,
            )


def _bare(key: str, value: Any) -> str:
    """A key that holds a whole group, whose values are not typed with it."""
    return key


def _offered(spell: Callable[[str, Any], str], inside: str, value: Any, name: str) -> str:
    return spell(f"{inside}{name}", value)


def _legal_batch_sizes(global_batch_size: int, unit: int) -> list[int]:
    """The multiples of ``unit`` next to the size that was asked for, below and above."""
    below = global_batch_size // unit * unit
    return [size for size in (below, below + unit) if size > 0 and size != global_batch_size]


def batch_problems(global_batch_size: Any, micro_batch_size: Any, data_size: int) -> list[Problem]:
    """What is wrong with the batch sizes [rows] for ``data_size`` data ranks."""
    problems = []
    for name, value in (("global_batch_size", global_batch_size), ("micro_batch_size", micro_batch_size)):
        if value is None and name == "micro_batch_size":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            key = f"train.{name}"
            what = f"{key}={value} is not a number of rows"
            problems.append(
                Problem(
                    what=what,
                    asked=assigned(key, value),
                    allowed="a whole number, 1 or more",
                    instead=assigned(key, data_size),
                )
            )
    if problems:
        return problems
    unit = data_size * (micro_batch_size or 1)
    if global_batch_size % unit == 0:
        return []
    rows = "" if micro_batch_size is None else f" x micro_batch_size={micro_batch_size}"
    legal = _legal_batch_sizes(global_batch_size, unit)
    asked = f"train.global_batch_size={global_batch_size}"
    if micro_batch_size is not None:
        asked += f" train.micro_batch_size={micro_batch_size}"
    return [
        Problem(
            what=f"global_batch_size={global_batch_size} does not divide into {data_size} data ranks{rows}",
            asked=asked,
            allowed=f"multiples of {unit}: {', '.join(map(str, legal))}",
            instead=f"train.global_batch_size={legal[-1]}",
        )
    ]
