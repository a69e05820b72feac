"""What every benchmark here writes: the machine, the versions, the command and a table, as JSON and as Markdown."""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any, Callable, Iterable, Sequence

__all__ = ["add_files", "finish", "new_report", "table", "used", "write"]


def add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, help="write everything that was measured here")
    parser.add_argument("--markdown", type=Path, help="write the table, the machine and the versions here")


def new_report(script: str, **more: Any) -> dict[str, Any]:
    """What is known before anything is measured. script: path of the benchmark, to tell how to run it again."""
    return {
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["python", f"benchmarks/{_shown(Path(script))}", *sys.argv[1:]]),
        "hardware": _hardware(),
        "versions": _versions(),
        **more,
        "results": [],
    }


def _shown(script: Path) -> str:
    """As it is typed: a folder with a __main__ by its own name."""
    return script.parent.name if script.name == "__main__.py" else script.name


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join("| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths)) + " |" for line in lines)


def used(report: dict[str, Any]) -> str:
    """The versions in one line."""
    return ", ".join(f"{name} {version}" for name, version in report["versions"].items())


def finish(
    report: dict[str, Any], options: argparse.Namespace, shown: str, markdown: Callable[[dict[str, Any]], str]
) -> None:
    """Print the table and write the files that were asked for."""
    print(shown)
    write(report, options, markdown)


def write(report: dict[str, Any], options: argparse.Namespace, markdown: Callable[[dict[str, Any]], str]) -> None:
    """The files that were asked for."""
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(report))


def _hardware() -> dict[str, Any]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": model, "cores": os.cpu_count(), "ram_gib": round(ram), "load_before": round(os.getloadavg()[0], 2)}


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in ("torch", "transformers", "hydra-core", "omegaconf")},
    }
