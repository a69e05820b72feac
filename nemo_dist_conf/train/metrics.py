"""``metrics.jsonl``: one line of JSON a step, and TensorBoard where asked."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from nemo_dist_conf.errors import ConfigError, Problem

__all__ = ["METRICS_FILE", "MetricsWriter", "TENSORBOARD_FOLDER", "require_tensorboard"]

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

#: What TensorBoard draws, of the keys of a line.
_SCALARS = ("loss", "grad_norm", "lr", "tokens_per_second", "aux_loss", "expert_imbalance")


class MetricsWriter:
    """Writes a run's numbers into its output folder; on other ranks than the main one it does nothing.

    The file tells one trajectory: lines of ``first_step`` and later that an earlier attempt left behind are
    removed, so a restarted or resumed run leaves every step in it once. Each line is complete on disk when
    ``write`` returns, so the file can be followed and survives a killed process.
    """

    def __init__(
        self, folder: str | os.PathLike[str], *, enabled: bool = True, first_step: int = 1, tensorboard: bool = False
    ) -> None:
        """folder: created where missing. first_step: number of the first step that will be written.

        Raises ConfigError where TensorBoard is asked for and not installed.
        """
        self.path = Path(folder) / METRICS_FILE
        self._file: IO[str] | None = None
        self._board: Any = None
        if not enabled:
            return
        if tensorboard:  # first: a missing package must not cost the file of an earlier run
            self._board = _summary_writer(Path(folder) / TENSORBOARD_FOLDER, first_step)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = _lines_before(self.path, first_step)
        if kept is not None:
            replacement = self.path.with_suffix(".jsonl.new")
            replacement.write_text("".join(kept), encoding="utf-8")
            replacement.replace(self.path)
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


def _lines_before(path: Path, first_step: int) -> list[str] | None:
    """Lines of an earlier attempt that stay; None where the file is absent or can stay as it is."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    except FileNotFoundError:
        return None
    kept = [line for line in lines if line.endswith("\n") and _step_of(line) < first_step]
    return None if kept == lines else kept


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
                "train.tensorboard=true needs the package tensorboard, which is not installed",
                "train.tensorboard=true",
                "true once it is installed (pip install tensorboard); false",
                "train.tensorboard=false",
            )
        ) from error


def _summary_writer(folder: Path, first_step: int) -> Any:
    require_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides what an earlier attempt wrote from this step on
    return SummaryWriter(log_dir=str(folder), purge_step=first_step if first_step > 1 else None)
