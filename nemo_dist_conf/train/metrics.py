"""``metrics.jsonl``: one line of JSON a step, and TensorBoard where asked."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.recipe.earlier import next_number, set_aside

__all__ = ["METRICS_FILE", "MetricsWriter", "TENSORBOARD_FOLDER", "require_tensorboard"]

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

#: What TensorBoard draws, of the keys of a line.
_SCALARS = ("loss", "grad_norm", "lr", "tokens_per_second", "aux_loss", "expert_imbalance")


class MetricsWriter:
    """Writes a run's numbers into its output folder; on other ranks than the main one it does nothing.

    The file tells one trajectory: a restarted or resumed run leaves every step in it once. What an earlier run left
    behind, of ``first_step`` and later, is not lost: it gets a number (``metrics.1.jsonl``), and the log says so. Each
    line is complete on disk when ``write`` returns, so the file can be followed and survives a killed process.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        enabled: bool = True,
        first_step: int = 1,
        tensorboard: bool = False,
        last_loss: float | None = None,
    ) -> None:
        """folder: created where missing. first_step: number of the first step that will be written. last_loss: of the
        step before it, where a checkpoint told: a file with another one is of another run.

        Raises ConfigError where TensorBoard is asked for and not installed.
        """
        self.path = Path(folder) / METRICS_FILE
        self._file: IO[str] | None = None
        self._board: Any = None
        if not enabled:
            return
        if tensorboard:  # first: a missing package must not cost the file of an earlier run
            require_tensorboard()
            _keep_board(Path(folder) / TENSORBOARD_FOLDER, first_step)
            self._board = _summary_writer(Path(folder) / TENSORBOARD_FOLDER, first_step)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if last_loss is not None:
            _find_own(self.path, first_step - 1, last_loss)
        _keep_lines(self.path, first_step)
        self._file = open(self.path, "a", encoding="utf-8")

    def write(self, *, step: int, loss: float, grad_norm: float, tokens: int, seconds: float, **more: float) -> None:
        """Append the line of a step.

        step: counted from 1. loss: mean over the tokens of the global batch. tokens: of this step's global batch.
        seconds: this step's. more: further numbers (lr, tokens_per_second, ...).
        Raises ValueError for a number that JSON has no word for (NaN, infinity).
        """
        if self._file is None:
            return
        line = {"step": step, "loss": loss, "grad_norm": grad_norm, "tokens": tokens, "seconds": seconds, **more}
        wrong = [key for key, value in line.items() if not math.isfinite(value)]
        if wrong:
            raise ValueError(f"step {step}: {', '.join(wrong)} is not a finite number")
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for key in _SCALARS:
                if key in line:
                    self._board.add_scalar(f"train/{key}", line[key], step)

    def close(self) -> None:
        """Close the files; further calls do nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._board is not None:
            self._board.close()
            self._board = None

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _find_own(path: Path, step: int, loss: float) -> None:
    """Put the file of this run in its place, which is the one that has this loss for the last step that was saved.

    Another run may have been started in the folder since, and this one's lines have a number.
    """
    if _loss_of(path, step) in (None, loss):
        return
    earlier = [other for other in path.parent.glob(f"{path.stem}.*{path.suffix}") if _loss_of(other, step) == loss]
    aside = set_aside(path)
    log.warning("%s is of another run than the one that goes on; it is now %s", path.name, aside.name)
    if earlier:
        newest = max(earlier, key=lambda other: other.stat().st_mtime)
        newest.rename(path)
        log.warning("%s is %s again", newest.name, path.name)


def _loss_of(path: Path, step: int) -> float | None:
    """The loss of a step; None where the file has no line of it."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    found = next((line for line in lines if _step_of(line) == step), None)
    return None if found is None else json.loads(found).get("loss")


def _keep_lines(path: Path, first_step: int) -> None:
    """Leave the lines before ``first_step`` in the file; the others go to one with a number."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return
    complete = [line for line in lines if line.endswith("\n")]  # the last one may be cut short by a kill
    kept = [line for line in complete if _step_of(line) < first_step]
    others = [line for line in complete if _step_of(line) >= first_step]
    if others:
        aside = next_number(path)
        if not kept:
            path.rename(aside)
            log.warning("%s of an earlier run in this folder is now %s", path.name, aside.name)
            return
        _write(aside, others)
        what = "%s: lines of step %d and later, which are made again, are now in %s"
        log.warning(what, path.name, first_step, aside.name)
    if kept != lines:
        _write(path, kept)


def _write(path: Path, lines: list[str]) -> None:
    """All or nothing, whatever happens meanwhile."""
    replacement = path.with_name(f"{path.name}.new")
    replacement.write_text("".join(lines), encoding="utf-8")
    replacement.replace(path)


def _keep_board(folder: Path, first_step: int) -> None:
    """The curves of an earlier run, which would lie under this one's."""
    if first_step == 1 and folder.is_dir() and any(folder.iterdir()):
        log.warning("%s of an earlier run in this folder is now %s", folder.name, set_aside(folder).name)


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # cut short by a kill, or not ours
        return math.inf


def require_tensorboard() -> None:
    """Raise ConfigError where TensorBoard is not installed. For every rank to call, before anything starts."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            Problem(
                what="train.tensorboard=true needs the package tensorboard, which is not installed",
                asked="train.tensorboard=true",
                allowed="true once it is installed (pip install tensorboard); false",
                instead="train.tensorboard=false",
            )
        ) from error


def _summary_writer(folder: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides what an earlier attempt wrote from this step on
    return SummaryWriter(log_dir=str(folder), purge_step=first_step if first_step > 1 else None)
