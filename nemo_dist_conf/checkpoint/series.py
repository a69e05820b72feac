"""The checkpoints of a run: where it goes on, what it saves as it goes, and which of them it keeps."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
import uuid
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Mapping

import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from nemo_dist_conf.checkpoint.manifest import checkpoints_in, elsewhere, find_checkpoint, read_manifest, step_folder
from nemo_dist_conf.checkpoint.repeated_save import difference, run_of
from nemo_dist_conf.checkpoint.save_and_load import PARTIAL, Restored, Snapshot, load, take_snapshot, write_snapshot
from nemo_dist_conf.errors import ConfigError, DataError, Problem
from nemo_dist_conf.runtime.process_group import host_group
from nemo_dist_conf.runtime.rank_agreement import together

__all__ = ["Checkpoints"]

log = logging.getLogger(__name__)

_LOCK = ".lock"
_PATIENCE_S = 10.0
_ASIDE = "set-aside-"


class Checkpoints:
    """What a training loop holds: ``restore`` once before the first step, ``save`` after some steps, ``close``.

    Every rank makes one and calls the same methods. The folder belongs to one run at a time; a run that finds it in
    use, or full of another run's checkpoints, is refused and changes nothing there.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        resume: str | os.PathLike[str] | None = "auto",
        keep: int | None = None,
        asynchronous: bool = False,
        layout: str = "",
    ) -> None:
        """folder: made where missing; on several nodes one that all of them share.

        resume: ``auto``: the newest checkpoint in ``folder``, if there is one; a folder: that checkpoint, or the newest
        in it; None: none. keep: how many of the newest stay; None: all. asynchronous: ``save`` returns once the state
        is copied to the CPU's memory, and writes it while training goes on. layout: for whoever reads the manifest.
        Raises DataError where the folder cannot be written, is in use, or holds what this run would not go on from.
        """
        self.folder = Path(folder).expanduser().absolute()
        self._keep, self._layout = keep, layout
        self._copies: dict[str, Tensor] | None = {} if asynchronous else None
        self._thread = ThreadPoolExecutor(1) if asynchronous else None
        self._pending: Future[None] | None = None
        self._group = host_group(apart=asynchronous)
        self._lock: Any = None
        self._is_restored = False
        is_main = not dist.is_initialized() or dist.get_rank() == 0
        try:
            found, others = together(
                lambda: self._claim(None if resume is None else str(resume)) if is_main else None,
                lambda found: found if is_main else None,
            )
        except ConfigError:
            self.close()
            raise
        self._start, self._run, self._origin = others[0] if found is None else found

    def _claim(self, resume: str | None) -> tuple[str | None, str, str | None]:
        """(checkpoint to go on from, id of the run, checkpoint that it was told to start from); on rank 0."""
        self._take_lock()
        for path in self.folder.glob(f"{PARTIAL}*"):
            shutil.rmtree(path, ignore_errors=True)  # nobody writes it: the lock is ours
        there = checkpoints_in(self.folder)
        if resume == "auto":
            return self._going_on(there[0]) if there else (None, uuid.uuid4().hex, None)
        origin = None if resume is None else str(_existing(resume).absolute())
        if there and origin is not None and read_manifest(there[0]).origin == origin:
            return self._going_on(there[0])  # the same command again, after a stop
        if origin is not None and Path(origin).parent == self.folder:
            later = [path for path in there if path.name > Path(origin).name]
            self._set_aside(later, "later than the checkpoint to go on from")
            return origin, read_manifest(Path(origin)).run, origin
        if there:
            what = f"{self.folder} holds checkpoints of another run, up to {there[0].name}"
            asked = f"checkpoint.resume={'null' if resume is None else resume}"
            allowed = "auto: go on with that run; or an output folder of its own (hydra.run.dir)"
            raise DataError(
                Problem(
                    what=what, asked=asked, allowed=allowed, instead=elsewhere(self.folder) or "checkpoint.resume=auto"
                )
            )
        return origin, uuid.uuid4().hex, origin

    def _going_on(self, newest: Path) -> tuple[str, str, str | None]:
        manifest = read_manifest(newest)
        return str(newest), manifest.run, manifest.origin

    def _take_lock(self) -> None:
        """One run at a time; the lock ends with the process that holds it, however that ends."""
        asked = f"checkpoints in {self.folder}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / _LOCK, "a")
        except OSError as error:
            what = f"{self.folder} cannot be written: {error.strerror}"
            raise DataError(
                Problem(what=what, asked=asked, allowed="a folder that can be written", instead="hydra.run.dir=FOLDER")
            ) from None
        until = time.monotonic() + _PATIENCE_S  # a restarted run may meet the end of the one before it
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if time.monotonic() > until:
                    what = f"another run that is still there writes its checkpoints to {self.folder}"
                    problem = Problem(
                        what=what,
                        asked=asked,
                        allowed="one run at a time, or another folder",
                        instead="hydra.run.dir=FOLDER",
                    )
                    raise DataError(problem) from None
                time.sleep(0.1)
            except OSError as error:
                log.warning("%s has no locks (%s): two runs that use it will not see each other", asked, error.strerror)
                return

    def _set_aside(self, paths: list[Path], reason: str) -> None:
        """Checkpoints that are not lost, and not taken for this run's newest."""
        for path in paths:
            number = 1
            while (aside := path.with_name(f"{_ASIDE}{number}-{path.name}")).exists():
                number += 1
            path.rename(aside)
            log.warning("%s is %s; it is now %s", path.name, reason, aside.name)

    @property
    def start(self) -> Path | None:
        """The checkpoint that ``restore`` will load."""
        return None if self._start is None else Path(self._start)

    def restore(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        objects: Mapping[str, Any] | None = None,
        settings: bool = True,
    ) -> Restored | None:
        """Load where this run goes on (see ``load``); None where it starts anew."""
        self._is_restored = True
        if self._start is None:
            return None
        return load(self._start, model, optimizer, objects=objects, settings=settings)

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        *,
        objects: Mapping[str, Any] | None = None,
        config: Any = None,
    ) -> None:
        """Save the state after ``step`` steps (see ``save``). Waits for an earlier one that is still being written.

        A step that this run saved already, with the same values, is not written again; a damaged one is set aside.
        Raises TrainingError on all ranks where this one, or an earlier one, could not be written, DataError where the
        step is there with other values.
        """
        self.wait()
        target = step_folder(self.folder, step)
        snapshot = take_snapshot(model, optimizer, step=step, objects=objects, config=config, copies=self._copies)
        if self._is_there(target, snapshot):
            return

        def write() -> None:
            write_snapshot(snapshot, target, run=self._run, origin=self._origin, layout=self._layout, group=self._group)
            self._prune()

        if self._thread is None:
            write()
        else:
            self._pending = self._thread.submit(write)

    def _is_there(self, target: Path, snapshot: Snapshot) -> bool:
        """Whether this step was saved before, as it is now. Raises DataError where it was, as something else."""
        is_main = not dist.is_initialized() or dist.get_rank() == 0
        found = together(lambda: None, lambda _: (target.exists(), run_of(target)) if is_main else None)[1][0]
        if not found[0]:
            return False
        finding = "it is of another run"
        try:
            if found[1] in (None, self._run):
                finding = difference(target, snapshot)
        except DataError as damage:
            if is_main:
                self._set_aside([target], damage.what.partition("is ")[2])
            return False
        if finding:
            together(lambda: self._refuse_again(target, snapshot.step, finding))
        if is_main:
            log.info("%s is there already with these values: not written again", target.name)
        return True

    def _refuse_again(self, target: Path, step: int, finding: str) -> None:
        what = f"step {step} is saved already, and not as it is now: {finding} ({target})"
        asked, allowed = f"checkpoints.save({step}, ...)", "a step that was not saved yet; the same values again"
        instead = f"mv {target} {target.with_name(f'{_ASIDE}{target.name}')}"
        if self._start is not None and not self._is_restored:
            what += f"; this run goes on from {Path(self._start).name}, which it has not loaded"
            allowed = "steps after the one that the run goes on from"
            instead = "found = checkpoints.restore(model, optimizer), and the loop from found.step on"
        raise DataError(Problem(what=what, asked=asked, allowed=allowed, instead=instead))

    def _prune(self) -> None:
        """Remove this run's oldest ones; on rank 0."""
        if self._keep is None or self._lock is None:
            return
        mine = [path for path in checkpoints_in(self.folder) if run_of(path) == self._run]
        for path in mine[self._keep :]:
            gone = path.with_name(f"{PARTIAL}{path.name}")
            path.rename(gone)  # so that a kill while files are removed leaves no half of a checkpoint
            shutil.rmtree(gone, ignore_errors=True)

    def wait(self) -> None:
        """Return when nothing is being written. Raises what went wrong with the last one."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """``wait``, and give the folder back."""
        try:
            self.wait()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _existing(asked: str) -> Path:
    found = find_checkpoint(asked)
    if found is None:
        what = f"{asked} holds no checkpoint"
        allowed = "auto, null, or a folder of a checkpoint or of several"
        raise DataError(
            Problem(what=what, asked=f"checkpoint.resume={asked}", allowed=allowed, instead="checkpoint.resume=auto")
        )
    return found
