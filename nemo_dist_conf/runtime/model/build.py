"""The model that a config or a caller names, without values where those can be given to it later."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import re
import textwrap
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable, Mapping

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.nn.parameter import is_lazy

from nemo_dist_conf.errors import ConfigError, DataError, NemoDistConfError, Problem
from nemo_dist_conf.families.config_facts import ModelFacts, facts_from_folder, plain_floats
from nemo_dist_conf.names import nearest
from nemo_dist_conf.runtime.config_targets import build_target
from nemo_dist_conf.runtime.model.adapters import Adapter, adapted, base_name
from nemo_dist_conf.runtime.model.construct import Record, construct, record, record_resets
from nemo_dist_conf.runtime.model.family_code import import_modeling
from nemo_dist_conf.runtime.model.load_weights import check_weights
from nemo_dist_conf.runtime.model.materialise import materialise, tied_names
from nemo_dist_conf.runtime.model.recording.recorder import NotRecorded
from nemo_dist_conf.runtime.model.stored_names import Part
from nemo_dist_conf.wording import assigned, typed_path, unknown_name

__all__ = ["Built", "Fill", "build_model", "build_without_values", "refuse_given_model"]

log = logging.getLogger(__name__)

#: Gives values to a model that was built without.
Fill = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Built:
    """A model before it is parallelised.

    record: how to give it its values when it was built without; None: it has them, the same on every rank unless the
    caller gave them.
    weights: folder to fill it from; parts: what its tensors are, where they are stored otherwise than the model holds
    them; loaded: names that the folder has, which need no other values before.
    blocks: path of its blocks as the config declared it.
    why_whole: why it could not be built without values.
    mark: what has to be the same on every rank; sums: what has to be nearly the same where the marks differ.
    """

    model: nn.Module
    record: Record | None = None
    weights: Path | None = None
    parts: Mapping[str, Part] = field(default_factory=dict)
    loaded: frozenset[str] = frozenset()
    ties: list[list[str]] = field(default_factory=list)
    blocks: Any = None
    why_whole: str = ""
    mark: str = ""
    sums: Callable[[], Any] | None = None


def build_model(
    node: Any,
    given: nn.Module | Callable[[], nn.Module] | None,
    seed: int,
    device: torch.device,
    whole: float = 0,
    adapter: Adapter | None = None,
) -> Built:
    """From a module or a factory the caller gave, else from the config node ``model``.

    node: ``_target_`` with arguments (the user's own class), or ``config`` (fields of a transformers config, with
    model_type) and ``name_or_path`` (a local checkpoint folder whose config and weights are taken).
    What makes the model, whichever of these it is, is recorded without values (runtime/model/recording), so that no
    rank ever holds all of them; where it does what cannot be recorded, it is built with values on every rank, alike.
    whole: elements of parameters up to which a model gets its values here, on ``device``, before it is parallelised:
    all of them where every rank will hold the whole model anyway.
    adapter: put into its layers; the rest is frozen, in the dtype of the folder that it comes from.
    Raises ConfigError or DataError for what cannot be built.
    """
    built = _built(node, given, seed, device, adapter)
    if dist.is_initialized() and dist.get_world_size() > 1:
        built = _marked(built)
    is_main = not dist.is_initialized() or dist.get_rank() == 0
    elements = sum(parameter.numel() for parameter in built.model.parameters())
    if is_main and built.why_whole:
        mib = sum(tensor.nbytes for tensor in (*built.model.parameters(), *built.model.buffers())) / 2**20
        level = logging.WARNING if elements > whole else logging.INFO
        what = "%s was built with its values, %.0f MiB on every rank before it is wrapped: %s"
        log.log(level, what, type(built.model).__name__, mib, built.why_whole)
    if is_main and built.record is not None and built.record.unset:
        names = ", ".join(built.record.unset[:3]) + (", ..." if len(built.record.unset) > 3 else "")
        log.warning("%s: nothing gives %s a value, so it starts at 0", type(built.model).__name__, names)
    if elements > whole:
        return built
    if built.record is not None:
        materialise(built.model, built.record, loaded=built.loaded)
    return dataclasses.replace(built, record=None)


def build_without_values(node: Any) -> Built:
    """The model of a config's node as ``build_model`` has it before it gives values, on the meta device for good.

    Nothing is read of a checkpoint folder but its config, and nothing is built with values: that would take the memory
    of the whole model. Raises ConfigError or DataError, with the reason, for what cannot be built so.
    """
    blocks = None
    if "_target_" in node:
        asked = assigned("model._target_", node["_target_"])
        build = functools.partial(build_target, node, "model", instead="model=llama_tiny")
        factory: Callable[[], Any] = build() if node.get("_partial_") else build
    elif node.get("name_or_path") or node.get("config"):
        config, folder, factory = _of_transformers(node)
        blocks = OmegaConf.to_container(node.blocks) if OmegaConf.is_config(node.get("blocks")) else node.get("blocks")
        kind = str(config.model_type)
        asked = assigned("model.name_or_path", folder) if folder else assigned("model.config.model_type", kind)
    else:
        raise _not_a_model(node)
    try:
        model, made = record(factory, 0, torch.device("cpu"))
    except (ConfigError, DataError):
        raise
    except Exception as error:  # of many types, by what a constructor does
        if "_target_" not in node and not isinstance(error, NotRecorded):
            raise _not_built(config, folder, error) from error
        what = f"the model cannot be built on the meta device: {_first(error)}"
        allowed = "a model whose constructor asks no tensor for its values"
        raise ConfigError(Problem(what=what, asked=asked, allowed=allowed, instead="model=llama3_8b")) from error
    if made is None:
        raise _no_module(model)
    return Built(model, blocks=blocks)


def _marked(built: Built) -> Built:
    """With marks of its parameters and of how they start; of what they are where they have values, which may differ."""
    named = dict(built.model.named_parameters())
    if built.record is not None:
        return dataclasses.replace(
            built, mark=built.record.mark(named), sums=functools.partial(built.record.sums, list(named))
        )
    shapes = [(name, tuple(parameter.shape), parameter.dtype) for name, parameter in named.items()]
    return dataclasses.replace(built, mark=repr(shapes), sums=lambda: (repr(shapes), []))


def _built(
    node: Any,
    given: nn.Module | Callable[[], nn.Module] | None,
    seed: int,
    device: torch.device,
    adapter: Adapter | None,
) -> Built:
    blocks = node.get("blocks") if isinstance(node, (Mapping, DictConfig)) else None
    blocks = OmegaConf.to_container(blocks) if OmegaConf.is_config(blocks) else blocks
    if isinstance(given, nn.Module):
        return _from_module(given, seed, device, blocks, adapter)
    if given is not None:
        return _from_factory(given, seed, device, blocks, adapter)
    if not isinstance(node, (Mapping, DictConfig)):
        raise _not_a_model(node)
    if "_target_" in node:
        build = functools.partial(build_target, node, "model", instead="model=llama_tiny")
        return _from_factory(build() if node.get("_partial_") else build, seed, device, None, adapter)
    if node.get("name_or_path") or node.get("config"):
        return _from_transformers(node, seed, device, blocks, adapter)
    raise _not_a_model(node)


def refuse_given_model(model: Any) -> None:
    """Raise ConfigError for a model that a caller gave and that is neither a module nor makes one."""
    if isinstance(model, nn.Module) or callable(model):
        return
    kind = type(model).__name__
    instead = "instantiate(cfg), with the node model in cfg"
    if hasattr(model, "to_json_string"):
        instead = "instantiate(cfg, model=lambda: AutoModelForCausalLM.from_config(config))"
    what, allowed = f"model: {kind} is neither a module nor a function that builds one", "a torch.nn.Module, its class"
    raise ConfigError(
        Problem(
            what=what,
            asked=f"instantiate(cfg, model={kind}(...))",
            allowed=f"{allowed}, a function; None",
            instead=instead,
        )
    )


def _not_a_model(node: Any) -> ConfigError:
    return ConfigError(
        Problem(
            what="the config does not say which model to build",
            asked=assigned("model", OmegaConf.to_container(node) if OmegaConf.is_config(node) else node),
            allowed="model._target_ (your class), model.config.model_type (transformers), "
            "or model.name_or_path (a folder)",
            instead="model=llama_tiny, or nemo_dist_conf.instantiate(cfg, model=my_module)",
        )
    )


def _from_module(
    model: nn.Module, seed: int, device: torch.device, blocks: Any, adapter: Adapter | None = None
) -> Built:
    tensors = [*model.parameters(), *model.buffers()]
    named = (*model.named_parameters(), *model.named_buffers())
    lazy = [name for name, tensor in named if is_lazy(tensor)]
    if lazy:
        what = f"{lazy[0]} of {type(model).__name__} has no shape yet: its layer takes it from the first input"
        allowed = "a factory that runs the model once, model(torch.zeros(...)), before it returns it"
        raise ConfigError(
            Problem(
                what=what, asked=f"a model with {lazy[0]}", allowed=allowed, instead="instantiate(cfg, model=run_once)"
            )
        )
    if not any(tensor.is_meta for tensor in tensors):
        model = model.to(device) if adapter is None else adapted(model.to(device), adapter, seed)
        return Built(model, ties=tied_names(model), blocks=blocks)
    if adapter is not None:
        raise _adapter_on_meta(model)
    if not all(tensor.is_meta for tensor in tensors):
        why = "other tensors of it have values"
    else:
        try:
            made = record_resets(model, seed, device)
            return Built(model, made, ties=tied_names(model), blocks=blocks)
        except Exception as error:  # its own functions run
            why = _first(error)
    raise ConfigError(
        Problem(
            what=f"the given {type(model).__name__} is on the meta device and cannot be filled: {why}",
            asked="instantiate(cfg, model=module_on_meta)",
            allowed="a module with values, its class or a function that builds it, or reset_parameters in each module",
            instead=f"instantiate(cfg, model={type(model).__name__})",
        )
    )


def _adapter_on_meta(model: nn.Module) -> ConfigError:
    kind = type(model).__name__
    what = f"the given {kind} is on the meta device, and an adapter begins from the values of its layers"
    return ConfigError(
        Problem(
            what=what,
            asked="instantiate(cfg, model=module_on_meta), with adapter in cfg",
            allowed="a module with values, its class or a function that builds it",
            instead=f"instantiate(cfg, model={kind})",
        )
    )


def _from_factory(
    factory: Callable[[], Any], seed: int, device: torch.device, blocks: Any, adapter: Adapter | None = None
) -> Built:
    def with_adapter() -> Any:
        made = factory()
        return adapted(made, adapter) if adapter is not None and isinstance(made, nn.Module) else made

    why = ""
    made: Record | None = None
    try:
        model, made = record(with_adapter, seed, device, lambda name: base_name(name) or name if adapter else name)
    except ConfigError:
        raise
    except Exception as error:  # one of the factory's own comes again where it runs once more
        why = textwrap.shorten(_first(error), 200, placeholder=" ...")
        if isinstance(error, NotRecorded):  # said before, because memory may not suffice
            log.info("a model is built with values on every rank: %s", why)
        model = construct(factory, seed)
    if not isinstance(model, nn.Module):
        raise _no_module(model)
    if made is not None:
        return Built(model, made, ties=tied_names(model), blocks=blocks)
    built = _from_module(model, seed, device, blocks, adapter)
    return built if built.record is not None else dataclasses.replace(built, why_whole=why)


def _no_module(made: Any) -> ConfigError:
    what = f"the model's factory returned {type(made).__name__}, not a torch.nn.Module"
    allowed = "a class or function that returns a module"
    return ConfigError(Problem(what=what, asked="model", allowed=allowed, instead="model._target_=..."))


def _of_transformers(node: Any, keeps_dtype: bool = False) -> tuple[Any, Path | None, Callable[[], nn.Module]]:
    """(the config that a node describes, the checkpoint folder that it names, what builds the model).

    keeps_dtype: the model has the dtype that the folder says it is in, not float32.
    """
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            Problem(
                what="a transformers model was asked for, and transformers is not installed",
                asked="model.config.model_type" if not node.get("name_or_path") else "model.name_or_path",
                allowed="the extra hf",
                instead="pip install 'nemo_dist_conf[hf]'",
            )
        ) from None
    folder = typed_path(str(node.get("name_or_path"))) if node.get("name_or_path") else None
    config = _transformers_config(transformers, node, folder)

    def factory() -> nn.Module:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)

    dtype = (config.dtype if keeps_dtype and folder is not None else None) or torch.float32

    if getattr(config, "use_cache", False):
        config.use_cache = False  # for generation only: in training it would keep keys and values of every layer
    return config, folder, factory


def _not_built(config: Any, folder: Path | None, error: Exception) -> NemoDistConfError:
    kind = config.model_type
    asked = assigned("model.name_or_path", folder) if folder else assigned("model.config.model_type", kind)
    what = f"transformers cannot build {kind} from this config: {_first(error)}"
    if "Unrecognized configuration class" in str(error):
        what = f"{kind} is no causal language model of transformers"
    allowed = "a causal language model of transformers (llama, qwen3, mistral, ...), and fields that fit each other"
    return (DataError if folder else ConfigError)(
        Problem(what=what, asked=asked, allowed=allowed, instead="model=llama_tiny")
    )


def _from_transformers(
    node: Any, seed: int, device: torch.device, blocks: Any, adapter: Adapter | None = None
) -> Built:
    config, folder, factory = _of_transformers(node, keeps_dtype=adapter is not None)
    try:
        built = _from_factory(factory, seed, device, blocks, adapter)
    except ConfigError:
        raise
    except Exception as error:  # of many types, by what a model's constructor does with the fields
        raise _not_built(config, folder, error) from error
    if folder is None:
        return built
    parts = check_weights(built.model, folder, built.ties)
    state = built.model.state_dict()
    loaded = frozenset(name for name in state if adapter is None or base_name(name) is not None)
    return dataclasses.replace(built, weights=folder, parts=parts, loaded=loaded)


def _transformers_config(transformers: Any, node: Any, folder: Path | None) -> Any:
    raw = node.get("config")
    fields: Any = OmegaConf.to_container(raw, resolve=True) if OmegaConf.is_config(raw) else raw or {}
    if not isinstance(fields, Mapping):
        what = f"model.config is {type(fields).__name__}, not a group of fields"
        allowed = "fields of a transformers config, with model_type"
        raise ConfigError(
            Problem(
                what=what,
                asked=assigned("model.config", fields),
                allowed=allowed,
                instead="model.config.model_type=llama",
            )
        )
    fields = plain_floats(dict(fields))
    try:
        if folder is not None:
            if not (folder / "config.json").is_file():
                what = f"{node.get('name_or_path')} is not a checkpoint folder: it has no config.json"
                typed = node.get("name_or_path")
                asked, allowed = assigned("model.name_or_path", typed), "a local folder of save_pretrained"
                raise DataError(Problem(what=what, asked=asked, allowed=allowed, instead="model=llama_tiny"))
            import_modeling((facts_from_folder(folder) or ModelFacts()).model_type)
            return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, **fields)
        model_type = fields.pop("model_type", None)
        if model_type is None:
            asked, known = "model.config without model_type", "llama, qwen3, mistral, ..."
            raise ConfigError(
                Problem(what="no model_type", asked=asked, allowed=known, instead="model.config.model_type=llama")
            )
        import_modeling(model_type)
        if model_type not in transformers.CONFIG_MAPPING:
            families = list(transformers.CONFIG_MAPPING.keys())
            shown = ", ".join(dict.fromkeys([*nearest(str(model_type), families), "llama", "qwen3", "mistral"]))
            raise ConfigError(
                unknown_name(
                    model_type,
                    families,
                    what=f"transformers has no model family {model_type}",
                    asked=assigned("model.config.model_type", model_type),
                    allowed=f"{shown}, ...: {len(families)} families",
                    offer=lambda known: assigned("model.config.model_type", known),
                    otherwise="model=llama_tiny",
                )
            )
        config = transformers.AutoConfig.for_model(model_type, **fields)
        _tell_unread(config, fields)
        return config
    except ConfigError:
        raise
    except Exception as error:  # transformers raises many types for a bad field; the text is the user's
        asked = assigned("model.name_or_path", node.get("name_or_path")) if folder else "model.config"
        what = f"transformers does not accept this config: {_first(error)}"
        raise (DataError if folder else ConfigError)(
            Problem(
                what=what,
                asked=asked,
                allowed="fields and values of that model's config class",
                instead="model=llama_tiny",
            )
        ) from None


def _tell_unread(config: Any, fields: Mapping[str, Any]) -> None:
    """transformers keeps any field that it is given, also one that no model reads."""
    # Older names (rope_theta) are turned into newer ones.
    unread = [key for key in fields if not hasattr(type(config), key) and key in vars(config)]
    if unread:  # some fields are given their defaults by the constructor only
        known = type(config)()
        unread = [key for key in unread if not hasattr(known, key)]
    if unread:  # and some are asked for by the model only
        home = Path(inspect.getfile(type(config)))
        model = home.with_name(home.name.replace("configuration_", "modeling_"))
        text = model.read_text(encoding="utf-8") if model.is_file() else ""
        unread = [key for key in unread if not re.search(rf"\b{re.escape(key)}\b", text)]
    if unread and (not dist.is_initialized() or dist.get_rank() == 0):
        names = ", ".join(f"model.config.{key}" for key in unread)
        log.warning("%s: no field of %s, so probably read by nothing", names, type(config).__name__)


def _first(error: Exception) -> str:
    """The first sentence of an error, with what stands below it where that only announces it."""
    lines = [line.strip() for line in (str(error).strip() or type(error).__name__).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
