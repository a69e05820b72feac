"""How a stage runs: the model's own forward, in which other stages' modules are stand-ins.

A stand-in of an earlier stage gives what that stage has handed on, or zeros where nothing of it is needed any more;
the first one of a later stage ends the forward, once there is everything to be handed on.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from typing import Any, Callable, Mapping

import torch
from torch import Tensor, nn

from nemo_dist_conf.errors import TrainingError
from nemo_dist_conf.runtime.techniques.pipeline.flow import Call, Given, Placed, Shape, Value
from nemo_dist_conf.runtime.techniques.pipeline.parts import copied, without_values
from nemo_dist_conf.runtime.torch_inside import is_view, tree_flatten, tree_leaves, tree_unflatten, writes_into

__all__ = ["Likeness", "StageForward", "run_model", "stage_of"]


class Likeness(nn.Module):
    """Stands where a module is, and has its attributes for whoever asks what it is."""

    def __init__(self, like: nn.Module) -> None:
        super().__init__()
        self.__dict__["like"] = like
        self.training = like.training

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["like"], name)


class _Ended(Exception):
    """There is everything that the stage hands on."""


class StageForward:
    """A stage's forward: takes ids [B, S] and what the stage before has handed on; returns what this one hands on.

    The last stage returns the model's output, a tensor; another one a tensor, or a tuple of several.
    """

    def __init__(self, placed: Placed, stage: int) -> None:
        """``begin`` has to follow, with the module."""
        self.placed, self.stage = placed, stage
        self.is_last = stage == len(placed.parts) - 1
        self.takes: tuple[Value, ...] = placed.handed[stage - 1] if stage else ()
        self.hands: tuple[Value, ...] = () if self.is_last else placed.handed[stage]
        #: Whether the last run has written into what it handed on, after a part had returned it.
        self.wrote = False
        #: dtype of what is handed on; None: as in the trial.
        self.sent: torch.dtype | None = None
        self._module: nn.Module | None = None
        self._absent: list[tuple[nn.Module, str, Tensor]] = []
        self._counts: Counter[str] = Counter()
        self._received: dict[Value, Tensor] = {}
        self._made: dict[Value, Tensor] = {}
        self._writes: dict[Value, int] = {}
        self._ids = torch.empty(0, 0)
        self._runs = False

    def begin(self, module: nn.Module, absent: list[tuple[nn.Module, str, Tensor]]) -> None:
        """module: the stage. absent: containers' parameters that other stages hold."""
        self._module, self._absent = module, absent

    def watch(self, is_compiled: bool = False) -> None:
        """Note what parts return that is to be handed on. After sharding, which may add to what they return."""
        assert self._module is not None
        own = {value.call for value in self.hands if self.placed.stage_of[value.call] == self.stage}
        for name in dict.fromkeys(self.placed.flow.calls[call].name for call in sorted(own)):
            part = self._module.get_submodule(name)
            if isinstance(part.forward, _Sometimes):
                continue
            note: Callable[..., None] = functools.partial(self._note_of, name)
            part.register_forward_hook(torch.compiler.disable(note) if is_compiled else note)

    def __call__(self, ids: Tensor, received: tuple[Tensor, ...] = (), **kwargs: Any) -> Any:
        assert self._module is not None
        self._counts.clear()
        if self.stage in self.placed.changing:  # FSDP2 gives it as a view, which autograd lets nobody write into
            received = tuple(tensor.clone() for tensor in received)
        self._ids, self._received, self._made = ids, dict(zip(self.takes, received, strict=True)), {}
        self._writes = {}
        for container, name, parameter in self._absent:
            # In no memory: only what is thrown away is computed with it.
            container.__dict__[name] = torch.zeros((), dtype=parameter.dtype, device=ids.device).expand(parameter.shape)
        self._runs = True
        try:
            output = run_model(self._module, ids, **kwargs)
            if self.is_last:
                return _own(output)
        except _Ended:
            pass
        finally:
            self._runs = False
            received_now, made = self._received, self._made
            self._received, self._made = {}, {}
        self.wrote = any(writes_into(made[value]) != before for value, before in self._writes.items())
        missing = next((value for value in self.hands if value not in made and value not in received_now), None)
        if missing is not None:
            raise self._other_way(f"{self.placed.flow.calls[missing.call].name} did not run")
        # torch frees a stage's graph by detaching its output in place, which a view does not allow; what was received
        # is handed on as a tensor of this stage's graph.
        handed = [made[value] if value in made else received_now[value].clone() for value in self.hands]
        shapes = map(self.placed.flow.shape, self.hands)
        handed = [_own(tensor.to(self.sent or shape.dtype)) for tensor, shape in zip(handed, shapes)]
        return handed[0] if len(handed) == 1 else tuple(handed)

    def in_place_of(self, name: str, args: Any, kwargs: Any, run: Callable[..., Any] | None = None) -> Any:
        """What a part's call gives on this stage. run: the part itself, where this stage may hold it."""
        nth = self._counts[name]
        self._counts[name] += 1
        number = self.placed.flow.number.get((name, nth))
        if number is None:
            raise self._other_way(f"{name} runs a {nth + 1}. time")
        stage = self.placed.stage_of[number]
        if run is not None and stage in (None, self.stage):
            output = run(*args, **kwargs)
            self._note(number, output)
            return output
        if stage is not None and stage > self.stage and all(v in self._made or v in self._received for v in self.hands):
            raise _Ended
        return self._filled(number, self.placed.flow.calls[number], args, kwargs)

    def _filled(self, number: int, call: Call, args: Any, kwargs: Any) -> Any:
        rows, tokens = self._ids.shape[:2]
        leaves: list[Any] = []
        for index, leaf in enumerate(call.leaves):
            if isinstance(leaf, Shape):
                found = self._received.get(Value(number, index))
                if found is None:
                    found = torch.zeros(leaf.of(rows, tokens), dtype=leaf.dtype, device=self._ids.device)
                leaves.append(found)
            else:
                leaves.append(tree_leaves((args, kwargs))[leaf.place] if isinstance(leaf, Given) else leaf)
        return tree_unflatten(leaves, call.spec)

    def _note_of(self, name: str, part: nn.Module, args: Any, output: Any) -> None:
        if not self._runs:  # somebody else runs the part
            return
        nth = self._counts[name]
        self._counts[name] += 1
        self._note(self.placed.flow.number[name, nth], output)

    def _note(self, number: int, output: Any) -> None:
        leaves = tree_flatten(output)[0]
        for value in self.hands:
            if value.call == number:
                made = leaves[value.leaf]
                self._made[value] = made.clone() if self.stage in self.placed.changing else made
                self._writes[value] = writes_into(self._made[value])

    def _other_way(self, what: str) -> TrainingError:
        return TrainingError(
            f"the forward of {type(self._module).__name__} takes another way than when it was split: {what}"
        )


def stage_of(
    model: nn.Module,
    parts: Mapping[str, nn.Module],
    placed: Placed,
    index: int,
    forward: StageForward,
    part: Callable[[str, nn.Module], nn.Module],
    loose: Callable[[str, nn.Parameter], Tensor | None] = lambda name, parameter: None,
    trial: bool = False,
) -> nn.Module:
    """The model of which a stage holds its parts, and has stand-ins for the rest; names stay what they are.

    part: what a part is that the stage holds, or that runs everywhere. loose: as in ``copied``, of parameters that the
    stage holds. ``forward`` is begun with it.
    """
    absent: list[tuple[nn.Module, str, Tensor]] = []

    def replaced(name: str, module: nn.Module) -> nn.Module:
        stages = {placed.stage_of[call] for call in placed.flow.of(name)}
        if name not in placed.parts[index] and None not in stages and (stages or _has_weights(module)):
            instead: nn.Module = _StandIn(name, without_values(module), forward)
            absent.extend((instead, key, one) for key, one in module.named_parameters(recurse=False))
            return instead
        held = part(name, module)
        if stages - {None, index}:
            held.forward = _Sometimes(name, held.forward, forward)
        return held

    def left(name: str, parameter: nn.Parameter) -> Tensor | None:
        found = loose(name, parameter)
        if found is None and name not in placed.loose[index]:
            found = parameter.detach()
        return found

    stage = copied(model, parts, replaced, left, trial=trial)
    if not trial:
        for name in {name for one in placed.loose for name in one} - placed.loose[index]:
            path, _, key = name.rpartition(".")
            container = stage.get_submodule(path)
            absent.append((container, key, container.__dict__[key]))
    forward.begin(stage, absent)
    return stage


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None


def _own(tensor: Tensor) -> Tensor:
    """A tensor that may be detached in place and sent."""
    if is_view(tensor) or not tensor.is_contiguous():
        return tensor.clone(memory_format=torch.contiguous_format)
    return tensor


class _StandIn(Likeness):
    """Stands where another stage's module is."""

    def __init__(self, name: str, like: nn.Module, stage: StageForward) -> None:
        super().__init__(like)
        self.__dict__["place"] = (name, stage)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name, stage = self.__dict__["place"]
        return stage.in_place_of(name, args, kwargs)


class _Sometimes:
    """The forward of a part that runs on several stages."""

    def __init__(self, name: str, run: Callable[..., Any], stage: StageForward) -> None:
        self.name, self.run, self.stage = name, run, stage

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.stage.in_place_of(self.name, args, kwargs, self.run)


def run_model(module: nn.Module, ids: Tensor, **kwargs: Any) -> Any:
    """What the model's own forward gives for ids: a tensor, of an output of transformers the logits."""
    forward: Callable[..., Any] = type(module).forward.__get__(module)
    names = _names(type(module).forward)
    if "use_cache" in names:
        kwargs["use_cache"] = False
    output = forward(input_ids=ids, **kwargs) if "input_ids" in names else forward(ids, **kwargs)
    for name in ("logits", "last_hidden_state"):
        output = getattr(output, name, output)
    return output


@functools.cache
def _names(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)
