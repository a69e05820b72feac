"""Which linear layers of a model stand in a row, so that the ranks can share what lies between: seen in one run.

A row is one or several layers that open it and one that closes it (query, key and value before an attention's output;
gate and up before down), where what the first ones give reaches nothing but the last, on the way through further layers
maybe. The graph that autograd keeps of a run tells it, whatever the layers are called.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Mapping

import torch
from torch import Tensor, nn

from nemo_dist_conf.runtime.techniques.tensor.layer_kinds import layer_kind

__all__ = ["LayerRow", "find_rows"]


@dataclass(frozen=True)
class LayerRow:
    """Names of modules: those that open it, the one that closes it.

    inner: further layers on the way from the first to the last.
    between: other modules whose parameters are used on the way, a norm of heads for instance.
    tables: embeddings that are used for nothing but closing layers: a bias for each head by distance.
    """

    opening: tuple[str, ...]
    closing: str
    inner: tuple[str, ...] = ()
    between: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()


def find_rows(model: nn.Module, inputs: Mapping[str, Any]) -> list[LayerRow]:
    """The rows that a run of the model goes through, in the order in which they are closed; no layer is in two.

    model: with values; it is run once, with gradients, on ``inputs``, the keyword arguments of its forward.
    """
    layers = _Layers()
    handles = []
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point()]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        for name, module in model.named_modules():
            if layer_kind(module):
                handles.append(module.register_forward_hook(layers.watch(name, layer_kind(module) == "Embedding")))
        with torch.enable_grad():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(False)
    return layers.rows(_owners(model))


class _Layers:
    """The calls of layers in one run."""

    def __init__(self) -> None:
        self._made: dict[Any, str] = {}  # node of the graph -> the layer whose output it made; keeps the nodes alive
        self._taken: list[tuple[str, Any]] = []  # (layer, the node that made its input), in the order of calls
        self._tables: set[str] = set()

    def watch(self, name: str, is_table: bool) -> Any:
        def hook(module: nn.Module, args: tuple, output: Any) -> None:
            if not isinstance(output, Tensor) or output.grad_fn is None:
                return
            self._made[output.grad_fn] = name
            if is_table:
                self._tables.add(name)
            elif args and isinstance(args[0], Tensor) and args[0].grad_fn is not None:
                self._taken.append((name, args[0].grad_fn))

        return hook

    def rows(self, owners: Mapping[int, str]) -> list[LayerRow]:
        """owners: id of a parameter -> the module that holds it."""
        before: dict[str, set[str]] = {}
        between: dict[str, list[str]] = {}
        for name, node in self._taken:
            layers, parameters = self._reached(node)
            before.setdefault(name, set()).update(layers)
            passed = [owners[id(parameter)] for parameter in parameters if id(parameter) in owners]
            between[name] = list(dict.fromkeys([*between.get(name, ()), *passed]))
        uses: dict[str, set[str]] = {}
        for name, layers in before.items():
            for layer in layers:
                uses.setdefault(layer, set()).add(name)
        order = {name: place for place, name in enumerate(dict.fromkeys(self._made.values()))}
        rows = []
        for name, layers in before.items():
            way = sorted(layers - self._tables, key=order.__getitem__)
            tables = sorted(layers & self._tables)
            if name in layers or not all(uses[layer] <= {name, *way} for layer in way):
                continue
            opening = [layer for layer in way if before.get(layer, set()).isdisjoint(way)]
            inner = [layer for layer in way if layer not in opening]
            if opening:
                rows.append(LayerRow(tuple(opening), name, tuple(inner), tuple(between[name]), tuple(tables)))
        # What a table of words gives goes on to other layers, too.
        closing = {row.closing for row in rows}
        rows = [row for row in rows if all(uses[table] <= closing for table in row.tables)]
        # A chain of three is two rows with one layer in both: the one that more layers open goes first.
        kept: dict[str, LayerRow] = {}
        for row in sorted(rows, key=lambda row: -len(row.opening)):
            members = (*row.opening, *row.inner, row.closing)
            if kept.keys().isdisjoint(members):
                kept |= dict.fromkeys(members, row)
        return [row for row in rows if kept.get(row.closing) is row]

    def _reached(self, node: Any) -> tuple[set[str], list[Tensor]]:
        """The layers whose outputs a node was made of, no further, and the parameters met on the way."""
        layers: set[str] = set()
        parameters: list[Tensor] = []
        seen, waiting = {node}, [node]
        while waiting:
            node = waiting.pop()
            if node in self._made:
                layers.add(self._made[node])
                continue
            if hasattr(node, "variable"):
                parameters.append(node.variable)
            for other, _ in node.next_functions:
                if other is not None and other not in seen:
                    seen.add(other)
                    waiting.append(other)
        return layers, parameters


def _owners(model: nn.Module) -> dict[int, str]:
    return {id(p): name for name, module in model.named_modules() for p in module.parameters(recurse=False)}
