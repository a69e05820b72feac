"""Where torch.distributed.checkpoint puts what it plans, and finds it again: one file of tensors a rank, and an index.

torch's own writers keep their index, and whatever is not a tensor, in a pickle, which runs code when it is read.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Callable, Iterator, Mapping

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner, StorageReader, StorageWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from nemo_dist_conf.checkpoint.manifest import INDEX, Manifest, damaged, read_json, write_file
from nemo_dist_conf.checkpoint.rank_state import Stored
from nemo_dist_conf.checkpoint.tensor_file import DTYPES, TensorFile, write_tensors
from nemo_dist_conf.errors import DataError
from nemo_dist_conf.runtime.model.shard_boxes import Box

__all__ = ["FolderReader", "FolderWriter", "Index", "LoadPieces", "SavePieces"]

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SavePieces(DefaultSavePlanner):
    """Plans the saving of a dictionary of pieces; what several ranks hold is written by one."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].at(index.offset)


class LoadPieces(DefaultLoadPlanner):
    """Plans the filling of a dictionary of pieces from whatever parts were saved."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(self, state_dict: Any, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn].at(index.offset)


class Index:
    """Every tensor of a checkpoint, and in which file each part of it lies."""

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        """tensors: name -> dtype, shape, and parts as [file, offsets, sizes] and, of further ones in a file, a name."""
        self.tensors = tensors

    @classmethod
    def read(cls, manifest: Manifest) -> Index:
        """Raises DataError where it is not what was written."""
        content = read_json(manifest.folder, INDEX)
        try:
            for name, entry in content.items():
                wrong = next((file for file, *_ in entry["parts"] if file not in manifest.files), None)
                if wrong is not None:
                    raise damaged(manifest.folder, f"{INDEX} has {name} in {wrong!r}, which is none of its files")
                DTYPES[entry["dtype"]], tuple(entry["shape"])
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            if hasattr(error, "problems"):
                raise
            raise damaged(manifest.folder, f"{INDEX} is not one of ours") from None
        return cls(content)

    @property
    def stored(self) -> dict[str, Stored]:
        return {name: Stored(DTYPES[entry["dtype"]], tuple(entry["shape"])) for name, entry in self.tensors.items()}

    def parts(self, name: str) -> Iterator[tuple[tuple[str, str], Box]]:
        """Where each part of a tensor lies: (file, name in that file), box of the whole."""
        for file, offsets, sizes, *other in self.tensors[name]["parts"]:
            yield (file, other[0] if other else name), Box(tuple(offsets), tuple(sizes))

    def metadata(self) -> Metadata:
        return Metadata({name: _tensor_metadata(entry) for name, entry in self.tensors.items()})


def _tensor_metadata(entry: Mapping[str, Any]) -> TensorStorageMetadata:
    chunks = [ChunkStorageMetadata(torch.Size(part[1]), torch.Size(part[2])) for part in entry["parts"]]
    properties = TensorProperties(dtype=DTYPES[entry["dtype"]])
    return TensorStorageMetadata(properties, torch.Size(entry["shape"]), chunks)


class FolderWriter(StorageWriter):
    """Writes this rank's file into a folder; the coordinator then writes the index and calls ``complete``.

    of_rank: what else this rank has to tell, one text a name, kept in its file; summary: of these, what the coordinator
    is to see. complete(files, summaries): on the coordinator, once every rank's file is on the disk.
    """

    def __init__(
        self,
        folder: Path,
        rank: int,
        of_rank: Mapping[str, str],
        summary: Any,
        complete: Callable[[dict[str, tuple[int, str]], list[Any]], None],
    ) -> None:
        self.folder, self.rank, self.of_rank, self.summary, self.complete = folder, rank, of_rank, summary, complete

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        if is_coordinator:  # before any rank is given a plan, so before any writes
            self.folder.mkdir(parents=True)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        # The largest numbers first, so that each begins at a multiple of its own size.
        items: list[Any] = sorted(plan.items, key=lambda item: -item.tensor_data.properties.dtype.itemsize)
        names = _names_in_file([item.index for item in items])
        layout = {n: (i.tensor_data.properties.dtype, i.tensor_data.chunk.sizes) for n, i in zip(names, items)}
        values: Any = (planner.resolve_data(item) for item in items)
        name = f"rank_{self.rank:05}.safetensors"
        size, mark = write_tensors(self.folder / name, layout, values, self.of_rank)
        results = [WriteResult(item.index, 0, (name, key)) for item, key in zip(items, names)]
        told = WriteResult(MetadataIndex(""), size, (name, mark, self.summary))
        future: Future[list[WriteResult]] = Future()
        future.set_result([*results, told])
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        tensors: dict[str, Any] = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata)
            tensors[name] = {"dtype": _NAMES[entry.properties.dtype], "shape": list(entry.size), "parts": []}
        files: dict[str, tuple[int, str]] = {}
        summaries = []
        for *written, told in results:
            file, mark, summary = told.storage_data
            files[file] = (told.size_in_bytes, mark)
            summaries.append(summary)
            for result in written:
                entry = metadata.state_dict_metadata[result.index.fqn]
                chunk = entry.chunks[result.index.index]  # type: ignore[union-attr, index]
                other = [key for _, key in [result.storage_data] if key != result.index.fqn]
                tensors[result.index.fqn]["parts"].append([file, list(chunk.offsets), list(chunk.sizes), *other])
        files[INDEX] = write_file(self.folder / INDEX, json.dumps(tensors).encode())
        self.complete(files, summaries)


def _names_in_file(indices: list[MetadataIndex]) -> list[str]:
    """The name of each part in a rank's file: the tensor's, and of its further parts also where they begin."""
    seen: set[str] = set()
    found = []
    for index in indices:
        found.append(f"{index.fqn}[{','.join(map(str, index.offset or ()))}]" if index.fqn in seen else index.fqn)
        seen.add(index.fqn)
    return found


class FolderReader(StorageReader):
    """Reads from a checkpoint what a plan asks for, and nothing else of its files."""

    def __init__(self, manifest: Manifest, index: Index) -> None:
        self.folder, self.index = manifest.folder, index
        self._files: dict[str, TensorFile] = {}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return True

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.index.metadata()

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        places: dict[str, list[Any]] = {}
        for item in plan.items:
            name, number = item.storage_index.fqn, item.storage_index.index or 0
            if name not in places:
                places[name] = list(self.index.parts(name))
            place, _ = places[name][number]
            part = self.read(*place)
            for dim, (begin, length) in enumerate(zip(item.storage_offsets, item.lengths)):
                part = part.narrow(dim, begin, length)
            target = planner.resolve_tensor(item)
            target.copy_(part)
            planner.commit_tensor(item, target)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def read(self, file: str, name: str) -> Tensor:
        """The part of a tensor that a file holds, in the file's memory. Raises DataError where there is none."""
        try:
            return self.file(file).read(name)
        except (KeyError, ValueError, TypeError) as error:
            if isinstance(error, DataError):
                raise
            raise damaged(self.folder, f"{file} does not hold {name} ({error})") from None

    def whole(self, name: str) -> Tensor:
        """A tensor of the checkpoint in full, on the CPU, put together from its parts."""
        entry = self.index.tensors[name]
        value = torch.empty(entry["shape"], dtype=DTYPES[entry["dtype"]])
        for place, box in self.index.parts(name):
            box.of(value).copy_(self.read(*place))
        return value

    def file(self, name: str) -> TensorFile:
        """A file of the checkpoint, opened once."""
        if name not in self._files:
            try:
                self._files[name] = TensorFile(self.folder / name)
            except (OSError, ValueError) as error:
                raise damaged(self.folder, f"{name} cannot be read ({error})") from None
        return self._files[name]
