"""The optimizer over wrapped parameters, from a plain config node."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Mapping

import torch
from torch.distributed.tensor import DTensor

from nemo_dist_conf.composition.text_values import told_as_texts
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.config_targets import build_target
from nemo_dist_conf.runtime.parameter_groups import group_by_name, parameter_groups
from nemo_dist_conf.schema.optimizer_groups import group_of_each
from nemo_dist_conf.schema.optimizers import optimizer_problems
from nemo_dist_conf.wording import Spelling

__all__ = ["build_optimizer", "named_groups", "refuse_given"]

_NamedParameters = Iterable[tuple[str, torch.nn.Parameter]]


@dataclass(frozen=True)
class _Kind:
    """An optimizer of torch, and whether torch can fuse its update, also of DTensors."""

    build: Callable[..., torch.optim.Optimizer]
    fuses: bool = True


#: What ``optimizer.name`` accepts; nemo_dist_conf/schema/optimizers.py has their settings.
_OPTIMIZERS: Mapping[str, _Kind] = {
    "adamw": _Kind(torch.optim.AdamW),
    "adam": _Kind(torch.optim.Adam),
    "sgd": _Kind(torch.optim.SGD, fuses=False),
}


def build_optimizer(
    node: Any,
    named_parameters: _NamedParameters,
    *,
    spelling: Spelling = Spelling(),
    group_of: Mapping[str, int] | None = None,
    is_part: bool = False,
) -> torch.optim.Optimizer | None:
    """The optimizer that a config node describes, over the trainable parameters of a wrapped model.

    node: ``{name: adamw|adam|sgd, lr, ...}`` with torch's argument names, and ``decay_1d``: whether parameters of
    one dimension (norms, biases) take part in weight decay; default false; ``groups``: schema/optimizer_groups.py.
    Or a node with ``_target_``, which gets the list of parameters as its first argument, or pairs of their names and
    them where it has an argument ``named_parameters``. Or a callable, which gets the same. None: no optimizer.
    named_parameters: pairs of the model after wrapping, by their names before; DTensors and plain tensors may be mixed.
    group_of: number of the group of ``groups`` that a parameter is in, by name; as ``named_groups`` gives it for a
    model of which this is a part; None: told from these parameters.
    is_part: the rank has a part of the model, of which nothing may be trained.
    Raises ConfigError with every wrong setting at once.
    """
    if node is None:
        return None
    trainable = [(name, parameter) for name, parameter in named_parameters if parameter.requires_grad]
    if not trainable and not is_part:
        raise _nothing_to_train(spelling)
    if callable(node) or isinstance(node, torch.optim.Optimizer):
        return _from_factory(node, trainable)
    values = _plain(node, spelling)
    if "_target_" in values:
        values, instead = {**values, "_convert_": "all"}, spelling.choose("optimizer", "adamw")
        if values.get("_partial_"):
            return _from_factory(build_target(values, "optimizer", instead=instead), trainable)
        if _takes_names(_found(values["_target_"])):
            return _an_optimizer(build_target(values, "optimizer", instead=instead, named_parameters=trainable))
        return _over(lambda parameters: build_target(values, "optimizer", parameters, instead=instead), trainable)
    _check(node, spelling)
    kind = _OPTIMIZERS[values["name"]]
    options = {key: value for key, value in values.items() if key not in ("name", "decay_1d", "groups")}
    if "betas" in options:
        options["betas"] = tuple(options["betas"])
    _refuse_impossible(kind, options, trainable, spelling)
    if kind.fuses and options.get("foreach") is None and options.get("fused") is None and _can_fuse(trainable):
        options["fused"] = True
    if group_of is None:
        group_of = group_of_each(values.get("groups") or (), {name: name for name, _ in trainable})
    return kind.build(parameter_groups(values, trainable, group_of), **options)


def named_groups(node: Any, model: torch.nn.Module, spelling: Spelling = Spelling()) -> Mapping[str, int]:
    """Number of the group of a node's ``groups`` that each parameter of a plain model is in, by name.

    Raises ConfigError, before the model is wrapped, for settings that do not fit and groups without parameters.
    """
    if node is None or callable(node) or isinstance(node, torch.optim.Optimizer):
        return {}
    values = _plain(node, spelling)
    if "_target_" in values:
        return {}
    _check(node, spelling)
    return group_by_name(values.get("groups") or (), model, values.get("decay_1d", False), spelling)


def _check(node: Any, spelling: Spelling) -> None:
    def once(read: Any) -> None:
        ConfigError.raise_if(optimizer_problems(_plain(read, spelling), spelling))

    try:
        once(node)
    except ConfigError as error:
        raise told_as_texts(error, node, once) from None


def _plain(node: Any, spelling: Spelling) -> dict[str, Any]:
    from omegaconf import OmegaConf

    values = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    if isinstance(values, Mapping):
        return dict(values)
    raise ConfigError(
        Problem(
            what=f"optimizer: expected a group of settings, got {values!r}",
            asked=spelling.set("optimizer", values),
            allowed="optimizer=adamw, optimizer=sgd, or a node with name or _target_",
            instead="optimizer=adamw",
        )
    )


def _from_factory(factory: Any, trainable: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
    """What a function makes of the parameters. Raises ConfigError for what is none, or makes no optimizer."""
    refuse_given(factory)
    if _takes_names(factory):
        return _an_optimizer(factory(named_parameters=trainable))
    return _over(factory, trainable)


def _found(target: str) -> Any:
    from hydra.utils import get_object

    try:
        return get_object(target)
    except Exception:  # told when it is called
        return None


def _takes_names(factory: Any) -> bool:
    """Whether a function has an argument ``named_parameters``, for pairs in place of parameters."""
    try:
        return "named_parameters" in inspect.signature(factory).parameters
    except (TypeError, ValueError):  # nothing that can be called, or in C
        return False


def _over(make: Callable[[Any], Any], trainable: list[tuple[str, torch.nn.Parameter]]) -> torch.optim.Optimizer:
    """What a function makes of the parameters; of none one that has nothing to do, which torch's refuse to be."""
    parameters = [parameter for _, parameter in trainable]
    if parameters:
        return _an_optimizer(make(parameters))
    stand_in = torch.nn.Parameter(torch.empty(0))
    optimizer = _an_optimizer(make([stand_in]))
    for group in optimizer.param_groups:
        group["params"] = []
    optimizer.state.pop(stand_in, None)
    return optimizer


def refuse_given(optimizer: Any) -> None:
    """Raise ConfigError for an optimizer that a caller gave and that is no function of the wrapped parameters."""
    if callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer):
        return
    kind = type(optimizer).__name__
    what = f"optimizer: {kind} is not a function of the parameters"
    if isinstance(optimizer, torch.optim.Optimizer):
        what = f"optimizer: {kind} was made before the model was wrapped, over parameters that are others then"
    example = kind if isinstance(optimizer, torch.optim.Optimizer) else "AdamW"
    raise ConfigError(
        Problem(
            what=what,
            asked=f"instantiate(cfg, optimizer={kind}(...))",
            allowed="a class or function that takes the parameters; settings belong to cfg.optimizer",
            instead=f"instantiate(cfg, optimizer=lambda parameters: torch.optim.{example}(parameters, lr=0.001))",
        )
    )


def _an_optimizer(built: Any) -> torch.optim.Optimizer:
    """What a factory returned. Raises ConfigError where it is no optimizer."""
    if isinstance(built, torch.optim.Optimizer):
        return built
    raise ConfigError(
        Problem(
            what=f"optimizer: {type(built).__name__} is not a torch.optim.Optimizer",
            asked=f"a factory or _target_ that returns {type(built).__name__}",
            allowed="a callable that takes the list of parameters and returns a torch.optim.Optimizer",
            instead="optimizer=adamw",
        )
    )


def _nothing_to_train(spelling: Spelling) -> ConfigError:
    return ConfigError(
        Problem(
            what="optimizer: the model has no parameter that requires a gradient",
            asked="an optimizer over 0 parameters",
            allowed="a model with at least one trainable parameter, or no optimizer",
            instead=spelling.set("optimizer", None),
        )
    )


def _can_fuse(trainable: list[tuple[str, torch.nn.Parameter]]) -> bool:
    """Whether torch updates all of these in one kernel: fewer passes over memory, and no dispatch for each DTensor.

    Left to itself torch loops over parameters on the CPU and groups their operations on a GPU. Parameters that rest
    elsewhere than their mesh (CPU offload) are left to it.
    """
    return all(
        parameter.is_floating_point()
        and parameter.device.type in ("cpu", "cuda")
        and _on_mesh(parameter) in (None, parameter.device.type)
        for _, parameter in trainable
    )


def _on_mesh(parameter: torch.nn.Parameter) -> str | None:
    return parameter.device_mesh.device_type if isinstance(parameter, DTensor) else None


def _refuse_impossible(
    kind: _Kind, options: dict[str, Any], trainable: list[tuple[str, torch.nn.Parameter]], spelling: Spelling
) -> None:
    """Refuse a fused update that was asked for where torch has none: fused SGD has no sharding strategy (2.13)."""
    if options.get("fused") and not kind.fuses and any(isinstance(parameter, DTensor) for _, parameter in trainable):
        what, key = "optimizer.fused=true cannot update distributed parameters with this optimizer", "optimizer.fused"
        raise ConfigError(
            Problem(what=what, asked=spelling.set(key, True), allowed="null, false", instead=spelling.set(key, None))
        )
