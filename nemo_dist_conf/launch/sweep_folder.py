"""The folder of a sweep: one sweep at a time writes there, and a refused one leaves nothing behind."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf, flag_override

from nemo_dist_conf.composition.hydra_inside import written_at
from nemo_dist_conf.errors import ConfigError, Problem

__all__ = ["SweepFolder"]

_RECORDS = "sweep.jsonl"
_COMMANDS = "multirun.yaml"


class SweepFolder:
    """Claimed before the sweeper writes into it; ``config.hydra.sweep.dir`` is changed where it has to be another."""

    def __init__(self, config: DictConfig, resume: str | None) -> None:
        self._lock: Any = None
        if resume is not None:
            _set_folder(config, Path(resume).resolve())
        self._use(Path(str(config.hydra.sweep.dir)))
        if resume is not None:
            self._claim_for_resume(resume)
        else:
            self._claim(config)

    def _use(self, path: Path) -> None:
        commands = path / _COMMANDS
        self.path = path
        self._new = [folder for folder in (path, *path.parents) if not folder.exists()]
        self._commands_before = commands.read_bytes() if commands.is_file() else None
        self._aside: Path | None = None

    def _claim_for_resume(self, resume: str) -> None:
        if not self._take():
            asked = f"hydra.launcher.resume={resume}"
            ended, anew = "a sweep that has ended", "hydra.launcher.resume=null"
            raise ConfigError(Problem(what="this sweep is still running", asked=asked, allowed=ended, instead=anew))

    def _claim(self, config: DictConfig) -> None:
        """A folder named by the time gets a number where another sweep of that second has it."""
        base, number = self.path, 1
        by_time = "${now" in str(written_at(config.hydra.sweep, "dir"))
        while not self._take() or (by_time and self._holds_records()):
            if not by_time:
                asked = f"hydra.sweep.dir={base}"
                what = f"another sweep is running in {base}"
                raise ConfigError(
                    Problem(what=what, asked=asked, allowed="a folder of its own", instead=f"hydra.sweep.dir={base}_2")
                )
            number += 1
            self._use(base.with_name(f"{base.name}_{number}"))
        if self.path != base:
            _set_folder(config, self.path)
        if self._holds_records():
            self._put_aside()

    def _holds_records(self) -> bool:
        return (self.path / _RECORDS).stat().st_size > 0

    def _put_aside(self) -> None:
        """The records of an earlier sweep in this folder keep existing under another name."""
        number = 1
        while (self.path / f"sweep.{number}.jsonl").exists():
            number += 1
        self._aside = (self.path / _RECORDS).rename(self.path / f"sweep.{number}.jsonl")
        self._take()

    def _take(self) -> bool:
        """Whether this process holds the folder now. The lock ends with the process, however it ends."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / _RECORDS).open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        return True

    def forget(self) -> None:
        """Leave all as it was before a sweep that was refused; Hydra's sweeper has written ``multirun.yaml``."""
        if self._holds_records():
            return
        if self._aside is None:
            (self.path / _RECORDS).unlink()
        else:
            self._aside.replace(self.path / _RECORDS)
        if self._commands_before is not None:
            (self.path / _COMMANDS).write_bytes(self._commands_before)
        else:
            (self.path / _COMMANDS).unlink(missing_ok=True)
        for folder in self._new:
            try:
                folder.rmdir()
            except OSError:  # others have written there
                break


def _set_folder(config: DictConfig, path: Path) -> None:
    with flag_override(config, ["readonly", "struct"], False):
        OmegaConf.update(config, "hydra.sweep.dir", str(path), force_add=True)
