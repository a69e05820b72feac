"""Files of tensors in the safetensors format, written as a stream and read in place.

The package safetensors wants all of a file's tensors as one dictionary in memory, and another pass to hash what it
wrote; here a tensor at a time goes from its own memory to the disk, and is hashed on its way.
Source: the format's description, https://github.com/huggingface/safetensors
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import mmap
import os
from pathlib import Path
from typing import Any, Iterable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["DTYPES", "TensorFile", "bytes_of", "tensor_of", "write_tensors"]

#: Name in the format -> dtype.
DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGN_BYTES = 64
_CHUNK_BYTES = 1 << 24


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor: its own memory where it is whole and on the CPU, else a copy's."""
    held = tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()
    size = held.numel() * held.element_size()
    if not size:
        return memoryview(b"")
    if not held.data_ptr():
        raise AssertionError(f"a {type(tensor).__name__} has no memory of its own to read")
    array = (ctypes.c_ubyte * size).from_address(held.data_ptr())
    array.held = held  # type: ignore[attr-defined]  # what the address points into
    return memoryview(array).cast("B")


def tensor_of(data: Any, dtype: str, shape: Sequence[int], offset: int = 0) -> Tensor:
    """A tensor [shape] over bytes from ``offset`` on, which it shares."""
    kind = DTYPES[dtype]
    if not math.prod(shape):
        return torch.empty(shape, dtype=kind)
    return torch.frombuffer(data, dtype=kind, count=math.prod(shape), offset=offset).view(list(shape))


def write_tensors(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, Sequence[int]]],
    tensors: Iterable[Tensor],
    metadata: Mapping[str, str],
) -> tuple[int, str]:
    """Write a new file; (size [bytes], SHA-256) of it. It is on the disk when this returns.

    layout: name -> dtype and shape of every tensor. tensors: their values, in that order, asked for one by one.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    begin = 0
    for name, (dtype, shape) in layout.items():
        end = begin + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        begin = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-(8 + len(head)) % _ALIGN_BYTES)
    digest, size = hashlib.sha256(), 8 + len(head) + begin
    with open(path, "xb", buffering=0) as file:
        _put(file, digest, memoryview(len(head).to_bytes(8, "little") + head))
        for tensor in tensors:
            _put(file, digest, bytes_of(tensor))
        os.fsync(file.fileno())
    return size, digest.hexdigest()


def _put(file: Any, digest: Any, data: memoryview) -> None:
    for begin in range(0, len(data), _CHUNK_BYTES):
        chunk = data[begin : begin + _CHUNK_BYTES]
        digest.update(chunk)
        while len(chunk):
            chunk = chunk[file.write(chunk) :]


class TensorFile:
    """A file of tensors, mapped into memory: only what is read of it is loaded.

    Raises ValueError where it is none.
    """

    def __init__(self, path: Path) -> None:
        with open(path, "rb") as file:
            self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # torch wants memory that can be written
        length = int.from_bytes(self._data[:8], "little")
        if not 2 <= length <= len(self._data) - 8:
            raise ValueError(f"{path.name} has no header")
        header = json.loads(self._data[8 : 8 + length])
        if not isinstance(header, dict):
            raise ValueError(f"{path.name} has no header")
        self.metadata: dict[str, str] = header.pop("__metadata__", {})
        self._entries: dict[str, Any] = header
        self._begin = 8 + length

    def read(self, name: str) -> Tensor:
        """A tensor of the file, which stays there until it is read."""
        entry = self._entries[name]
        begin, end = entry["data_offsets"]
        size = math.prod(entry["shape"]) * DTYPES[entry["dtype"]].itemsize
        if end - begin != size or begin < 0 or self._begin + end > len(self._data):
            raise ValueError(f"{name} does not lie in its file")
        return tensor_of(self._data, entry["dtype"], entry["shape"], self._begin + begin)
