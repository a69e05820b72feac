"""What a model returns, shown to megatron-fsdp as a list of tensors while its hooks look for them.

megatron-fsdp 0.6 prepares a backward when the first gradient reaches an output of the model, and finds outputs in a
tensor, a tuple or a list only. Of a model that returns a dict or an object of transformers it prepares too late: when
the gradient reaches the module that was registered last. What modules that ran after that one have got by then is set
to zero, silently.
"""

from __future__ import annotations

from typing import Any, Callable, Iterable

from torch import Tensor, nn

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.torch_inside import tree_flatten, tree_unflatten

__all__ = ["show_outputs"]


def show_outputs(modules: Iterable[nn.Module], wrap: Callable[[], Any]) -> Any:
    """What ``wrap()`` returns, which adds the library's hooks to these modules; they return what they returned before.

    A forward raises ConfigError where no tensor can be found in what a module returns.
    """
    shown = [(module, _Shown()) for module in modules]
    for module, outputs in shown:  # hooks run in the order in which they are added
        module.register_forward_hook(outputs.take_apart)
    wrapped = wrap()
    for module, outputs in shown:
        module.register_forward_hook(outputs.put_together)
    return wrapped


class _Shown:
    """One module's output, between its first hook and its last."""

    def __init__(self) -> None:
        self._leaves: list[Any] | None = None
        self._spec: Any = None

    def take_apart(self, module: nn.Module, inputs: Any, output: Any) -> list[Tensor] | None:
        self._leaves = None
        if isinstance(output, Tensor):
            return None
        self._leaves, self._spec = tree_flatten(output)
        tensors = [leaf for leaf in self._leaves if isinstance(leaf, Tensor)]
        if tensors:
            return tensors
        kind = type(output)
        raise ConfigError(
            Problem(
                what=f"{type(module).__name__} returns {kind.__module__}.{kind.__qualname__}, in which megatron-fsdp "
                "finds no tensor to begin a backward with",
                asked="strategy=megatron_fsdp",
                allowed="a tensor, or a tuple, list, dict or output of transformers with one; fsdp2 takes any",
                instead="strategy=fsdp2",
            )
        )

    def put_together(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        leaves, self._leaves = self._leaves, None
        if leaves is None:
            return output
        tensors = iter(output)
        return tree_unflatten([next(tensors) if isinstance(leaf, Tensor) else leaf for leaf in leaves], self._spec)
