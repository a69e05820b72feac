"""Weights from a local transformers checkpoint folder, each rank reading only its own shards."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Mapping

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from nemo_dist_conf.errors import DataError, Problem
from nemo_dist_conf.runtime.model.adapters import base_name, base_state, is_adapted, set_magnitudes
from nemo_dist_conf.runtime.model.shard_boxes import boxes_of, local_values
from nemo_dist_conf.runtime.model.stored_names import Part, stored_parts
from nemo_dist_conf.wording import assigned

__all__ = ["check_weights", "load_weights"]

log = logging.getLogger(__name__)

_KEY = "model.name_or_path"


def _read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the folder's safetensors files, from their headers alone.

    Raises DataError for a folder without safetensors, an incomplete index, or a damaged file.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickled = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt")))
        also = f" ({', '.join(pickled[:2])} would have to be unpickled, which is unsafe)" if pickled else ""
        raise DataError(
            Problem(
                what=f"{folder} holds no safetensors weights{also}",
                asked=assigned(_KEY, folder),
                allowed="a folder with config.json and *.safetensors",
                instead="model.save_pretrained(folder), then " + f"{_KEY}=folder",
            )
        )
    shapes: dict[str, tuple[int, ...]] = {}
    for path in _listed_files(folder):
        try:
            with safe_open(path, framework="pt") as file:
                shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})
        except (SafetensorError, OSError) as error:
            what = f"{path} cannot be read: {str(error).splitlines()[0]}"
            raise DataError(
                Problem(
                    what=what,
                    asked=assigned(_KEY, folder),
                    allowed="complete safetensors files",
                    instead="copy the file again",
                )
            ) from None
    return shapes


def _listed_files(folder: Path) -> list[Path]:
    """The folder's files; where it has an index, those that this names."""
    present = sorted(folder.glob("*.safetensors"))
    listed = _check_index(folder, {path.name for path in present})
    return [path for path in present if listed is None or path.name in listed]


def _places(folder: Path) -> dict[str, Path]:
    """Name -> file of every tensor."""
    from safetensors import safe_open

    places: dict[str, Path] = {}
    for path in _listed_files(folder):
        with safe_open(path, framework="pt") as file:
            places.update(dict.fromkeys(file.keys(), path))
    return places


def _check_index(folder: Path, present: set[str]) -> set[str] | None:
    """Names of the files that the folder's index lists, all of them present; None where it has no index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return None
    try:
        named = set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError, TypeError):
        named = {"a readable index"}
    missing = sorted(named - present)
    if missing:
        what = f"{folder} lacks {', '.join(missing[:3])}, which its index names"
        raise DataError(
            Problem(
                what=what,
                asked=assigned(_KEY, folder),
                allowed="a complete checkpoint folder",
                instead="copy the folder again",
            )
        )
    return named


class _ListedFiles(dcp.HuggingFaceStorageReader):
    """Reads only the files that the index lists: torch's reader takes every *.safetensors, the last one winning."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        files = [str(path) for path in _listed_files(folder)]
        self.fs.ls = lambda path: files  # type: ignore[method-assign]


def check_weights(model: nn.Module, folder: Path, ties: list[list[str]]) -> dict[str, Part]:
    """Raise DataError unless the folder's tensors are the model's, by name and shape. ``model`` may be on meta.

    Returns what each tensor of the folder is, where it is stored otherwise than the model holds it; else {}.
    """
    shapes = _read_shapes(folder)
    optional = {name for group in _of_base(model, ties) for name in group[1:]}
    wanted = {name: tuple(values[0].shape) for name, values in base_state(model, model.state_dict()).items()}
    parts = stored_parts(model)
    if shapes.keys() & (parts.keys() - wanted.keys()):
        wanted = {name: part.shape for name, part in parts.items()}
    else:
        parts = {}
    missing = sorted(name for name in wanted if name not in shapes and name not in optional)
    extra = sorted(name for name in shapes if name not in wanted)
    wrong = sorted(n for n in wanted if n in shapes and shapes[n] != wanted[n])
    if not (missing or extra or wrong):
        return parts
    found = []
    kinds = (("missing in the folder", missing), ("unknown to the model", extra), ("of other shape", wrong))
    for title, names in kinds:
        if names:
            found.append(f"{len(names)} {title} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})")
    raise DataError(
        Problem(
            what=f"the weights in {folder} are not those of {type(model).__name__}: {'; '.join(found)}",
            asked=assigned(_KEY, folder),
            allowed="weights and config.json of one and the same model, without overrides of its sizes",
            instead="a folder written by model.save_pretrained",
        )
    )


def load_weights(model: nn.Module, folder: Path, ties: list[list[str]], parts: Mapping[str, Part]) -> None:
    """Fill a sharded or whole model, or a stage of it, from the folder; every rank reads what it holds and no more.

    parts: as ``check_weights`` returned them for the whole model. What an adapter derives from weights is derived anew.
    Source: torch.distributed.checkpoint.HuggingFaceStorageReader.
    """
    first = {name: group[0] for group in _of_base(model, ties) for name in group}
    held: dict[str, Any] = {}
    copies: list[tuple[Tensor, Tensor]] = []
    # A pipeline stage may hold another than the first of tied ones.
    for name, (value, *others) in base_state(model, model.state_dict()).items():
        held.setdefault(first.get(name, name), value)
        copies += [(value, other) for other in others]
    stored = {part.parameter: name for name, part in parts.items() if part.expert is None}
    apart = {part.parameter for part in parts.values() if part.expert is not None}
    with torch.no_grad():
        whole = {stored.get(name, name): value for name, value in held.items() if name not in apart}
        several = {name: value for name, value in whole.items() if len(boxes_of(value)) > 1}
        dcp.load({n: v for n, v in whole.items() if n not in several}, storage_reader=_ListedFiles(folder))
        if several:
            _load_boxes(several, folder)
        if apart:
            _load_experts({name: held[name] for name in held if name in apart}, folder, parts)
        for value, other in copies:  # laid out alike
            local_values(other).copy_(local_values(value))
    set_magnitudes(model)
    log.info("weights read from %s", folder)


def _of_base(model: nn.Module, ties: list[list[str]]) -> list[list[str]]:
    """Groups of tied names as the base has them."""
    if not is_adapted(model):
        return ties
    groups = [list(dict.fromkeys(filter(None, map(base_name, group)))) for group in ties]
    return [group for group in groups if len(group) > 1]


def _load_boxes(held: Mapping[str, Tensor], folder: Path) -> None:
    """Fill parameters of which this rank holds several boxes, which torch's own reader takes for one."""
    from safetensors import safe_open

    places = _places(folder)
    for name, value in held.items():
        with safe_open(places[name], framework="pt") as file:
            for one in boxes_of(value):
                read = file.get_slice(name)[tuple(slice(b, b + s) for b, s in zip(one.box.offsets, one.box.sizes))]
                one.here.of(local_values(value)).copy_(read)


def _load_experts(held: Mapping[str, Tensor], folder: Path, parts: Mapping[str, Part]) -> None:
    """Fill parameters [experts, out, in] from tensors of one expert each.

    They may be sharded along their experts and their rows.
    """
    from safetensors import safe_open

    boxes = {name: boxes_of(value) for name, value in held.items()}
    by_file: dict[Path, list[str]] = {}
    for stored, path in _places(folder).items():
        if stored in parts and parts[stored].parameter in boxes:
            by_file.setdefault(path, []).append(stored)
    for path, names in by_file.items():
        with safe_open(path, framework="pt") as file:
            for stored in names:
                part, value = parts[stored], held[parts[stored].parameter]
                for one in boxes[part.parameter]:
                    experts, rows, *columns = [slice(b, b + s) for b, s in zip(one.box.offsets, one.box.sizes)]
                    first, last = max(part.first, rows.start), min(part.first + part.rows, rows.stop)
                    if part.expert is None or not experts.start <= part.expert < experts.stop or first >= last:
                        continue
                    read = file.get_slice(stored)[(slice(first - part.first, last - part.first), *columns)]
                    target = one.here.of(local_values(value))[part.expert - experts.start]
                    target[first - rows.start : last - rows.start] = read.to(target)
