"""Weights from a local transformers checkpoint folder, each rank reading only its own shards."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from nemo_dist_conf.errors import DataError, Problem

__all__ = ["check_weights", "load_weights", "read_shapes"]

log = logging.getLogger(__name__)

_KEY = "model.name_or_path"


def read_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
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
                f"{folder} holds no safetensors weights{also}",
                f"{_KEY}={folder}",
                "a folder with config.json and *.safetensors",
                "model.save_pretrained(folder), then " + f"{_KEY}=folder",
            )
        )
    listed = _check_index(folder, {path.name for path in files})
    files = [path for path in files if listed is None or path.name in listed]
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})
        except (SafetensorError, OSError) as error:
            what = f"{path} cannot be read: {str(error).splitlines()[0]}"
            raise DataError(
                Problem(what, f"{_KEY}={folder}", "complete safetensors files", "copy the file again")
            ) from None
    return shapes


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
        raise DataError(Problem(what, f"{_KEY}={folder}", "a complete checkpoint folder", "copy the folder again"))
    return named


class _ListedFiles(dcp.HuggingFaceStorageReader):
    """Reads only the files that the index lists: torch's reader takes every *.safetensors, the last one winning."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        present = sorted(folder.glob("*.safetensors"))
        listed = _check_index(folder, {path.name for path in present})
        files = [str(path) for path in present if listed is None or path.name in listed]
        self.fs.ls = lambda path: files  # type: ignore[method-assign]


def check_weights(model: nn.Module, folder: Path, ties: list[list[str]]) -> None:
    """Raise DataError unless the folder's tensors are the model's, by name and shape. ``model`` may be on meta."""
    shapes = read_shapes(folder)
    optional = {name for group in ties for name in group[1:]}
    wanted = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    missing = sorted(name for name in wanted if name not in shapes and name not in optional)
    extra = sorted(name for name in shapes if name not in wanted)
    wrong = sorted(n for n in wanted if n in shapes and shapes[n] != wanted[n])
    if not (missing or extra or wrong):
        return
    parts = []
    kinds = (("missing in the folder", missing), ("unknown to the model", extra), ("of other shape", wrong))
    for title, names in kinds:
        if names:
            parts.append(f"{len(names)} {title} ({', '.join(names[:2])}{', ...' if len(names) > 2 else ''})")
    raise DataError(
        Problem(
            f"the weights in {folder} are not those of {type(model).__name__}: {'; '.join(parts)}",
            f"{_KEY}={folder}",
            "weights and config.json of one and the same model, without overrides of its sizes",
            "model.save_pretrained(folder, save_original_format=False)",
        )
    )


def load_weights(model: nn.Module, folder: Path, ties: list[list[str]]) -> None:
    """Fill a sharded or whole model from the folder; every rank reads the slices it holds and no more.

    Source: torch.distributed.checkpoint.HuggingFaceStorageReader.
    """
    optional = {name for group in ties for name in group[1:]}
    state: dict[str, Any] = {name: value for name, value in model.state_dict().items() if name not in optional}
    with torch.no_grad():
        dcp.load(state, storage_reader=_ListedFiles(folder))
    log.info("weights read from %s", folder)
