"""A checkpoint that was changed is named before anything is loaded, and the one before it is offered."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable

import pytest

from nemo_dist_conf.checkpoint import load, save
from nemo_dist_conf.errors import DataError, TrainingError
from tests.checkpoint.small import bits, make, saved_twice, train

TENSORS = "rank_00000.safetensors"


def rewrite(folder: Path, name: str, change: Callable[[Any], None]) -> None:
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def signed(folder: Path, change: Callable[[Any], None]) -> None:
    """Change the manifest as somebody who means to: its own checksum fits again."""

    def resign(content: Any) -> None:
        content.pop("sha256")
        change(content)
        content["sha256"] = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    rewrite(folder, "manifest.json", resign)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size - 1)


def swap(newer: Path, older: Path) -> None:
    shutil.copy(older / TENSORS, newer / TENSORS)


def point_to(newer: Path, name: str) -> None:
    def change(content: Any) -> None:
        content["files"][name] = content["files"].pop(TENSORS)

    signed(newer, change)


def link(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


#: name -> (what is done to (newer, older), what the error says)
DAMAGES: dict[str, tuple[Callable[[Path, Path], Any], str]] = {
    "truncated": (lambda new, old: truncate(new / TENSORS), f"{TENSORS} has .* bytes instead of"),
    "a bit of a tensor": (lambda new, old: flip(new / TENSORS, -5), f"{TENSORS} was changed"),
    "a bit of a header": (lambda new, old: flip(new / TENSORS, 20), f"{TENSORS} was changed"),
    "a bit of the index": (lambda new, old: flip(new / "index.json", 30), "index.json"),
    "a bit of the state": (lambda new, old: flip(new / "state.json", 12), "state.json"),
    "a bit of the manifest": (lambda new, old: flip(new / "manifest.json", 18), "manifest.json"),
    "a missing file": (lambda new, old: (new / TENSORS).unlink(), f"{TENSORS} is missing"),
    "a missing manifest": (lambda new, old: (new / "manifest.json").unlink(), "manifest.json is missing"),
    "an empty manifest": (lambda new, old: (new / "manifest.json").write_text(""), "manifest.json cannot be read"),
    "another manifest's": (lambda new, old: shutil.copy(old / "manifest.json", new), "changed|bytes instead of"),
    "another step's file": (swap, f"{TENSORS} was changed"),
    "a manifest that leads out": (lambda new, old: point_to(new, "../secret"), "'../secret', which is not a file in"),
    "a link that leads out": (lambda new, old: link(new / TENSORS), "is a link out of it"),
    "another format": (lambda new, old: signed(new, lambda c: c.update(format=9)), "format 9, this version reads 2"),
    "not a manifest": (lambda new, old: (new / "manifest.json").write_text("[1]"), "not one of ours"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damage_is_named_and_the_older_one_offered(tmp_path: Path, kind: str) -> None:
    older, newer = saved_twice(tmp_path)
    damage, says = DAMAGES[kind]
    damage(newer, older)
    model, optimizer = make()
    before = bits(model)
    with pytest.raises(DataError, match=says) as refused:
        load(tmp_path, model, optimizer)
    assert refused.value.type == f"checkpoint.resume={older}" and str(newer) in refused.value.what
    assert bits(model) == before and not optimizer.state
    assert load(refused.value.type.partition("=")[2], model, optimizer).step == 2


def test_an_index_that_leads_out_is_refused(tmp_path: Path) -> None:
    """Also where whoever wrote it has made every checksum fit."""
    _, newer = saved_twice(tmp_path)

    def lead_out(content: Any) -> None:
        content["model.0.weight"]["parts"][0][0] = "../../secret.safetensors"

    rewrite(newer, "index.json", lead_out)
    data = (newer / "index.json").read_bytes()
    mark = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    signed(newer, lambda content: content["files"].update({"index.json": mark}))
    with pytest.raises(DataError, match="'../../secret.safetensors', which is none of its files"):
        load(newer, make()[0])


def test_a_pickle_in_the_place_of_a_file_is_never_opened(tmp_path: Path) -> None:
    """Even with checksums that fit, what is read is JSON and raw numbers."""

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    for name in (TENSORS, "state.json", "index.json", "config.yaml"):
        root = tmp_path / name
        model, _ = make()
        folder = save(root / "step_00000001", model, config={"seed": 1})
        (folder / name).write_bytes(pickle.dumps(Evil()))
        data = (folder / name).read_bytes()
        mark = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        signed(folder, lambda content: content["files"].update({name: mark}))
        with pytest.raises(Exception) as refused:
            load(folder, model)
        assert isinstance(refused.value, (DataError, TrainingError)), refused.value
    assert not (tmp_path / "ran").exists()


FILL = """
import sys, pathlib, torch
from nemo_dist_conf.checkpoint import save
from nemo_dist_conf.errors import TrainingError
from tests.checkpoint.small import make, train
import resource, signal
model, optimizer = make(width=100_000)
root = pathlib.Path(sys.argv[1])
older = save(root / "step_00000001", model, step=1)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
try:
    save(root / "step_00000002", model, step=2)
except TrainingError as error:
    print(error)
"""


def test_no_room_left_is_told_and_the_older_one_kept(tmp_path: Path) -> None:
    """A limit on the size of a file, in a process of its own, fails in the same place as a full disk."""
    command = [sys.executable, "-c", FILL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert "step_00000002 could not be written: File too large (rank 0)" in done.stdout, done.stderr
    assert f"kept    {tmp_path / 'step_00000001'}" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert load(tmp_path, make(width=100_000)[0]).step == 1


FULL = """
mount -t tmpfs -o size=3m tmpfs {root} || exit 77
exec {python} -c '
import pathlib, sys
from nemo_dist_conf.checkpoint import load, save
from nemo_dist_conf.errors import TrainingError
from tests.checkpoint.small import make
model, _ = make(width=50_000)
root = pathlib.Path("{root}")
save(root / "step_00000001", model, step=1)
try:
    save(root / "step_00000002", model, step=2)
except TrainingError as error:
    print(error)
print([path.name for path in root.iterdir()], load(root, model).step)
'
"""


def test_a_full_disk_is_told_and_the_older_one_kept(tmp_path: Path) -> None:
    """A file system of 3 MB, mounted in a namespace of its own."""
    root = tmp_path / "full"
    root.mkdir()
    script = FULL.format(root=root, python=sys.executable)
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", script]
    if shutil.which("unshare") is None:
        pytest.skip("no unshare to mount a small file system with")
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    if done.returncode in (1, 77) and "could not" not in done.stdout:
        pytest.skip(f"this machine does not let a test mount a file system: {done.stderr.strip()[:100]}")
    assert "could not be written: No space left on device (rank 0)" in done.stdout, done.stderr
    assert "['step_00000001'] 1" in done.stdout


def test_a_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """A file stands where the folder should be made: root may write everywhere else."""
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="could not be written: Not a directory"):
        save(tmp_path / "file" / "one", make()[0])


def test_training_goes_on_from_the_older_one(tmp_path: Path) -> None:
    """The offer is good: the steps after it are made again, to the same bits."""
    older, newer = saved_twice(tmp_path)
    model, optimizer = make()
    load(newer, model, optimizer)
    again, others = make()
    load(older, again, others)
    train(again, others, 2, 4)
    assert bits(again) == bits(model)
