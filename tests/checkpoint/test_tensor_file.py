"""Files of tensors: what the package safetensors reads is what was written, and the other way round."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_dist_conf.checkpoint.tensor_file import DTYPES, TensorFile, tensor_of, write_tensors

TENSORS = {
    **{name: torch.arange(6).reshape(2, 3).to(dtype) for name, dtype in DTYPES.items()},
    "number": torch.tensor(3.5),
    "nothing": torch.empty(0, 4),
    "turned": torch.arange(6.0).reshape(2, 3).t(),
}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tolist() == other.tolist()


def test_safetensors_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    layout = {name: (value.dtype, value.shape) for name, value in TENSORS.items()}
    size, mark = write_tensors(path, layout, TENSORS.values(), {"told": "text"})
    assert (size, mark) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    for read in (load_file(path), {name: TensorFile(path).read(name) for name in TENSORS}):
        assert all(same(read[name], value) for name, value in TENSORS.items())
    assert TensorFile(path).metadata == {"told": "text"}


def test_reads_what_safetensors_writes(tmp_path: Path) -> None:
    path = tmp_path / "one.safetensors"
    save_file({name: value.contiguous() for name, value in TENSORS.items()}, path)
    assert all(same(TensorFile(path).read(name), value) for name, value in TENSORS.items())


def test_a_file_is_never_written_over(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("mine")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "one", {}, [], {})
    assert (tmp_path / "one").read_text() == "mine"


@pytest.mark.parametrize("content", [b"\0" * 4 + b"x" * 20, b"\xff" * 40, (2).to_bytes(8, "little") + b"[]"])
def test_what_is_no_such_file_is_told(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "one").write_bytes(content)
    with pytest.raises(ValueError):
        TensorFile(tmp_path / "one")


def test_a_tensor_that_lies_outside_of_its_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "one"
    write_tensors(path, {"a": (torch.float32, (4,))}, [torch.ones(4)], {})
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="does not lie in its file"):
        TensorFile(path).read("a")
    assert tensor_of(bytearray(b"\1\2"), "U8", [2]).tolist() == [1, 2]
