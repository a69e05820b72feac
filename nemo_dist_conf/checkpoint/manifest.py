"""What is on disk: the folder of a checkpoint, its manifest, and which of several is meant. No torch.

checkpoints/
    step_00000100/
        manifest.json            sizes and hashes of all other files; written last
        index.json               every tensor: dtype, shape, and which file holds which part of it
        state.json               step, the optimizer's settings, the caller's own objects
        config.yaml              the composed config
        rank_00000.safetensors   what this rank wrote
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Mapping, Sequence

from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from nemo_dist_conf.errors import DataError, Problem
from nemo_dist_conf.wording import typed_path

__all__ = [
    "CONFIG",
    "INDEX",
    "MANIFEST",
    "Manifest",
    "ROOT",
    "STATE",
    "anew",
    "checkpoints_in",
    "damaged",
    "elsewhere",
    "find_checkpoint",
    "read_json",
    "read_manifest",
    "step_folder",
    "write_file",
    "write_manifest",
    "wrong_bytes",
    "wrong_sizes",
]

#: Name of a run's folder of checkpoints, inside its output folder.
ROOT = "checkpoints"
MANIFEST, INDEX, STATE, CONFIG = "manifest.json", "index.json", "state.json", "config.yaml"

_FORMAT = 2
_STEP = re.compile(r"step_(\d{8,})")
_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint says of itself.

    step: number of steps that were made. run: the same for all checkpoints of one run, also over restarts.
    origin: the checkpoint, of another run or an earlier step, that this run was told to go on from.
    world_size, layout: of the run that wrote it. files: name -> (size [bytes], SHA-256).
    """

    folder: Path
    step: int
    run: str
    origin: str | None
    world_size: int
    layout: str
    files: Mapping[str, tuple[int, str]]


def step_folder(root: Path, step: int) -> Path:
    return root / f"step_{step:08}"


def checkpoints_in(root: Path) -> list[Path]:
    """Folders of checkpoints, the newest first. What is being written, or was set aside, has another name."""
    found = [(int(match[1]), path) for path in _entries(root) if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _entries(root: Path) -> list[Path]:
    try:
        return [path for path in root.iterdir() if path.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []


def find_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The checkpoint that a folder means: itself, or the newest one in it, or in its folder ``checkpoints``."""
    path = Path(folder).expanduser()
    if (path / MANIFEST).is_file() or _STEP.fullmatch(path.name):
        return path if path.is_dir() else None
    found = checkpoints_in(path) or checkpoints_in(path / ROOT)
    return found[0] if found else None


# ------------------------------------------------------------------------------------------------------- manifest


def write_manifest(
    folder: Path,
    *,
    step: int,
    run: str,
    origin: str | None,
    world_size: int,
    layout: str,
    files: Mapping[str, tuple[int, str]],
    more: Mapping[str, Any],
) -> None:
    """Write the manifest; more: facts for a reader, such as versions."""
    content = {
        "format": _FORMAT,
        "step": step,
        "run": run,
        "origin": origin,
        "world_size": world_size,
        "layout": layout,
        **more,
        "files": {name: {"bytes": size, "sha256": mark} for name, (size, mark) in sorted(files.items())},
    }
    content["sha256"] = _mark_of(content)
    write_file(folder / MANIFEST, json.dumps(content, indent=1).encode())


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint. Raises DataError where it is missing, changed, or names a file elsewhere."""
    content = read_json(folder, MANIFEST)
    try:
        mark = content.pop("sha256")
        if content["format"] != _FORMAT:
            raise damaged(folder, f"{MANIFEST} is of format {content['format']}, this version reads {_FORMAT}")
        if mark != _mark_of(content):
            raise damaged(folder, f"{MANIFEST} was changed after it was written")
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in content["files"].items()}
        step, size = int(content["step"]), int(content["world_size"])
        manifest = Manifest(folder, step, content["run"], content["origin"], size, content["layout"], files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise damaged(folder, f"{MANIFEST} is not one of ours") from None
    for name in files:
        if name != Path(name).name or name in ("", ".", ".."):
            raise damaged(folder, f"{MANIFEST} names {name!r}, which is not a file in this folder")
    return manifest


def read_json(folder: Path, name: str) -> Any:
    """The content of a JSON file of a checkpoint. Raises DataError where there is none."""
    try:
        return json.loads((folder / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise damaged(folder, f"{name} is missing") from None
    except (ValueError, OSError) as error:
        raise damaged(folder, f"{name} cannot be read ({str(error).splitlines()[0]})") from None


def _mark_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def write_file(path: Path, content: bytes) -> tuple[int, str]:
    """Write a file so that it outlives a crash of the machine; (size [bytes], SHA-256)."""
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return len(content), hashlib.sha256(content).hexdigest()


# ------------------------------------------------------------------------------------------------------- checks


def _file_mark(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def wrong_sizes(manifest: Manifest) -> str:
    """What is missing or of another size, in words; "" where nothing is. Takes no longer than listing the folder."""
    for name, (size, _) in manifest.files.items():
        path = manifest.folder / name
        if path.is_symlink():
            return f"{name} is a link out of it"
        try:
            found = path.stat().st_size
        except OSError:
            return f"{name} is missing"
        if found != size:
            return f"{name} has {found:,} bytes instead of {size:,}"
    return ""


def wrong_bytes(manifest: Manifest, names: Sequence[str]) -> str:
    """Which of these files was changed after it was written, in words; "" where none was. Reads them all."""
    for name in names:
        try:
            if _file_mark(manifest.folder / name) != manifest.files[name][1]:
                return f"{name} was changed after it was written (its SHA-256 is another)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
    return ""


def anew(folder: Path) -> str:
    """What to type for a run that goes on from none of the checkpoints that stand in ``folder`` or beside it."""
    return elsewhere(folder) or "checkpoint.resume=null"


def elsewhere(folder: Path) -> str | None:
    """Another output folder for this Hydra job, to be typed, where ``folder`` is in its own; else None.

    A run that goes on from no checkpoint does not take over a folder that has some.
    """
    hydra: Any = HydraConfig.instance().cfg
    if hydra is None:
        return None
    key = "hydra.sweep.dir" if str(OmegaConf.select(hydra, "hydra.mode")).endswith("MULTIRUN") else "hydra.run.dir"
    own = OmegaConf.select(hydra, key)
    if own is None or not folder.absolute().is_relative_to(typed_path(own)):
        return None
    number = 2
    while typed_path(f"{own}-{number}").exists():
        number += 1
    return f"{key}={own}-{number}"


def damaged(folder: Path, finding: str) -> DataError:
    """The error that names what is wrong with a checkpoint, and offers the one before it."""
    older = _complete_before(folder)
    best = f"checkpoint.resume={older}" if older else anew(folder)
    allowed = f"a complete checkpoint; the one before it is {older.name}" if older else "a complete checkpoint"
    what = f"the checkpoint {folder} is damaged: {finding}"
    return DataError(Problem(what=what, asked=f"checkpoint.resume={folder}", allowed=allowed, instead=best))


def _complete_before(folder: Path) -> Path | None:
    names = [path for path in checkpoints_in(folder.parent) if path.name < folder.name]
    for path in names:
        try:
            content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
            sizes = {name: entry["bytes"] for name, entry in content["files"].items()}
            if all((path / name).stat().st_size == size for name, size in sizes.items()):
                return path
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return None
