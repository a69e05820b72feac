"""What kind of layer a module is to a tensor-parallel style: the words of families/styles.py."""

from __future__ import annotations

from torch import nn

__all__ = ["layer_kind"]


def layer_kind(module: nn.Module) -> str:
    """``Linear`` ([output, input]), ``Embedding`` ([input, output]), or ``Conv1D``, a linear layer of transformers
    whose weight is [input, output], as GPT-2 has; "" for any other module. Subclasses are of the same kind.
    """
    if isinstance(module, nn.Linear):
        return "Linear"
    if isinstance(module, nn.Embedding):
        return "Embedding"
    # By name: a model without it needs no transformers.
    mro = type(module).__mro__
    return "Conv1D" if any((c.__module__, c.__name__) == ("transformers.pytorch_utils", "Conv1D") for c in mro) else ""
