"""The user's module below the wrappers of a strategy."""

from __future__ import annotations

from torch import nn

from nemo_dist_conf.runtime.torch_inside import own_children

__all__ = ["unwrapped"]


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's module below wrappers that replace it (DDP, Megatron-FSDP); FSDP2 wraps in place."""
    while any(kind.__module__.startswith(("torch.nn.parallel", "megatron_fsdp")) for kind in type(model).__mro__):
        inner = own_children(model)["module"]  # model.module would tell DDP that it is used past its forward
        assert isinstance(inner, nn.Module)
        model = inner
    return model
