"""A plan of tensor parallelism tried on a small input, against the plain model, before anything is sharded.

A style says what happens to one layer; whether the code between the layers takes what they then give (heads counted
from a config, a scale per head, a fused projection that is cut up again) only a run can tell.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from dataclasses import dataclass
from typing import Any, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from nemo_dist_conf.runtime.model.blocks import Blocks, find_blocks
from nemo_dist_conf.runtime.model.trial import Seen, first_line, keep_generators, observed, parted, small_input, twin
from nemo_dist_conf.runtime.techniques.tensor.layer_rows import LayerRow, find_rows
from nemo_dist_conf.runtime.techniques.tensor.stream import refuse_shared_parameters, sequence_ways
from nemo_dist_conf.runtime.techniques.tensor.styles import apply_styles
from nemo_dist_conf.runtime.torch_inside import tree_leaves

__all__ = ["CannotTry", "Finding", "Trial", "WHOLE_ELEMENTS"]

_TOKENS = 8
#: Up to so many, 1 GiB in float32, a model whose blocks cannot be left out is tried whole.
WHOLE_ELEMENTS = 2**28
#: Of a gradient's largest value, and of a thousandth of the model's largest, below which all is rounding.
_TOLERANCE, _NOISE = 1e-3, 1e-3

#: Styles of modules that return a part of a sum in the shape of the whole.
_SEEN_OTHERWISE = ("moe_identity_expert",)


class CannotTry(Exception):
    """No small input is known that the model takes, or it cannot be copied."""


@dataclass(frozen=True)
class Finding:
    """Where a split model parts from the plain one.

    text: in words. module: the name of the innermost module in which it was seen. gradients: of parameters, in which
    alone it was seen. unsummed: of those, such whose gradient each rank has a part of, which would be right in sum.
    """

    text: str
    module: str
    gradients: tuple[str, ...] = ()
    unsummed: tuple[str, ...] = ()


class Trial:
    """What the plain model gives on a small input, to hold plans against. Every rank of ``mesh`` makes it and asks it.

    Raises CannotTry.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: DeviceMesh,
        example: Mapping[str, Any] | None = None,
        marks: Mapping[str, Any] | None = None,
    ) -> None:
        """model: not wrapped yet, with values or on meta. example: keyword arguments of its forward.

        marks: of blocks that are not alike although the model has them so (``twin``).
        """
        self._model, self._mesh, self._example, self._marks = model, mesh, example, marks or {}
        self._blocks, self._inputs = find_blocks(model), {} if example is None else example
        self._ran: set[str] = set()
        self._trained: list[Seen] | None = None
        why = self._run_plain(example)
        if why is not None and self._blocks and sum(p.numel() for p in model.parameters()) <= WHOLE_ELEMENTS:
            self._blocks = {}  # its forward may reach into its blocks, so that none can be left out
            why = self._run_plain(example)
        if why is not None:
            raise CannotTry(why)

    def _run_plain(self, example: Mapping[str, Any] | None) -> str | None:
        """Run the plain model on the first input that it takes; why it takes none."""
        try:
            plain = self._twin()
        except Exception as error:  # whatever a model's own code raises when it is copied
            return f"it cannot be copied: {first_line(error)}"
        why = "no input is known that its forward takes"
        for self._inputs in _inputs(plain, example, self._mesh.device_type):
            try:
                self._ran = self._run_blocks(plain)
                self._outputs = observed(plain, self._inputs)
                self._gradients = _gradients(plain, self._inputs)
                self._largest = max((float(g.abs().max()) for g in self._gradients.values() if g.numel()), default=0.0)
                trained = _in_training(plain, self._inputs)
                same = trained is not None and parted(self._outputs, trained) is None
                self._trained = self._outputs if same else trained  # kept once
                return None
            except Exception as error:
                why = f"its forward does not run on {_described(self._inputs)}: {first_line(error)}"
        return why

    def finding(self, styles: Mapping[str, Any]) -> Finding | None:
        """Where a model that is split so parts from the plain one, the same on every rank; None: nowhere.

        styles: name of a module -> its style, a name of families/styles.py or a ParallelStyle.
        """
        marks = _marks(styles, self._blocks)
        split = self._twin(marks)
        if self._run_blocks(split) != self._ran:  # blocks of one kind that are split in different ways: each is run
            return Trial(self._model, self._mesh, self._example, marks).finding(styles)
        # Blocks that only hand their input on have no values.
        places = {**dict(split.named_parameters()), **dict(split.named_modules())}
        run = {name: copy.deepcopy(style) for name, style in styles.items() if not _is_empty(places[name])}
        place: list[str] = []
        split_gradients: dict[str, Tensor] = {}
        try:
            apply_styles(split, run, self._mesh)
            kinds = _follow(split, place)
            mine = self._difference(split, split_gradients, {n for n, style in run.items() if style in _SEEN_OTHERWISE})
        except Exception as error:
            module = place[-1] if place else ""
            text = f"it ends in an error in {kinds[module] if place else 'a layer'}: {first_line(error)}"
            mine = Finding(text, module)
        found: list[Finding | None] = [None] * self._mesh.size()
        dist.all_gather_object(found, mine, group=self._mesh.get_group())
        seen = [one for one in found if one is not None]
        if not seen:
            return None
        wrong = sorted({name for one in seen for name in one.gradients})
        if not all(one.gradients for one in seen):
            return next(one for one in seen if not one.gradients)
        return dataclasses.replace(seen[0], gradients=tuple(wrong), unsummed=self._unsummed(wrong, split_gradients))

    def _unsummed(self, names: list[str], gradients: Mapping[str, Tensor]) -> tuple[str, ...]:
        """Those of plain parameters with these names whose gradients are right in sum over the ranks."""
        found = []
        for name in names:
            other = gradients.get(name)
            if other is None:  # a part of nothing
                other = torch.zeros_like(self._gradients[name])
            if not isinstance(other, DTensor):
                other = other.clone()
                dist.all_reduce(other, group=self._mesh.get_group())
                if self._is_same(name, other):
                    found.append(name)
        return tuple(found)

    def rows(self) -> list[LayerRow]:
        """The rows of layers that the plain model goes through (layer_rows.py), the same on every rank."""
        return find_rows(self._twin(), self._inputs)

    def sequence_ways(self, styles: Mapping[str, Any]) -> list[dict[str, Any]]:
        """``sequence_ways`` of stream.py for styles that split features only. Raises CannotFollow."""
        blocks = list(find_blocks(self._model))
        refuse_shared_parameters(self._model, blocks)
        with keep_generators():
            return sequence_ways(self._twin(), blocks, styles, self._inputs)

    def _twin(self, marks: Mapping[str, Any] | None = None) -> nn.Module:
        with keep_generators():
            return twin(
                self._model, self._blocks, self._mesh.device_type, marks=self._marks if marks is None else marks
            )

    def _run_blocks(self, made: nn.Module) -> set[str]:
        """The blocks of a twin that do not only hand their input on."""
        return {name for name in self._blocks if not _is_empty(made.get_submodule(name))}

    def _difference(self, split: nn.Module, gradients: dict[str, Tensor], passed_over: set[str]) -> Finding | None:
        """gradients: takes those of the split model, by parameter. passed_over: modules whose output is a part."""
        plain = [one for one in self._outputs if one.module not in passed_over]
        seen: Seen | None = parted(plain, observed(split, self._inputs, _full))
        if seen is not None:
            return Finding(f"what {seen} returns is not what it returns in the plain model", seen.module)
        gradients |= _gradients(split, self._inputs)
        wrong = []
        for name in self._gradients:
            other = gradients.get(name)
            if isinstance(other, DTensor):
                if any(placement.is_partial() for placement in other.placements):
                    return Finding(f"the gradient of {name} is left in parts on each rank", name.rpartition(".")[0])
                other = other.full_tensor()
            if other is None or not self._is_same(name, other):
                wrong.append(name)
        if wrong:
            text = f"the gradient of {wrong[0]} is not that of the plain model"
            return Finding(text, wrong[0].rpartition(".")[0], tuple(wrong))
        if self._trained is not None:
            plain = [one for one in self._trained if one.module not in passed_over]
            seen = parted(plain, observed(split.train(), self._inputs, _full))
        if seen is None:
            return None
        return Finding(f"what {seen} returns in training is not what it returns in the plain model", seen.module)

    def _is_same(self, name: str, gradient: Tensor) -> bool:
        plain = self._gradients[name]
        allowed = _TOLERANCE * max(float(plain.abs().max()) if plain.numel() else 0.0, _NOISE * self._largest)
        return gradient.shape == plain.shape and (not plain.numel() or float((gradient - plain).abs().max()) <= allowed)


def _marks(styles: Mapping[str, Any], blocks: Blocks) -> dict[str, tuple[tuple[str, Any], ...]]:
    """What is done to the modules of each block, by their names in it."""
    inside: dict[str, list[tuple[str, Any]]] = {name: [] for name in blocks}
    for name, style in styles.items():
        block = next((block for block in blocks if name == block or name.startswith(f"{block}.")), None)
        if block is not None:
            inside[block].append((name[len(block) :], style if isinstance(style, str) else id(style)))
    return {name: tuple(sorted(found, key=str)) for name, found in inside.items()}


def _inputs(model: nn.Module, example: Mapping[str, Any] | None, device: str) -> Iterator[Mapping[str, Any]]:
    """What the model may take, the likeliest first: the example alone, else ids, else vectors for its first layer."""
    known = small_input(model, _TOKENS, example, device)
    if known is not None:
        yield known
    layer = next((module for module in model.modules() if isinstance(module, nn.Linear)), None)
    taken = inspect.signature(model.forward).parameters.values()
    first = next((p.name for p in taken if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)), None)
    if example is None and layer is not None and first is not None:
        generator = torch.Generator().manual_seed(0)
        for shape in ((2, _TOKENS, layer.in_features), (2, layer.in_features)):
            yield {first: torch.randn(shape, generator=generator).to(device)}


def _described(inputs: Mapping[str, Any]) -> str:
    shown = [f"{k} {list(v.shape)} {str(v.dtype)[6:]}" for k, v in inputs.items() if isinstance(v, Tensor)]
    return ", ".join(shown) or "nothing"


def _gradients(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Gradients, by parameter, of a sum over all outputs in which each element has a weight of its own."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        return {}
    output = model(**inputs)
    generator, total = torch.Generator().manual_seed(1), None
    for leaf in tree_leaves(dict(output) if isinstance(output, Mapping) else output):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            weighted = (leaf * torch.randn(leaf.shape, generator=generator).to(leaf.device)).sum()
            total = weighted if total is None else total + weighted
    if total is None:
        return {}
    total.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def _in_training(model: nn.Module, inputs: Mapping[str, Any]) -> list[Seen] | None:
    """``observed`` in training mode; None of a model that draws random numbers there, or does not run."""
    runs = []
    with keep_generators():
        for seed in range(2):
            torch.manual_seed(seed)
            try:
                runs.append(observed(model.train(), inputs))
            except Exception:  # one of a batch's statistics, of one value a channel for instance
                return None
            finally:
                model.eval()
    return runs[0] if parted(runs[0], runs[1]) is None else None


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _follow(model: nn.Module, place: list[str]) -> dict[str, str]:
    """Keep in ``place`` the modules whose forward has begun and not ended, the innermost last; how each is shown."""
    shown = {name: f"{name or 'the model'} ({type(module).__name__})" for name, module in model.named_modules()}

    def leave(*_: Any) -> None:
        place.pop()

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: place.append(name), prepend=True)
        module.register_forward_hook(leave)
    return shown


def _is_empty(place: nn.Module | nn.Parameter) -> bool:
    return any(p.is_meta for p in (place.parameters() if isinstance(place, nn.Module) else [place]))
