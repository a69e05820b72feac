"""What is refused of the node ``checkpoint`` before a process is spent: its values, and the folder to go on from."""

from __future__ import annotations

import importlib.util
from typing import Any, Iterable, Mapping

from omegaconf import DictConfig, OmegaConf

from nemo_dist_conf.checkpoint.manifest import damaged, find_checkpoint, read_manifest, wrong_sizes
from nemo_dist_conf.errors import DataError, Problem
from nemo_dist_conf.wording import assigned, typed_path

__all__ = ["saving_problems"]


def saving_problems(config: DictConfig, defaults: Mapping[str, Any]) -> Iterable[Problem]:
    """Every wrong value of ``checkpoint``. defaults: the recipe's own node."""
    node = config.get("checkpoint")
    if not isinstance(node, DictConfig):
        return
    for name in ("every", "keep"):
        value = node.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            unit = "steps" if name == "every" else "checkpoints"
            yield _problem(name, value, f"a number of {unit}, 1 or more; null", defaults[name] or 100)
    if not isinstance(node.get("async"), bool):
        yield _problem("async", node.get("async"), "true, false", False)
    if node.get("export") not in (None, "hf", "adapter"):
        yield _problem("export", node.get("export"), "adapter, hf, null", "hf")
    saves = node.get("every") is not None or node.get("export") is not None
    for name in ("keep", "async"):
        is_told = name == "async" and not isinstance(node.get(name), bool)  # above: it does not fit
        if not saves and node.get(name) != defaults[name] and not is_told:
            asked = assigned(f"checkpoint.{name}", node.get(name))
            what = f"{asked} has no effect: nothing is saved"
            allowed = "checkpoint.every=STEPS, or checkpoint.export=hf"
            yield Problem(what=what, asked=asked, allowed=allowed, instead=f"checkpoint.every=100 {asked}")
    if node.get("export") == "hf":
        yield from _export_problems(config)
    if node.get("export") == "adapter" and OmegaConf.select(config, "adapter.kind") in (None, "none"):
        what = "checkpoint.export=adapter writes a folder that peft loads, and nothing has an adapter"
        allowed = "null; hf, which writes the model; adapter=lora or adapter=dora beside it"
        yield Problem(what=what, asked="checkpoint.export=adapter", allowed=allowed, instead="checkpoint.export=hf")
    yield from _resume_problems(node.get("resume"))


def _export_problems(config: DictConfig) -> Iterable[Problem]:
    model = config.get("model")
    if isinstance(model, DictConfig) and "_target_" in model:
        what = "checkpoint.export=hf writes a folder of transformers, and this model is not one of transformers"
        allowed = "null for a class of your own; its checkpoints hold safetensors too"
        yield Problem(what=what, asked="checkpoint.export=hf", allowed=allowed, instead="checkpoint.export=null")
    elif importlib.util.find_spec("transformers") is None:
        what = "checkpoint.export=hf needs transformers, which is not installed"
        yield Problem(
            what=what, asked="checkpoint.export=hf", allowed="the extra hf", instead="pip install 'nemo_dist_conf[hf]'"
        )


def _resume_problems(resume: Any) -> Iterable[Problem]:
    if resume is None or resume == "auto":
        return
    path = find_checkpoint(typed_path(str(resume)))
    asked = assigned("checkpoint.resume", resume)
    if path is None:
        what = f"{resume} holds no checkpoint"
        yield Problem(
            what=what,
            asked=asked,
            allowed="auto, null, a folder of a checkpoint or of several",
            instead="checkpoint.resume=auto",
        )
        return
    try:
        finding = wrong_sizes(read_manifest(path))
        if finding:
            raise damaged(path, finding)
    except DataError as error:
        yield from error.problems


def _problem(name: str, value: Any, allowed: str, best: Any) -> Problem:
    asked = assigned(f"checkpoint.{name}", value)
    return Problem(
        what=f"{asked} does not fit", asked=asked, allowed=allowed, instead=assigned(f"checkpoint.{name}", best)
    )
