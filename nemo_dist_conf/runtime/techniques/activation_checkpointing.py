"""Activation checkpointing per block: full, or selective, which keeps the results that are dear to recompute."""

from __future__ import annotations

import contextlib
import functools
import logging
from typing import Any, Callable, ContextManager

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.model.blocks import Blocks
from nemo_dist_conf.runtime.model.forward_state import ForwardState, Taken
from nemo_dist_conf.runtime.model.replaced_forwards import Around
from nemo_dist_conf.runtime.torch_inside import saved_by_selection, selective_contexts

__all__ = ["apply_activation_checkpointing", "kept_operators"]

#: Called in forward; what it returns makes what is entered where that forward runs again.
_Again = Callable[[], Callable[[], ContextManager[None]]]

log = logging.getLogger(__name__)


def apply_activation_checkpointing(
    model: nn.Module,
    blocks: Blocks,
    mode: bool | str,
    keeps_routing: bool = False,
    again: _Again | None = None,
) -> None:
    """Let every block's forward drop its activations and run again in backward.

    mode True: everything inside a block is recomputed. "selective": results of matmuls, attention and
    collectives are kept, the cheap rest is recomputed. False: nothing happens.
    keeps_routing: also keep which experts a router chose, so that tokens take the same way when forward runs again.
    again: what is to be as it was where forward runs again, besides the block.
    The forward of each module is replaced in place, so names of modules and parameters stay as they are.
    Source: torch.utils.checkpoint (non-reentrant), create_selective_checkpoint_contexts.
    """
    if mode is False:
        return
    for module in model.modules():  # those of a model with several towers have configs of their own
        config: Any = getattr(module, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False  # a key/value cache of transformers would be filled again by the recomputation
    contexts: Callable[[], Any] | None = None
    if mode == "selective" or keeps_routing:
        kept = (kept_operators() if mode == "selective" else frozenset()) | (_ROUTING if keeps_routing else frozenset())
        contexts = functools.partial(_contexts, functools.partial(_policy, kept))
    for block in blocks.values():
        block.forward = _Checkpointed(block, contexts, again)
    log.info("activation checkpointing (%s): %d blocks", "full" if mode is True else mode, len(blocks))


def _contexts(policy: Callable[..., CheckpointPolicy]) -> tuple[Any, Any]:
    # A compiled block is written anew without what changes in place.
    is_compiling = torch.compiler.is_compiling()
    return create_selective_checkpoint_contexts(policy) if is_compiling else selective_contexts(policy)


class _Checkpointed(Around):
    """A block's forward under torch.utils.checkpoint; running again leaves no trace.

    What the first run changed besides its output (running statistics, counters, Python's random numbers) is as it was
    before that run while forward runs again, and afterwards as if that had not been. torch does so for its own
    generators alone.
    """

    def __init__(self, block: nn.Module, contexts: Callable[[], Any] | None, again: _Again | None) -> None:
        """contexts: of selective checkpointing, for the two runs; None: everything is recomputed."""
        super().__init__(block.forward)
        self.contexts, self.state, self.again = contexts, ForwardState(block), again

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.__wrapped__(*args, **kwargs)
        kwargs = {key: _without_cache(key, value) for key, value in kwargs.items()}
        options: dict[str, Any] = {} if self.contexts is None else {"context_fn": self.contexts}
        # A compiled block runs what it changes once by itself.
        if not torch.compiler.is_compiling() and (self.state.changing != [] or self.again is not None):
            options["context_fn"] = self._both
        return checkpoint(self.__wrapped__, *args, use_reentrant=False, **options, **kwargs)

    def _both(self) -> tuple[ContextManager[None], ContextManager[None]]:
        inner = (contextlib.nullcontext(), contextlib.nullcontext()) if self.contexts is None else self.contexts()
        before: Taken = {}
        around = contextlib.nullcontext if self.again is None else self.again()
        return _FirstRun(inner[0], self.state, before), _SecondRun(inner[1], self.state, before, around)


class _FirstRun(ContextManager[None]):
    """Notes what a run of a block changes. before: filled with how that was."""

    def __init__(self, inner: ContextManager[Any], state: ForwardState, before: Taken) -> None:
        self.inner, self.state, self.before = inner, state, before

    def __enter__(self) -> None:
        self.before.update(self.state.take())
        self.inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inner.__exit__(*error)
        if error[0] is None:
            self.state.learn(self.before)


class _SecondRun(ContextManager[None]):
    """Lets a block start from the state before its first run, and leaves the one that there is.

    Entered twice where gradients of inputs and of weights are computed apart (zero-bubble schedules).
    """

    def __init__(
        self,
        inner: ContextManager[Any],
        state: ForwardState,
        before: Taken,
        around: Callable[[], ContextManager[None]],
    ) -> None:
        self.inner, self.state, self.before, self.around = inner, state, before, around
        self._entered: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.around())
            stack.enter_context(self.state.as_it_was(self.before))
            stack.enter_context(self.inner)
            self._entered.append(stack.pop_all())

    def __exit__(self, *error: Any) -> None:
        self._entered.pop().__exit__(*error)


def _without_cache(key: str, value: Any) -> Any:
    """What a block is given in place of a key/value cache of transformers, to which both runs would add.

    Raises ConfigError for one that holds something already, which a block would need.
    """
    if not (hasattr(value, "get_seq_length") and hasattr(value, "update")):
        return value
    if value.get_seq_length() == 0:
        return None
    what = f"{key} holds keys and values already, and a block that is run again would add its own a second time"
    mode = "activation_checkpointing"
    raise ConfigError(
        Problem(
            what=what,
            asked=f"model({key}=...) with {mode}=true",
            allowed=f"{mode}=false with it",
            instead=f"{mode}=false",
        )
    )


#: What a router of transformers chooses experts with.
_ROUTING = frozenset({torch.ops.aten.topk.default})


def _policy(kept: frozenset[Any], ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE


@functools.cache
def kept_operators() -> frozenset[Any]:
    """Operators whose results selective checkpointing keeps."""
    aten = torch.ops.aten
    return saved_by_selection() | {aten.mm.default, aten.addmm.default, aten.bmm.default}
