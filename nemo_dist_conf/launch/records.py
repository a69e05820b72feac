"""What became of each job of a sweep: a line of ``sweep.jsonl`` when it ends, and tables of all of them."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Iterable, Sequence

__all__ = ["Record", "Records", "markdown_table", "text_table"]

#: Letters of a value in the tables; the file of records has it in full.
_WIDEST = 60
_COLUMNS = ("job", "overrides", "layout", "status", "value", "seconds", "folder")


@dataclass(frozen=True)
class Record:
    """One job. status: completed, failed, skipped (cannot work), interrupted, not started; folder: within the sweep's.

    value: what the task function returned on rank 0, where JSON can hold it; reason: why it did not complete.
    """

    job: int
    overrides: list[str]
    layout: str
    status: str
    value: Any = None
    seconds: float | None = None
    folder: str = ""
    reason: str = ""
    ranks: int = 0


class Records:
    """The records of a sweep's folder; later ones of a job replace earlier ones.

    Each is written at once, so that a sweep that is killed can be continued.
    """

    def __init__(self, folder: Path, read: bool) -> None:
        self.folder = folder
        self.file = folder / "sweep.jsonl"
        self.of_job: dict[int, Record] = {}
        if read and self.file.is_file():
            for line in self.file.read_text().splitlines():
                record = _parsed(line)
                if record is not None:
                    self.of_job[record.job] = record

    def completed(self, job: int, overrides: Sequence[str]) -> Record | None:
        """The record of this job, if it has completed with these overrides."""
        record = self.of_job.get(job)
        return record if record and record.status == "completed" and record.overrides == list(overrides) else None

    def add(self, record: Record) -> None:
        """Write the record down, and the Markdown table anew."""
        self.of_job[record.job] = record
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.file.open("a+b") as file:
            line = json.dumps(asdict(record) | {"value": _as_json(record.value)})
            file.write(_line_end(file) + line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        aside = self.folder / ".sweep.md"
        aside.write_text(markdown_table(self.all()))
        aside.replace(self.folder / "sweep.md")

    def all(self) -> list[Record]:
        return [self.of_job[job] for job in sorted(self.of_job)]


def text_table(records: Iterable[Record]) -> str:
    """The table as plain columns."""
    rows = [_COLUMNS, *(_row(record) for record in records)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_COLUMNS))]
    return "\n".join("  ".join(word.ljust(width) for word, width in zip(row, widths)).rstrip() for row in rows)


def markdown_table(records: Iterable[Record]) -> str:
    """The same for a file: with the reason of what did not complete."""
    columns = (*_COLUMNS, "reason")
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for record in records:
        words = [*_row(record), record.reason.splitlines()[0] if record.reason else ""]
        lines.append("| " + " | ".join(word.replace("|", "\\|") for word in words) + " |")
    return "\n".join(lines) + "\n"


def _row(record: Record) -> tuple[str, ...]:
    value = record.value
    shown = "" if value is None else f"{value:.6g}" if isinstance(value, float) else _in_one_line(str(value))
    seconds = "" if record.seconds is None else f"{record.seconds:.1f}"
    words = " ".join(" ".join(record.overrides).splitlines())
    return str(record.job), words, record.layout, record.status, shown, seconds, record.folder


def _in_one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _WIDEST else f"{line[: _WIDEST - 3]}..."


def _line_end(file: BinaryIO) -> bytes:
    """What ends a line that was cut off when the machine stopped."""
    if not file.tell():
        return b""
    file.seek(-1, os.SEEK_END)
    return b"" if file.read(1) == b"\n" else b"\n"


def _as_json(value: Any) -> Any:
    """JSON has no nan, and a sweeper may be given any object: what it cannot hold becomes text."""
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)


def _parsed(line: str) -> Record | None:
    """A record of the file; None for a line that was cut off when the machine stopped."""
    try:
        return Record(**json.loads(line))
    except (ValueError, TypeError):
        return None
