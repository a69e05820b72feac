"""A composed recipe config -> the job to plan.

The shape of a family with a row of shapes is read from its config. Any other model, a module of one's own too, is built
on the meta device, which imports torch and transformers: what does it is imported when such a model is planned.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Iterator, Mapping

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_dist_conf.composition.check import Checked
from nemo_dist_conf.composition.command_line import WITHOUT, raw_words
from nemo_dist_conf.composition.resolvers import autocast_dtype
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.families.built_shape import BuiltShape
from nemo_dist_conf.families.config_facts import plain_floats
from nemo_dist_conf.families.model_rules import model_problems as size_problems
from nemo_dist_conf.families.parameter_names import names_of
from nemo_dist_conf.families.registry import find_family
from nemo_dist_conf.families.shapes import ModelShape, shape_of
from nemo_dist_conf.names import HARDWARE
from nemo_dist_conf.plan.job import Job, Update
from nemo_dist_conf.recipe.checks import check_recipe, typed_model_config
from nemo_dist_conf.recipe.node_checks import model_problems
from nemo_dist_conf.schema.context import head_problems
from nemo_dist_conf.schema.hardware import PROFILES, HardwareConf
from nemo_dist_conf.schema.trainable import choice_of, choice_problems, trained
from nemo_dist_conf.strategies import Strategy
from nemo_dist_conf.topology.launched_ranks import Start, about_to_start, launch_command
from nemo_dist_conf.wording import Spelling, assigned, typed_path, unknown_name

__all__ = [
    "autocast_of",
    "hardware_of",
    "job_of",
    "model_config",
    "model_shape",
    "planned_start",
    "refuse_adapter",
    "untrained_of",
    "update_of",
]


def planned_start(world_size: int, machine: HardwareConf | None = None) -> Start:
    """So many ranks, which need not exist here; what CPUs cannot run is refused for them anywhere."""
    return Start(world_size, launch_command(), elsewhere=machine is None or machine.device != "cpu")


def job_of(cfg: DictConfig, world_size: int, hardware: HardwareConf | str | None = None, builds: bool = True) -> Job:
    """What a recipe config asks for on ``world_size`` ranks. hardware None: of the config's node.

    builds: a model without a row of shapes is built on the meta device; False: it is refused.
    Raises ConfigError for everything that the recipe refuses, and for a model or hardware that is not known.
    """
    machine = hardware_of(cfg.get("hardware") if hardware is None else hardware)
    has_to_be_built = builds and _is_built(cfg)
    model = None if has_to_be_built else model_shape(cfg, builds=False)
    with about_to_start(planned_start(world_size, machine)):
        checked = check_recipe(cfg, world_size)
        refuse_adapter(checked.groups["adapter"]["kind"], checked.spelling)
        if model is None:  # after the rules, because it takes seconds
            model = model_shape(cfg)
        return _job(cfg, checked, machine, model)


def refuse_adapter(kind: str, spelling: Spelling = Spelling()) -> None:
    """Raise ConfigError for an adapter, which no plan counts. kind: of the group ``adapter``."""
    if kind != "none":
        what = f"a plan does not count adapters, nor what a frozen base saves (adapter={kind})"
        allowed = "adapter=none, with gradients and states of all parameters, for a bound from above of their memory"
        raise ConfigError(
            Problem(
                what=what,
                asked=spelling.choose("adapter", kind),
                allowed=allowed,
                instead=spelling.choose("adapter", "none"),
            )
        )


def _is_built(cfg: DictConfig) -> bool:
    """Whether ``cfg.model`` has to be built to know its shape. Raises ConfigError for a model that says too little."""
    if isinstance(cfg.get("model"), DictConfig) and "_target_" in cfg.model:
        return True
    if OmegaConf.select(cfg, "recompute.modules"):
        return True  # rows of shapes know blocks, not what is in them
    kind = model_config(cfg).get("model_type")
    family = find_family(kind)
    return isinstance(kind, str) and bool(kind) and (family is None or family.shapes is None)


def model_shape(cfg: DictConfig, builds: bool = True) -> ModelShape | BuiltShape:
    """The shape of ``cfg.model``. builds: as in ``job_of``.

    Raises ConfigError for a family or a size that cannot be planned.
    """
    if builds and _is_built(cfg):
        return _built_shape(cfg)
    config = model_config(cfg)
    try:
        return shape_of(config)
    except ConfigError as error:
        folder = OmegaConf.select(cfg, "model.name_or_path")
        if not folder:
            raise
        # What the folder's config says cannot be typed.
        asked, best = assigned("model.name_or_path", folder), "model=llama3_8b"
        raise ConfigError(*(dataclasses.replace(each, asked=asked, instead=best) for each in error.problems)) from None


def _built_shape(cfg: DictConfig) -> BuiltShape:
    """As the runtime builds it; beside a checkpoint folder only typed fields hold."""
    from nemo_dist_conf.runtime.on_paper import read_model

    node: Any = OmegaConf.create(OmegaConf.to_container(cfg.model, resolve=True))
    if node.get("name_or_path"):
        overrides = raw_words(OmegaConf.select(cfg, "hydra.overrides.task"))
        node.config = typed_model_config(node.get("config"), overrides)
    return read_model(node)


def _job(cfg: DictConfig, checked: Checked, machine: HardwareConf, model: ModelShape | BuiltShape) -> Job:
    if isinstance(model, BuiltShape):  # whose config may say more than what was typed
        size = checked.mesh.world_size
        ConfigError.raise_if(size_problems(model.facts, checked.sizes, size, int(cfg.data.seq_len), moe=checked.moe))
        ConfigError.raise_if(_expert_problems(model, checked.mesh.size("ep")))
        ConfigError.raise_if(head_problems(checked.groups["context"]["method"], model.facts, checked.sizes))
    rows, micro, seq_len = _batch_of(cfg, checked.mesh.size("dp"))
    microbatches, calls = rows // micro, 1
    if checked.mesh.size("pp") > 1:
        batch, micro = checked.pipeline["pp_batch_size"], checked.pipeline["pp_microbatch_size"]
        microbatches, calls = batch // micro, rows // batch
    dtype = OmegaConf.select(cfg, "train.dtype") or "auto"
    return Job(
        strategy=checked.strategy,
        options=checked.strategy_values,
        mesh=checked.mesh,
        model=model,
        hardware=machine,
        rows=micro,
        seq_len=seq_len,
        microbatches=microbatches,
        calls=calls,
        pipeline=checked.pipeline,
        moe=checked.moe,
        groups=checked.groups,
        checkpointing=checked.activation_checkpointing,
        autocast=autocast_of(checked.strategy, checked.strategy_values, dtype, machine.device),
        update=update_of(cfg.get("optimizer")),
        untrained=untrained_of(checked.groups["trainable"], model, checked.spelling),
    )


def untrained_of(
    values: Mapping[str, Any], model: ModelShape | BuiltShape, spelling: Spelling = Spelling()
) -> frozenset[str]:
    """Names of the parameters that the group ``trainable`` freezes. Raises ConfigError for what the hook refuses."""
    choice = choice_of(values)
    if choice is None:
        return frozenset()
    keys = names_of(model)
    every = set(keys.values())
    ConfigError.raise_if(choice_problems(values, keys, every, spelling))
    return frozenset(every - trained(*choice, keys, every))


def _expert_problems(model: BuiltShape, ep: int) -> Iterator[Problem]:
    """That experts are split which a model has not, or has no plan for."""
    if ep > 1 and not any(model.sparse):
        what = f"ep_size={ep}: {model.model_type} has no experts that can be split"
        asked, allowed = f"parallelism.ep_size={ep}", "a mixture-of-experts model of transformers with a plan for it"
        yield Problem(what=what, asked=asked, allowed=allowed, instead="parallelism.ep_size=1")


def autocast_of(strategy: Strategy, options: Mapping[str, Any], dtype: str, device: str) -> str | None:
    """The dtype under which the recipe runs forward; None without autocast. dtype: ``train.dtype``."""
    if strategy.compute_dtype is None:
        return autocast_dtype(dtype, device)
    value = options.get("autocast_dtype")
    return getattr(value, "name", value)


def _batch_of(cfg: Any, data_size: int) -> tuple[int, int, int]:
    """(rows of a data rank in a step, rows of a microbatch, tokens of a row)."""
    rows = cfg.train.global_batch_size // data_size
    return rows, cfg.train.micro_batch_size or rows, int(cfg.data.seq_len)


def hardware_of(node: Any) -> HardwareConf:
    """A profile by name, or the values of a node. Raises ConfigError for an unknown one and for missing figures."""
    if isinstance(node, HardwareConf):
        return node
    if isinstance(node, str) or node is None:
        if node not in PROFILES:
            problem = unknown_name(
                node,
                HARDWARE,
                what=f"there is no hardware profile {node!r}",
                asked=assigned("hardware", node),
                offer=lambda known: assigned("hardware", known),
            )
            raise ConfigError(dataclasses.replace(problem, allowed=f"{problem.allowed}, or a file of your own"))
        return HardwareConf(**PROFILES[node])
    known = [item.name for item in dataclasses.fields(HardwareConf)]
    for key in (str(key) for key in node if key not in known):
        asked, value = assigned(f"+hardware.{key}", node[key]), node[key]
        raise ConfigError(
            unknown_name(
                key,
                known,
                what=f"hardware.{key} is no figure of a machine",
                asked=asked,
                allowed=", ".join(known),
                offer=lambda name: assigned(f"hardware.{name}", value),
                otherwise=f"{WITHOUT}{asked}",
            )
        )
    try:
        typed = OmegaConf.merge(OmegaConf.structured(HardwareConf), node)
        missing = sorted(str(key) for key in OmegaConf.missing_keys(typed))
        values: Any = None if missing else OmegaConf.to_object(typed)
    except OmegaConfBaseException as error:
        what = f"hardware: {str(error).splitlines()[0]}"
        raise ConfigError(
            Problem(what=what, asked="hardware", allowed="numbers as in hardware=h100", instead="hardware=h100")
        ) from None
    if missing:
        what = f"the hardware profile lacks {', '.join(missing)}"
        raise ConfigError(
            Problem(
                what=what,
                asked="hardware",
                allowed="every figure, or defaults: [h100] above them",
                instead="hardware=h100",
            )
        )
    numbers = {key: value for key, value in vars(values).items() if isinstance(value, (int, float))}
    may_be_0 = ("reserved_gib", "kernel_launch_us", "intra_node_latency_us", "inter_node_latency_us")
    wrong = [key for key, value in numbers.items() if not value >= 0 or (value == 0 and key not in may_be_0)]
    if wrong:
        what = "a figure of the hardware is not above 0"
        asked = " ".join(f"hardware.{key}={numbers[key]:g}" for key in wrong)
        raise ConfigError(Problem(what=what, asked=asked, allowed="numbers above 0", instead="hardware=h100"))
    return values


def model_config(cfg: Any) -> dict[str, Any]:
    """The fields of ``cfg.model``: its config, or that of its folder with the fields that were typed."""
    model = cfg.get("model")
    if not isinstance(model, Mapping) and not isinstance(model, DictConfig):
        raise ConfigError(
            Problem(
                what="there is no model to plan",
                asked="model=null",
                allowed="model=llama3_8b, ...",
                instead="model=llama3_8b",
            )
        )
    if "_target_" in model:
        what = "a plan needs a model's config, and a module of your own has none"
        asked = assigned("model._target_", model["_target_"])
        raise ConfigError(Problem(what=what, asked=asked, allowed="a model of transformers", instead="model=llama3_8b"))
    ConfigError.raise_if(model_problems(model if isinstance(model, DictConfig) else OmegaConf.create(dict(model))))
    if not model.get("name_or_path"):
        return dict(OmegaConf.to_container(model["config"], resolve=True))  # type: ignore[arg-type]
    file = typed_path(str(model["name_or_path"])) / "config.json"
    try:
        config = plain_floats(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        what = f"{file} cannot be read ({getattr(error, 'strerror', None) or 'not JSON'})"
        asked = assigned("model.name_or_path", model["name_or_path"])
        raise ConfigError(
            Problem(what=what, asked=asked, allowed="a folder with a config.json", instead="model.name_or_path=null")
        ) from None
    overrides = raw_words(OmegaConf.select(cfg, "hydra.overrides.task"))
    return {**config, **typed_model_config(model.get("config"), overrides)}


def update_of(node: Any) -> Update:
    """The optimizer of the node ``optimizer``.

    AdamW keeps two states, three with amsgrad, and a step count, SGD one with momentum.
    """
    name = (node or {}).get("name", "adamw")
    fused = bool((node or {}).get("fused"))
    own = tuple(key for group in (node or {}).get("groups") or () for key in ("momentum", "amsgrad") if key in group)
    if name == "sgd":
        return Update("sgd", 1 if (node or {}).get("momentum") else 0, 0, fused, own)
    return Update("adamw", 3 if (node or {}).get("amsgrad") else 2, 1, fused, own)
