"""Nodes of the recipe that are no groups of options, or say nothing: told before anything looks into them. No torch."""

from __future__ import annotations

from typing import Any, Iterable, Mapping

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_dist_conf.composition.text_values import unread_problems
from nemo_dist_conf.errors import Problem
from nemo_dist_conf.wording import assigned

__all__ = ["model_problems", "node_problems"]

#: Node -> (what it can be, the words that choose it).
_GROUPS: Mapping[str, tuple[str, str]] = {
    "model": ("model=llama_tiny, ...; a node with _target_, config.model_type or name_or_path", "model=llama_tiny"),
    "data": ("data=text; a node with _target_", "data=text"),
    "optimizer": ("optimizer=adamw, optimizer=sgd; a node with name or _target_", "optimizer=adamw"),
    "train": ("the recipe's own group, value by value", "train.steps=200"),
    "checkpoint": ("the recipe's own group, value by value", "checkpoint.resume=auto"),
}


#: Keys of ``train`` that other nodes refer to.
_SIZES = {"global_batch_size": 16, "micro_batch_size": None}


def node_problems(config: DictConfig) -> Iterable[Problem]:
    """Every node that the recipe needs and that is not there, is no group, or cannot be resolved."""
    yield from unread_problems(config, (*_GROUPS, "seed", "device"))
    for name, (allowed, best) in _GROUPS.items():
        try:
            node = config.get(name)
        except OmegaConfBaseException:  # told above
            continue
        if node is None:
            asked = f"{name}=null" if name in config else f"~{name}"
            yield Problem(what=f"the recipe needs {_article(name)}", asked=asked, allowed=allowed, instead=best)
        elif not isinstance(node, DictConfig):
            what = f"{name} is not a group of options"
            yield Problem(what=what, asked=assigned(name, _plain(node)), allowed=allowed, instead=best)
        elif "_target_" in node and not isinstance(node.get("_target_"), str):
            asked = assigned(f"{name}._target_", _plain(node.get("_target_")))
            what = f"{name}._target_ is not the path of a class or function"
            yield Problem(what=what, asked=asked, allowed="package.module.name", instead=best)
        elif name == "model":
            yield from model_problems(node)
        elif name == "train":
            for key in [key for key in _SIZES if key not in node]:
                allowed, best = "a number of rows", assigned(f"train.{key}", _SIZES[key])
                yield Problem(what=f"train.{key} is missing", asked=f"~train.{key}", allowed=allowed, instead=best)


def _article(name: str) -> str:
    return {"optimizer": "an optimizer", "data": "data", "model": "a model"}.get(name, f"its group {name}")


def model_problems(node: DictConfig) -> Iterable[Problem]:
    """What is wrong with a node of the model that has no ``_target_``, as far as its kinds of values go."""
    if "_target_" in node:
        return
    allowed, best = _GROUPS["model"]
    folder, config = node.get("name_or_path"), node.get("config")
    if folder is not None and not isinstance(folder, str):
        asked = assigned("model.name_or_path", _plain(folder))
        what = "model.name_or_path is not a folder"
        yield Problem(
            what=what, asked=asked, allowed="a local folder of save_pretrained; null", instead="model.name_or_path=null"
        )
    elif config is not None and config != "" and not isinstance(config, DictConfig):
        asked = assigned("model.config", _plain(config))
        yield Problem(
            what="model.config is not a group of fields",
            asked=asked,
            allowed="fields of a transformers config",
            instead=best,
        )
    elif not folder and not config:
        what = "the config does not say which model to build"
        yield Problem(what=what, asked=assigned("model", _plain(node)), allowed=allowed, instead=best)
    elif not folder:
        kind = config.get("model_type")
        if kind is None or kind == "":
            asked = assigned("model.config.model_type", kind)
            what = "model.config has no model_type"
            yield Problem(
                what=what, asked=asked, allowed="llama, qwen3, mistral, ...", instead="model.config.model_type=llama"
            )
        elif not isinstance(kind, str):
            asked = assigned("model.config.model_type", _plain(kind))
            what = "model.config.model_type is not the name of a family"
            yield Problem(
                what=what, asked=asked, allowed="llama, qwen3, mistral, ...", instead="model.config.model_type=llama"
            )


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
