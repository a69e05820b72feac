"""What the towers of a model take in: language, vision, audio. Found out by what its classes and methods say."""

from __future__ import annotations

import inspect
from typing import Any, Iterator

from torch import nn

from nemo_dist_conf.runtime.model.blocks import Blocks

__all__ = ["tower_words"]

#: What a class of transformers says that it takes in -> what its tower is called.
_KINDS = {"text": "language", "image": "vision", "video": "vision", "audio": "audio"}
#: Where transformers' own default stands, which says nothing about a class.
_DEFAULTS = "transformers.modeling_utils"


def tower_words(model: nn.Module, blocks: Blocks) -> dict[str, str]:
    """Of each block of which it can be told, ``language``, ``vision`` or ``audio``.

    The innermost module around a block decides: by the one kind of input that its own class declares
    (``input_modalities``), or as what the model's ``get_encoder`` or ``get_decoder`` gives. Then what a class that it
    inherits from declares; where none does, a tower of a model that takes ids of tokens and itself does is of language.
    Source: transformers 5, PreTrainedModel; a model of one's own may have the same.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    methods = _by_methods(model, blocks)
    found: dict[str, str] = {}
    for block in blocks:
        around = [modules[name] for name in _inside_out(block)]
        said = (_declared(module, own=True) or methods.get(id(module)) for module in around)
        inherited = (_declared(module, own=False) for module in (*around, model))
        word = next(filter(None, said), None) or next((word for word in inherited if word is not None), None)
        if word is None and _takes_ids(model) and any(map(_takes_ids, around)):
            word = _KINDS["text"]
        if word:
            found[block] = word
    return found


def _inside_out(block: str) -> Iterator[str]:
    parts = block.split(".")
    return (".".join(parts[:end]) for end in range(len(parts), 0, -1))


def _declared(module: nn.Module, own: bool) -> str | None:
    """The word for what a module's class takes in: "" where that is of several kinds, None where it says nothing."""
    for kind in type(module).__mro__[: 1 if own else None]:
        if "input_modalities" in vars(kind) and not kind.__module__.startswith(_DEFAULTS):
            said: Any = getattr(module, "input_modalities")
            words = {_KINDS.get(each, "") for each in ((said,) if isinstance(said, str) else said or ())}
            return words.pop() if len(words) == 1 else ""
    return None


def _by_methods(model: nn.Module, blocks: Blocks) -> dict[int, str]:
    """What the model gives as its encoders and its decoder, by id, but for what holds all blocks."""
    found: dict[int, str] = {}
    plain = _given(model, "get_encoder")
    for modality in ("image", "video", "audio"):
        tower = _given(model, "get_encoder", modality)
        # The one encoder of a model is that of every modality for some classes.
        if tower is not None and tower is not plain:
            found.setdefault(id(tower), _KINDS[modality])
    decoder = _given(model, "get_decoder")
    if decoder is not None:
        found.setdefault(id(decoder), _KINDS["text"])
    for module in model.modules():
        if id(module) in found:
            held = {id(inner) for inner in module.modules()}
            if all(id(block) in held for block in blocks.values()):
                del found[id(module)]
    return found


def _given(model: nn.Module, method: str, *modality: str) -> nn.Module | None:
    function = getattr(model, method, None)
    if not callable(function):
        return None
    try:
        inspect.signature(function).bind(*modality)
        given = function(*modality)
    except Exception:  # whatever a class's own method raises of what it has not
        return None
    return given if isinstance(given, nn.Module) and given is not model else None


def _takes_ids(module: nn.Module) -> bool:
    return getattr(module, "main_input_name", None) == "input_ids"
