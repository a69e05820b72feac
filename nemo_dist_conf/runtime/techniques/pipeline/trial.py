"""The trial of a model's forward on a few tokens: what its parts return, and what they take from one another.

Each part runs on meta, for the shape of its result, and returns numbers that depend on everything it is given: so two
runs give the same output only if every part was given the same. What is around the parts, masks and positions, runs on
the CPU with real numbers. No weight is read, and nothing of the model changes.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import random
import zlib
from collections import Counter
from typing import Any, Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from nemo_dist_conf.runtime.model.blocks import Blocks
from nemo_dist_conf.runtime.model.trial import first_line
from nemo_dist_conf.runtime.techniques.pipeline.flow import Call, Flow, Given, Placed, Shape, Value
from nemo_dist_conf.runtime.techniques.pipeline.parts import copied, no_chain
from nemo_dist_conf.runtime.techniques.pipeline.stage_forward import Likeness, StageForward, run_model, stage_of
from nemo_dist_conf.runtime.torch_inside import (
    QuickDispatchMode,
    is_hooked,
    own_buffers,
    own_parameters,
    tree_flatten,
    tree_leaves,
    tree_map_only,
    tree_unflatten,
    writes_into,
)

__all__ = ["Opened", "Trial", "prove"]

#: (rows, tokens) of the two runs that tell a shape in terms of both; no model needs rows of eight and not of sixteen.
_SIZES = ((2, 8), (3, 16))
_PLAIN = (str, int, float, bool, type(None), torch.dtype, torch.device)
#: In the names of operators that take no more than the shape of what they are given.
_SHAPE_ONLY = ("_like", "new_")
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
#: How deep objects that nobody knows are searched for tensors.
_DEPTH = 4


class Opened(Exception):
    """A module that is no block is not called, but its members are used one by one. names: of such."""

    def __init__(self, names: Collection[str]) -> None:
        self.names = frozenset(names)


class Trial:
    """One model's trial. parts, blocks: by name."""

    def __init__(self, model: nn.Module, parts: Mapping[str, nn.Module], blocks: Blocks) -> None:
        self.model, self.parts, self.blocks = model, parts, blocks
        self.opened: set[str] = set()
        self._twins: dict[str, nn.Module] = {}
        self._kinds: dict[str, str] = {}
        self._known: dict[Any, tuple[Any, frozenset[int]]] = {}
        self._used: dict[int, str] = {}
        self._made: dict[int, Value] = {}
        self._kept: list[Tensor] = []
        self._written: dict[int, tuple[int, Tensor]] = {}
        self._calls: list[tuple[Call, tuple[Tensor, ...]]] = []
        self._counts: Counter[str] = Counter()
        self._sources_of_output: tuple[frozenset[Value], frozenset[str]] = (frozenset(), frozenset())
        #: Which of the tensors that a call is given its numbers depend on, by part and which of its calls.
        self.reads: dict[tuple[str, int], list[int]] = {}
        #: Of the whole model.
        self.output = torch.empty(0)

    def flow(self) -> Flow:
        """The calls of one forward.

        Raises ConfigError where it does not run so, ``Opened`` where parts are too coarse.
        """
        first, second = (self._run(*size) for size in _SIZES)
        names = [[call.name for call, _ in calls] for calls, _ in (first, second)]
        if names[0] != names[1]:
            raise no_chain(self.model, "which of its modules run depends on the number of tokens")
        calls = tuple(self._fitted(one, other) for one, other in zip(first[0], second[0]))
        output = _fit(first[1], second[1])
        if output is None:
            raise no_chain(self.model, "the shape of its output does not follow from that of the ids")
        takes, uses = self._sources_of_output
        return Flow(calls, output, takes, uses)

    def _run(self, rows: int, tokens: int) -> tuple[list[tuple[Call, tuple[Tensor, ...]]], Tensor]:
        self._used, self._made, self._written, self._kept, self._calls = {}, {}, {}, [], []
        self._counts.clear()
        try:
            with _same_numbers():
                whole = copied(self.model, self.parts, self.tried, self.leaf, trial=True)
                output = run_model(whole, _ids(rows, tokens))
        except Exception as error:  # the model's own code, in a way its author never ran it
            if self.opened - self.blocks.keys():
                raise Opened(self.opened - self.blocks.keys()) from error
            raise no_chain(self.model, f"its forward does not run without its layers ({first_line(error)})") from error
        uncalled = {name for name in self.opened - self.blocks.keys() if name not in self._counts}
        if uncalled:
            raise Opened(uncalled)
        if not isinstance(output, Tensor):
            why = f"its forward returns {type(output).__name__}, not a tensor or an output with logits"
            raise no_chain(self.model, why)
        if (rows, tokens) == _SIZES[0]:
            self._sources_of_output, self.output = self._sources([output]), output.detach()
        return self._calls, output

    def _fitted(self, one: tuple[Call, tuple[Tensor, ...]], other: tuple[Call, tuple[Tensor, ...]]) -> Call:
        call, made = one
        shapes = [_fit(a, b) for a, b in zip(made, other[1])]
        if None in shapes or len(made) != len(other[1]):
            raise no_chain(self.model, f"the shape of what {call.name} returns does not follow from that of the ids")
        rest = iter(shapes)
        leaves = tuple(next(rest) if isinstance(leaf, Tensor) else leaf for leaf in call.leaves)
        return Call(call.name, call.nth, leaves, call.spec, call.depends, call.takes, call.uses, call.reads)

    # ------------------------------------------------------------------------------------------------------ parts

    def tried(self, name: str, module: nn.Module) -> nn.Module:
        return _Tried(name, module, self)

    def leaf(self, name: str, parameter: Tensor) -> Tensor:
        """What stands for a parameter that the code around the parts uses: in no memory, and known again."""
        leaf = _filled(parameter, 0.25)
        if leaf.is_floating_point():
            leaf.requires_grad_()
        self._used[id(leaf)] = name
        self._kept.append(leaf)
        return leaf

    def returned(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
        """What a part gives in the trial, noted as one of its calls."""
        nth = self._counts[name]
        self._counts[name] += 1
        given = self._given(args, kwargs)
        takes, uses = self._sources(given)
        out, reads = self._told(name, module, args, kwargs, given)
        leaves, spec = tree_flatten(out)
        places = {id(leaf): place for place, leaf in enumerate(tree_leaves((args, kwargs)))}
        depends = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in leaves)
        self.reads[name, nth] = [place for place, one in enumerate(given) if depends or not one.requires_grad]
        given = [given[place] for place in self.reads[name, nth]]
        made: list[Tensor] = []
        noted: list[Any] = []
        handed: list[Any] = []
        for index, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor):
                if not isinstance(leaf, _PLAIN) and id(leaf) not in places:
                    why = f"{name} returns a {type(leaf).__name__}, which cannot be handed on"
                    raise no_chain(self.model, why)
                noted.append(leaf if isinstance(leaf, _PLAIN) else Given(places[id(leaf)]))
                handed.append(leaf)
                continue
            value = _numbers(f"{name}#{nth}.{index}", leaf.shape, leaf.dtype, given)
            if leaf.requires_grad:
                value.requires_grad_()
                self._made[id(value)] = Value(len(self._calls), index)
                self._kept.append(value)
            made.append(leaf)
            noted.append(leaf)
            handed.append(value.clone())  # no leaf, so that the model may write into it
        self._calls.append((Call(name, nth, tuple(noted), spec, depends, takes, uses, reads), tuple(made)))
        return tree_unflatten(handed, spec)

    def _given(self, args: Any, kwargs: Any) -> list[Tensor]:
        """Tensors that a part is given, without those that others have written into what it is given too."""
        return [tensor for tensor in _tensors((args, kwargs)) if id(tensor) not in self._written]

    def _told(
        self, name: str, module: nn.Module, args: Any, kwargs: Any, given: list[Tensor]
    ) -> tuple[Any, frozenset[int]]:
        """As ``_on_meta``, asked once of parts that are alike and are given the like."""
        leaves, spec = tree_flatten((args, kwargs))
        if not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):  # a cache, into which each of them writes
            return self._on_meta(name, module, args, kwargs, given)
        shown = [(one.shape, one.dtype, one.requires_grad) if isinstance(one, Tensor) else repr(one) for one in leaves]
        if name not in self._kinds:
            self._kinds[name] = _kind_of(name, module)
        key = (self._kinds[name], str(spec), tuple(map(str, shown)))
        if key not in self._known:
            self._known[key] = self._on_meta(name, module, args, kwargs, given)
        return self._known[key]

    def _on_meta(
        self, name: str, module: nn.Module, args: Any, kwargs: Any, given: list[Tensor]
    ) -> tuple[Any, frozenset[int]]:
        """What the part itself returns, as tensors without values; those that follow from weights require gradients.

        And the calls that have written what it reads, into a cache that is handed to all of them.

        Where it does not run without values, with weights of zeros; else what a block most often returns.
        """
        before = {id(tensor) for tensor in given}
        for device in ("meta", "cpu"):
            key = f"{device} {name}"
            try:
                if key not in self._twins:
                    self._twins[key] = _twin(module, device)
                twin, follow = self._twins[key], _Following(device, self._written)
                moved = tree_map_only(Tensor, follow.moved, (args, kwargs))
                known = before | {id(tensor) for tensor in _tensors(moved)} | self._written.keys()
                follow.note(twin.parameters())
                with follow, torch.no_grad():
                    out = twin(*moved[0], **moved[1])
            except Exception:
                self._twins.pop(key, None)
                continue
            if any(isinstance(leaf, Tensor) and id(leaf) not in known for leaf in tree_leaves(moved)):
                # Into a copy of it here, so that nobody could tell who reads it.
                raise no_chain(self.model, f"{name} writes into what it is given, and other modules may read it there")
            written = [tensor for tensor in _tensors(moved) if id(tensor) not in known]
            self._written.update({id(tensor): (len(self._calls), tensor) for tensor in written})
            return tree_map_only(Tensor, follow.shown, out), frozenset(follow.read - {len(self._calls)})
        tensors = [tensor for tensor in given if tensor.is_floating_point()]
        if not tensors:
            raise TypeError(f"{name} does not run on meta")
        return torch.empty_like(tensors[0], device="meta").requires_grad_(), frozenset()

    def _sources(self, tensors: list[Tensor]) -> tuple[frozenset[Value], frozenset[str]]:
        """What of the values and parameters of this trial tensors follow from, but not through a part."""
        leaves = _leaves_behind(tensors)
        takes = frozenset(self._made[key] for key in leaves if key in self._made)
        return takes, frozenset(self._used[key] for key in leaves if key in self._used)


class _Tried(Likeness):
    """A part in a trial."""

    def __init__(self, name: str, module: nn.Module, trial: Trial) -> None:
        super().__init__(module)
        self.__dict__["trial"] = (name, trial)
        own = own_parameters(self)
        for key, parameter in own_parameters(module).items():
            own[key] = None if parameter is None else trial.leaf(f"{name}.{key}", parameter)
        own.update(_sign_of(module))

    def __getattr__(self, name: str) -> Any:
        found = super().__getattr__(name)
        if isinstance(found, nn.Module):
            part, trial = self.__dict__["trial"]
            trial.opened.add(part)
        return found

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        name, trial = self.__dict__["trial"]
        return trial.returned(name, self.__dict__["like"], args, kwargs)


def prove(trial: Trial, placed: Placed) -> Placed:
    """The same with what the stages change, once they give one after the other what the whole model does.

    In the numbers of the trial. Raises ConfigError where they do not.
    """
    model, whole = trial.model, trial.output
    ids = _ids(*_SIZES[0])
    handed: tuple[Tensor, ...] = ()
    for index in range(len(placed.parts)):
        output, writes = _stage_alone(trial, placed, index, ids, handed)
        if writes:
            placed = dataclasses.replace(placed, changing=placed.changing | {index})
            output, _ = _stage_alone(trial, placed, index, ids, handed)
        handed = output
    if handed[0].shape != whole.shape or not torch.equal(handed[0].nan_to_num(), whole.nan_to_num()):
        raise no_chain(model, "its layers hand on something else than tensors with gradients")
    return placed


def _stage_alone(
    trial: Trial, placed: Placed, index: int, ids: Tensor, handed: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], bool]:
    """(what a stage returns, whether it writes into what it is handed or hands on), in the numbers of the trial."""
    given = tuple(tensor.clone() for tensor in handed)
    forward = StageForward(placed, index)
    stage = _numbered_stage(trial, placed, index, forward)
    forward.watch()
    try:
        with _same_numbers(), torch.no_grad():
            output = forward(ids, given)
    except Exception as error:
        raise no_chain(trial.model, f"its forward does not take what a stage hands on ({first_line(error)})") from error
    del stage
    return output if isinstance(output, tuple) else (output,), forward.wrote or any(map(writes_into, given))


def _numbered_stage(trial: Trial, placed: Placed, index: int, forward: StageForward) -> nn.Module:
    """A stage in which its own parts give the numbers of the trial."""

    def part(name: str, module: nn.Module) -> nn.Module:
        return _Numbered(name, module, placed, index, trial)

    def loose(name: str, parameter: Tensor) -> Tensor:
        return _filled(parameter, 0.25 if name in placed.loose[index] else 0.0)

    return stage_of(trial.model, trial.parts, placed, index, forward, part, loose, trial=True)


class _Numbered(Likeness):
    """A part whose calls are known, which gives the numbers of the trial."""

    def __init__(self, name: str, module: nn.Module, placed: Placed, index: int, trial: Trial) -> None:
        super().__init__(module)
        self.__dict__["reads"] = trial.reads
        own = [call for call in placed.flow.of(name) if placed.stage_of[call] in (None, index)]
        self.__dict__["calls"] = [placed.flow.calls[call] for call in own]
        parameters = own_parameters(self)
        for key, parameter in own_parameters(module).items():
            parameters[key] = None if parameter is None else _filled(parameter, 0.25)
        parameters.update(_sign_of(module))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        call = self.__dict__["calls"].pop(0)
        given, places = _tensors((args, kwargs)), tree_leaves((args, kwargs))
        given = [given[place] for place in self.__dict__["reads"][call.name, call.nth]]
        leaves: list[Any] = []
        for index, leaf in enumerate(call.leaves):
            if isinstance(leaf, Shape):
                leaf = _numbers(f"{call.name}#{call.nth}.{index}", leaf.of(*_SIZES[0]), leaf.dtype, given)
            leaves.append(places[leaf.place] if isinstance(leaf, Given) else leaf)
        return tree_unflatten(leaves, call.spec)


# ------------------------------------------------------------------------------------------------------------ numbers


def _numbers(name: str, shape: Sequence[int], dtype: torch.dtype, given: Sequence[Tensor]) -> Tensor:
    """A tensor that depends on its name and on every element of the tensors given, and on nothing else."""
    with torch.no_grad():
        total = torch.zeros((), dtype=torch.float64)
        alike = None
        for place, tensor in enumerate(given):
            values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            values = values.detach().double().nan_to_num(0.5).clamp(-1e4, 1e4)
            total += (place + 1.3) * (values.reshape(-1) * _waves(values.numel())).sum()
            alike = values if alike is None and values.shape == tuple(shape) else alike
        size = torch.Size(shape).numel()
        found = _waves(size).view(shape) * (1 + zlib.crc32(name.encode()) % 997 / 997) + torch.sin(total)
        if alike is not None:
            found = found + alike.tanh()
        if not dtype.is_floating_point and not dtype.is_complex:
            return found.mul(100).long().remainder(2).to(dtype)  # any table has two rows
        return found.to(dtype)


@functools.lru_cache(maxsize=8)
def _waves(size: int) -> Tensor:
    return torch.arange(size, dtype=torch.float64, device="cpu").mul_(0.7).cos_().mul_(0.4).add_(1)


def _ids(rows: int, tokens: int) -> Tensor:
    return torch.zeros(rows, tokens, dtype=torch.int64, device="cpu")


def _filled(parameter: Tensor, value: float) -> Tensor:
    """A tensor of a parameter's shape, in no memory."""
    return torch.full((), value, dtype=parameter.dtype, device="cpu").expand(parameter.shape)


def _sign_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """What tells a model that asks a part's parameters for their dtype and device."""
    first = next(module.parameters(), None)
    return (
        {}
        if first is None
        else {"sign_of_the_trial": nn.Parameter(torch.empty(0, dtype=first.dtype, device="cpu"), False)}
    )


@contextlib.contextmanager
def _same_numbers() -> Iterator[None]:
    """Inside, the code around the parts draws the same random numbers each time; gradients can be followed."""
    torch.manual_seed(0)
    random.seed(0)
    with torch.enable_grad(), torch.device("cpu"):
        yield


def _fit(one: Tensor, other: Tensor) -> Shape | None:
    """The shape of what two runs have returned, in terms of rows and tokens."""
    (rows, tokens), (more_rows, more_tokens) = _SIZES
    if one.dim() != other.dim() or one.dtype != other.dtype:
        return None
    sizes = []
    for a, b in zip(one.shape, other.shape):
        if a == b:
            sizes.append((a, 0, 0, 0))
        elif a * more_tokens == b * tokens and a % tokens == 0:
            sizes.append((0, 0, a // tokens, 0))
        elif a * more_rows == b * rows and a % rows == 0:
            sizes.append((0, a // rows, 0, 0))
        elif a * more_rows * more_tokens == b * rows * tokens and a % (rows * tokens) == 0:
            sizes.append((0, 0, 0, a // (rows * tokens)))
        elif b - a == more_tokens - tokens:
            sizes.append((a - tokens, 0, 1, 0))
        elif b - a == more_rows - rows:
            sizes.append((a - rows, 1, 0, 0))
        else:
            return None
    return Shape(tuple(sizes), one.dtype)


# ------------------------------------------------------------------------------------------------------------ tensors


def _tensors(value: Any, depth: int = _DEPTH) -> list[Tensor]:
    """Tensors in arguments, whatever they are packed in."""
    found: list[Tensor] = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif depth and not isinstance(leaf, (*_PLAIN, nn.Module, type, Callable)):  # type: ignore[arg-type]
            inner = [*leaf.values()] if isinstance(leaf, Mapping) else []
            inner += [*vars(leaf).values()] if hasattr(leaf, "__dict__") else []
            found += [tensor for one in inner for tensor in _tensors(one, depth - 1)]
    return found


def _leaves_behind(tensors: Sequence[Tensor]) -> set[int]:
    """ids of the leaves that tensors follow from."""
    found = {id(tensor) for tensor in tensors if tensor.grad_fn is None}
    nodes = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    seen: set[Any] = set(nodes)
    while nodes:
        node = nodes.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                nodes.append(following)
    return found


def _kind_of(name: str, module: nn.Module) -> str:
    """Equal for parts that do the same with other weights: of one class, sizes and settings, but for their number."""
    place = name.rpartition(".")[2]
    found: list[Any] = []
    for path, one in module.named_modules():
        own = {**own_parameters(one), **own_buffers(one)}
        shapes = {key: None if tensor is None else (tensor.shape, tensor.dtype) for key, tensor in own.items()}
        plain = {key: value for key, value in vars(one).items() if isinstance(value, (*_PLAIN, list, tuple))}
        rest = {key: id(value) for key, value in vars(one).items() if key not in plain and key not in _OF_EVERY_MODULE}
        numbered = {key: "its number" if str(value) == place else value for key, value in plain.items()}
        found.append((path, type(one), shapes, numbered, rest, id(one) if is_hooked(one) else None))
    return repr(found)


def _twin(module: nn.Module, device: str) -> nn.Module:
    """The module with tensors without values, or with zeros, on another device."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    if device == "meta" and all(tensor.is_meta for tensor in tensors.values()):
        return module
    memo: dict[int, Any] = {}
    for key, tensor in tensors.items():
        values = torch.zeros(tensor.shape, dtype=tensor.dtype, device=device)
        memo[key] = nn.Parameter(values, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else values
    return copy.deepcopy(module, memo)


class _Following(QuickDispatchMode):
    """Runs a part without values, and follows what its weights and what it is given that follows from weights go into.

    On meta operators may take tensors that are neither parameters nor buffers, and have values, wherever kept.
    """

    def __init__(self, device: str, written: Mapping[int, tuple[int, Tensor]]) -> None:
        """written: tensors that other calls have written, by their ids, with the numbers of those calls."""
        super().__init__()
        self._device, self._written = device, written
        #: Calls whose tensors have been read.
        self.read: set[int] = set()
        self._noted: dict[int, Tensor] = {}

    def note(self, tensors: Iterable[Tensor]) -> None:
        self._noted.update({id(tensor): tensor for tensor in tensors})

    def moved(self, tensor: Tensor) -> Tensor:
        """A copy of an argument on the device of the run."""
        own = tensor.detach().to(self._device, copy=True)
        if tensor.requires_grad:
            self.note([own])
        return own

    def shown(self, tensor: Tensor) -> Tensor:
        """A result on meta."""
        follows = id(tensor) in self._noted and tensor.is_floating_point()
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta", requires_grad=follows)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        follows = any(id(tensor) in self._noted for tensor in given)
        self.read |= {self._written[id(tensor)][0] for tensor in given if id(tensor) in self._written}
        if len({tensor.is_meta for tensor in given}) > 1:
            args, kwargs = tree_map_only(Tensor, _to_meta, (args, kwargs))
        out = func(*args, **(kwargs or {}))
        if follows and not any(word in func.__name__ for word in _SHAPE_ONLY):
            self.note(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


def _to_meta(tensor: Tensor) -> Tensor:
    return tensor.detach().to("meta")
