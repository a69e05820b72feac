"""A small twin of a model, to try on a few tokens what a technique would do to the model itself.

    tried = twin(model, find_blocks(model))     # real modules, one block of each kind, values of its own
    inputs = small_input(tried, 16)
    plain = observed(tried, inputs)             # what every module returned, innermost first
    ...                                         # do to the twin what would be done to the model
    where = parted(plain, observed(tried, inputs))   # None: the same; else the first module that returns something else

The model may be on meta, and nothing of it changes: no value, no buffer, no hook, no config, no state of a generator.
Values of a twin depend on the seed and a parameter's name, so every rank has the same. They are large enough that
what a model adds to its scores (sinks, biases) or takes from them (soft caps) shows in its output.

Shapes: B rows, S tokens, E experts.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator, Mapping, Sequence, TypeVar

import torch
from torch import Tensor, nn

from nemo_dist_conf.runtime.model.blocks import Blocks
from nemo_dist_conf.runtime.torch_inside import (
    initialiser_of,
    own_buffers,
    own_parameters,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)

__all__ = [
    "Seen",
    "differ",
    "first_line",
    "keep_generators",
    "noted",
    "observed",
    "parted",
    "small_input",
    "standing_for",
    "tensors_of",
    "twin",
]

#: Rows of a small input, and how many ids it draws from.
_ROWS, _IDS = 2, 64
#: 1 GiB in float32: above, experts of one layer and parameters of one shape share their values.
_MOST_ELEMENTS = 2**28
#: Values of a large parameter repeat after so many, a prime: drawing them all takes seconds.
_DRAWN_ELEMENTS = 1_048_573
#: Outputs that differ by less than this part of their largest value are the same: sums in another order differ by 1e-6.
_TOLERANCE = 2e-4


def twin(
    model: nn.Module,
    blocks: Blocks,
    device: torch.device | str = "cpu",
    seed: int = 0,
    marks: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A copy of the model in evaluation mode and float32, with values of its own and one block of each kind.

    Blocks of one class with tensors of the same shapes and the same settings are of one kind: the first of them is
    run, the others are there and hand their input on. Long embeddings and heads keep their first rows. Nothing in it
    drops out. model: on any device, or on meta, before anything is wrapped or sharded. marks: what else makes a block's
    kind, by its name, for what is to be done to the blocks.
    Raises whatever copying the model, or computing its buffers, raises.
    """
    copied, moved = _copy_on_meta(model)
    names = {id(module): name for name, module in model.named_modules(remove_duplicate=False)}
    skipped = _hand_on(copied, [names[id(block)] for block in blocks.values()], marks or {})
    for module in copied.modules():
        _quiet(vars(module))
    with keep_generators(), torch.no_grad():
        _shorten(copied)
        _compute_buffers(model, copied, moved, skipped, torch.device(device))
        _draw(copied, skipped, torch.device(device), seed)
    return copied.eval()


def standing_for(copied: nn.Module, names: Iterable[str]) -> dict[str, str]:
    """Block of a twin that only hands its input on -> the block of its kind that is run. names: of all blocks."""
    forwards = {name: copied.get_submodule(name).forward for name in names}
    firsts = {id(forward): name for name, forward in forwards.items() if isinstance(forward, _First)}
    return {name: firsts[id(forward.first)] for name, forward in forwards.items() if isinstance(forward, _HandOn)}


def small_input(
    model: nn.Module, length: int, example: Mapping[str, Any] | None = None, device: torch.device | str = "cpu"
) -> dict[str, Any] | None:
    """Keyword arguments for forward: two rows of ``length`` random ids, or what the model takes instead of them.

    Instead of ids, what the first linear layer of an own model without an embedding takes, or the pixels or the
    spectrum that the config of a transformers model describes; None where neither is there.
    example: what the user says the model takes; it is returned as it is.
    """
    if example is not None:
        return dict(example)
    parameters = inspect.signature(model.forward).parameters
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [name for name, parameter in parameters.items() if parameter.kind not in several]
    main = getattr(model, "main_input_name", None)
    generator = torch.Generator().manual_seed(0)
    if main == "pixel_values":
        return _pixels(model, generator, torch.device(device))
    table = next((m for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if table is None:
        first = next((m for m in model.modules() if isinstance(m, nn.Linear)), None)
        if first is None or not names or hasattr(getattr(model, "config", None), "model_type"):
            return None
        return {names[0]: torch.randn(_ROWS, length, first.in_features, generator=generator).to(device)}
    lowest, count = (2, min(_IDS, table.num_embeddings)) if table.num_embeddings > 4 else (0, table.num_embeddings)
    ids_BS = torch.randint(lowest, count, (_ROWS, length), generator=generator).to(device)
    if "input_ids" not in names and names and not hasattr(getattr(model, "config", None), "model_type"):
        return {names[0]: ids_BS}
    given: dict[str, Any] = {"input_ids": ids_BS}
    if main == "input_features":
        spectrum = _spectrum(model, generator, torch.device(device))
        if spectrum is None:
            return None
        given = spectrum
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder_input_ids" in names:
        given["decoder_input_ids"] = ids_BS.flip(1)
    if "use_cache" in names:
        given["use_cache"] = False
    return given


@dataclass(frozen=True)
class Seen:
    """One call of a module: its name in the model, its class, and the tensors that it was given and returned."""

    module: str
    kind: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    def __str__(self) -> str:
        return f"{self.module or 'the model'} ({self.kind})"


_T = TypeVar("_T")


def noted(model: nn.Module, inputs: Mapping[str, Any], note: Callable[[str, nn.Module, Any, Any, Any], _T]) -> list[_T]:
    """``note(name, module, args, kwargs, output)`` of every call of a module in a run of the model without gradients.

    In the order in which the calls ended.
    """
    calls: list[_T] = []
    handles = []

    def watch(name: str) -> Callable[..., None]:
        return lambda *call: calls.append(note(name, *call))

    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_hook(watch(name), with_kwargs=True))
        with torch.no_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def observed(
    model: nn.Module, inputs: Mapping[str, Any], read: Callable[[Tensor], Tensor] = lambda tensor: tensor
) -> list[Seen]:
    """Every call of a module in a run of the model without gradients, in the order in which the calls ended.

    read: what of a tensor is kept, for a run in which ranks hold parts of it; called alike on every rank.
    """

    def note(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Seen:
        given, returned = (tuple(read(t).clone() for t in tensors_of(x)) for x in ((args, kwargs), output))
        return Seen(name, type(module).__name__, given, returned)

    return noted(model, inputs, note)


def first_line(error: BaseException | None) -> str:
    """What kind of error a model's own code ended in, and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).strip() or '...').splitlines()[0]}"


def parted(plain: list[Seen], other: list[Seen], tolerance: float = _TOLERANCE) -> Seen | None:
    """The call where two runs part: the first, innermost first, that was given the same and returned something else.

    Tensors that have another shape in the other run cannot be compared, and are passed over, but not those that the
    model itself returns. None where all are the same.
    """
    found = {key: call for key, call in _numbered(other)}
    first: Seen | None = None
    for key, call in _numbered(plain):
        counterpart = found.get(key)
        last = call is plain[-1]
        if counterpart is None or _apart(call.outputs, counterpart.outputs, tolerance, strict=last):
            if counterpart is None and not last:
                continue
            if counterpart is not None and not _apart(call.inputs, counterpart.inputs, tolerance, strict=False):
                return call
            first = first or call
    return first


def _apart(one: Sequence[Tensor], other: Sequence[Tensor], tolerance: float, strict: bool) -> bool:
    """Whether two lists of tensors differ; strict: also by their number and shapes."""
    if strict and len(one) != len(other):
        return True
    return any(strict if a.shape != b.shape else differ(a, b, tolerance) for a, b in zip(one, other))


def differ(one: Tensor, other: Tensor, tolerance: float = _TOLERANCE) -> bool:
    """Whether two tensors of one shape differ by more than ``tolerance`` times the largest value, or are not finite."""
    if not one.is_floating_point():
        return not torch.equal(one, other)
    largest = float(one.abs().amax()) if one.numel() else 0.0
    if not math.isfinite(largest):  # infinities in both at the same places are as good as equal
        return not torch.equal(torch.nan_to_num(one), torch.nan_to_num(other))
    apart = float((one - other).abs().amax()) if one.numel() else 0.0
    return not apart <= tolerance * max(largest, 1e-12)


@contextlib.contextmanager
def keep_generators() -> Iterator[None]:
    """The generators of the CPU and of this process' GPU are as they were, whatever was drawn inside."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


def tensors_of(output: Any) -> list[Tensor]:
    """The tensors in whatever a forward returned, in order, without their graph."""
    leaves = tree_leaves(dict(output) if isinstance(output, Mapping) else output)
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]


def _numbered(calls: list[Seen]) -> list[tuple[tuple[str, int], Seen]]:
    counts: Counter[str] = Counter()
    found = []
    for call in calls:
        found.append(((call.module, counts[call.module]), call))
        counts[call.module] += 1
    return found


def _copy_on_meta(model: nn.Module) -> tuple[nn.Module, dict[int, Tensor]]:
    """The model without its values, and what stands for each of its tensors, by the id of that one."""
    memo: dict[int, Any] = {}
    moved: dict[int, Tensor] = {}
    parameters = {id(p) for p in model.parameters()}
    for tensor in _tensors(model):
        dtype = torch.float32 if tensor.is_floating_point() and tensor.element_size() < 4 else tensor.dtype
        empty = torch.empty(tensor.shape, dtype=dtype, device="meta")
        if id(tensor) in parameters:
            empty = nn.Parameter(empty, tensor.requires_grad)
        memo[id(tensor)] = moved[id(tensor)] = empty
    return copy.deepcopy(model, memo), moved


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Parameters, buffers and plain attributes, each once."""
    seen: set[int] = set()
    for module in model.modules():
        held = [*module.parameters(recurse=False), *module.buffers(recurse=False), *vars(module).values()]
        for tensor in held:
            if isinstance(tensor, Tensor) and id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor


class _First:
    """The forward of the block that is run for its kind; notes what it returned."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.forward = forward
        self.output: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.output = self.forward(*args, **kwargs)
        return self.output


class _HandOn:
    """The forward of a block that is not run: its input, in the form of what the first of its kind returned."""

    def __init__(self, first: _First) -> None:
        self.first = first

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else next(iter(kwargs.values()))
        leaves, form = tree_flatten(self.first.output)
        index = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)), None)
        if index is None or leaves[index].shape != hidden.shape:
            raise NotImplementedError("blocks of one kind that do not return what they are given")
        leaves[index] = hidden
        return tree_unflatten(leaves, form)


def _hand_on(copied: nn.Module, names: list[str], marks: Mapping[str, Any]) -> set[str]:
    """Let all blocks but the first of each kind hand their input on; their names."""
    blocks = {name: copied.get_submodule(name) for name in names}
    counted = _counters(list(blocks.values()))
    firsts: dict[Any, _First] = {}
    skipped = set()
    for name, block in blocks.items():
        kind = (marks.get(name), _kind(block, counted))
        if kind in firsts:
            block.forward = _HandOn(firsts[kind])
            skipped.add(name)
        else:
            firsts[kind] = block.forward = _First(block.forward)
    return skipped


def _settings(block: nn.Module) -> Iterator[tuple[tuple[str, str], Any]]:
    plain = (str, int, float, bool, type(None))
    for path, module in block.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, plain) and not key.startswith("_"):
                yield (path, key), value


def _counters(blocks: list[nn.Module]) -> set[tuple[str, str]]:
    """Settings that number the blocks: whole numbers, another one in every block."""
    values: dict[tuple[str, str], list[Any]] = {}
    for block in blocks:
        for place, value in _settings(block):
            values.setdefault(place, []).append(value)
    whole = (place for place, found in values.items() if all(type(value) is int for value in found))
    return {place for place in whole if len(values[place]) > 1 and len(set(values[place])) == len(values[place])}


def _kind(block: nn.Module, counted: set[tuple[str, str]]) -> Any:
    shapes = tuple((name, tuple(t.shape)) for name, t in (*block.named_parameters(), *block.named_buffers()))
    classes = tuple(type(module) for module in block.modules())
    return classes, shapes, tuple((place, v) for place, v in _settings(block) if place not in counted)


def _quiet(settings: dict[str, Any]) -> None:
    """Nothing is dropped, skipped or disturbed at random, and no cache is kept, of whatever a module or config says."""
    for key, value in settings.items():
        if isinstance(value, float) and any(word in key for word in ("drop", "jitter")):
            settings[key] = 0.0
    if isinstance(settings.get("p"), float) and "inplace" in settings:  # torch's own dropouts
        settings["p"] = 0.0
    config: Any = settings.get("config")
    if hasattr(config, "model_type") and hasattr(config, "to_dict"):
        if getattr(config, "use_cache", False):
            config.use_cache = False
        _quiet(vars(config))


def _shorten(copied: nn.Module) -> None:
    """Embeddings of words, and heads over them, keep as many rows as a small input has ids."""
    tables = {id(m.weight): m.weight for m in copied.modules() if isinstance(m, nn.Embedding)}
    output: Any = getattr(copied, "get_output_embeddings", None)
    heads = [output()] if callable(output) else []
    rows = {weight.size(0) for weight in tables.values() if weight.size(0) > 32 * _IDS}
    for module in copied.modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 2 or weight.size(0) not in rows:
            continue
        if id(weight) in tables or (module in heads and type(module).forward is nn.Linear.forward):
            short = nn.Parameter(torch.empty(_IDS, weight.size(1), dtype=weight.dtype, device="meta"))
            for owner in copied.modules():
                own = own_parameters(owner)
                own.update({key: short for key, held in own.items() if held is weight})
            if isinstance(getattr(module, "bias", None), nn.Parameter):
                module.bias = nn.Parameter(torch.empty(_IDS, dtype=weight.dtype, device="meta"))


def _compute_buffers(
    model: nn.Module, copied: nn.Module, moved: dict[int, Tensor], skipped: set[str], device: torch.device
) -> None:
    """Give buffers and plain attributes the model's values, or on meta those that the module's initialiser gives."""
    values: dict[int, Tensor] = {}  # by the id of what stands for the tensor
    for tensor in _tensors(model):
        if not isinstance(tensor, nn.Parameter) and not tensor.is_meta:
            values[id(moved[id(tensor)])] = tensor.detach().to(device, moved[id(tensor)].dtype, copy=True)
    for name, module in copied.named_modules():
        if any(name == block or name.startswith(f"{block}.") for block in skipped):
            continue
        buffers, parameters = own_buffers(module), own_parameters(module)
        empty = {key: b for key, b in buffers.items() if b is not None and id(b) not in values}
        if empty:
            for key, buffer in empty.items():
                buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype, device=device)
            held = {key: p for key, p in parameters.items() if p is not None}
            for key, parameter in held.items():
                parameters[key] = nn.Parameter(torch.empty(parameter.shape, device=device), False)
            initialise = initialiser_of(copied, module)
            if initialise is None:
                what = f"{type(module).__name__} has buffers on meta"
                raise NotImplementedError(f"{what} and does not say how they are computed")
            initialise()
            for key, buffer in empty.items():  # an initialiser may put another tensor in its place
                computed = buffers[key]
                values[id(buffer)] = buffer if computed is None else computed
            parameters.update(held)
    for module in copied.modules():
        places: tuple[dict[str, Any], ...] = (own_buffers(module), vars(module))
        for slots in places:
            for key, tensor in slots.items():
                if isinstance(tensor, Tensor) and id(tensor) in values:
                    slots[key] = values[id(tensor)]


def _draw(copied: nn.Module, skipped: set[str], device: torch.device, seed: int) -> None:
    """Random values for every parameter that is run."""
    used = {
        name: p
        for name, p in copied.named_parameters()
        if not any(name.startswith(f"{block}.") for block in skipped) and p.is_meta
    }
    sparing = sum(p.numel() for p in used.values()) > _MOST_ELEMENTS
    tables = {id(m.weight) for m in copied.modules() if isinstance(m, nn.Embedding)}
    shared: dict[Any, Tensor] = {}
    made: dict[int, nn.Parameter] = {}
    for name, parameter in used.items():
        drawn = shared.get(parameter.shape) if sparing else None
        if drawn is None:
            few = sparing and parameter.dim() == 3  # [E, out, in]
            shape = parameter.shape[1:] if few else parameter.shape
            # Scores of a few units, and a residual stream that grows slowly.
            spread = 1.0 if id(parameter) in tables else 1.5 / math.sqrt(shape[-1] if shape else 1)
            drawn = _random(name, shape, spread, seed).to(device)
            shared[parameter.shape] = drawn = drawn.expand(parameter.shape) if few else drawn
        made[id(parameter)] = nn.Parameter(drawn, parameter.requires_grad)
    for module in copied.modules():
        own = own_parameters(module)
        own.update({key: made[id(held)] for key, held in own.items() if held is not None and id(held) in made})


def _random(name: str, shape: torch.Size, spread: float, seed: int) -> Tensor:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    count = math.prod(shape)
    drawn = torch.randn(min(count, _DRAWN_ELEMENTS), generator=generator)
    if count > len(drawn):
        drawn = drawn.repeat(-(-count // len(drawn)))[:count]
    drawn = drawn.view(shape)
    if len(shape) > 1:
        return drawn * spread
    return 1 + 0.2 * drawn if name.endswith("weight") else 0.5 * drawn  # scales of norms; biases, sinks and the like


def _spectrum(model: nn.Module, generator: torch.Generator, device: torch.device) -> dict[str, Any] | None:
    """Of the only length that an encoder of speech with learned positions takes: two frames a position (Whisper)."""
    config: Any = getattr(model, "config", None)
    bins, positions = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if bins is None or positions is None:
        return None
    return {"input_features": torch.randn(_ROWS, bins, 2 * positions, generator=generator).to(device)}


def _pixels(model: nn.Module, generator: torch.Generator, device: torch.device) -> dict[str, Any] | None:
    config: Any = getattr(model, "config", None)
    config = getattr(config, "vision_config", None) or config
    side, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
    if side is None:
        return None
    height, width = (side, side) if isinstance(side, int) else side
    return {"pixel_values": torch.randn(_ROWS, channels, height, width, generator=generator).to(device)}
