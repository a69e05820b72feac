"""docs/zoo.md and docs/zoo.json: what came of each family along each axis."""

from __future__ import annotations

import json
import platform
import re
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Mapping

import torch

from tests.zoo.axes import AXES, OF_KINDS, OF_TOWERS
from tests.zoo.cell import LAYERS, LENGTH, STEPS, TOLERANCE

__all__ = ["Cell", "page", "write"]

KINDS = ("equal", "refused", "wrong", "error", "no reference")
UNTRIED = "not measured"


@dataclass(frozen=True)
class Cell:
    """kind: one of KINDS. difference: the worst relative one; None where nothing was computed, or it is not a number.

    reason: why it was refused, or what it died of.
    """

    family: str
    axis: str
    kind: str
    difference: float | None
    reason: str
    seconds: float
    tolerance: float = TOLERANCE

    @property
    def is_right(self) -> bool:
        return self.kind not in ("wrong", "error")

    def line(self) -> str:
        return json.dumps(asdict(self))


#: What differs from model to model in the words of one reason, and what stands for it.
_NAMES = (
    (r"\b\w+For[A-Z]\w+|\b\w+LMHead\w*", "MODEL"),
    (r"\b(?:[A-Z][a-z0-9]*){2,}\b(?<!Error)", "CLASS"),
    (r"\b[a-z_]\w*(?:\.\w+)+\b(?!=)(?<!tp_plan)", "NAME"),
    (r"(?:NAME, )+(?:NAME|\.\.\.)", "NAMES"),
    (r"\b\d+ of \d+\b", "N of M"),
)


def why(cell: Cell) -> str:
    """What was found, without what to type instead, in words that hold for all models it was found of."""
    text = cell.reason.partition(" asked ")[0]
    if cell.kind == "refused":
        for pattern, word in (*_NAMES, (rf"(?<!\w){re.escape(cell.family)}(?!\w)", "FAMILY")):
            text = re.sub(pattern, word, text)
    return text[:300].replace("|", "\\|").replace("<", "&lt;")


def page(families: list[str], kinds: list[str], towers: list[str], cells: Mapping[tuple[str, str], Cell]) -> str:
    """towers: kinds that have several."""
    import transformers

    rows = [(family, axis) for family in families for axis in AXES]
    of_kinds = [(kind, axis) for kind in kinds for axis in OF_KINDS]
    of_kinds += [(kind, axis) for kind in towers for axis in OF_TOWERS]
    shown = {key: cells[key] for key in (*rows, *of_kinds) if key in cells}
    reasons = Counter(why(cell) for cell in shown.values() if cell.reason)
    number = {reason: index for index, (reason, _) in enumerate(reasons.most_common(), 1)}
    counts = {axis: Counter(cells[key].kind for key in rows if key[1] == axis and key in cells) for axis in AXES}
    missing = len(rows) + len(of_kinds) - len(shown)
    days = f"{date.today()}, torch {torch.__version__}, transformers {transformers.__version__}"
    lines = [
        "# The zoo",
        "",
        f"Every causal family of transformers, as a tiny model of {LAYERS} layers (float32, weights enlarged so that "
        f"attention, caps and sinks matter, nothing drops out), {STEPS} steps of SGD with momentum and clipping "
        f"on rows of {LENGTH} tokens along each axis, on 2 ranks (hsdp, pairs: 4), beside plain torch in one process. "
        "A cell is the worst relative difference of a loss, a gradient norm or of what a parameter has moved by: equal "
        f"up to {TOLERANCE:.0e}, or to ten times what one process is apart from itself when it sums the gradients of "
        "four parts of the batch (docs/zoo.json tells each tolerance); *rN*: refused before a start, with the reason N "
        "below; **wrong**: computed, and not equal; **error**: ended by something else than a refusal; "
        "*no reference*: a tiny model of the family does not run in one process (reason N).",
        "",
        "In a reason MODEL, CLASS, FAMILY and NAME stand for what the model at hand has there; docs/zoo.json has each "
        "cell in full. `compile`: the blocks are traced and run as they are. `megatron`: the library, with a stand-in "
        "for CUDA.",
        "",
        f"{len(shown)} of {len(rows) + len(of_kinds)} cells measured, {missing} not yet (empty). {days}, gloo, CPU "
        f"({platform.machine()}): `python -m tests.zoo --write`.",
        "",
        f"| axis | {' | '.join(KINDS)} | {UNTRIED} |",
        "|---|" + "---|" * (len(KINDS) + 1),
    ]
    for axis, count in counts.items():
        numbers = [count[kind] for kind in KINDS] + [len(families) - count.total()]
        lines.append(f"| {axis} | {' | '.join(map(str, numbers))} |")
    wrong = [cell for cell in shown.values() if not cell.is_right]
    lines += ["", "## Wrong", "", *([] if wrong else ["None."])]
    for cell in sorted(wrong, key=lambda cell: ([*AXES, *OF_TOWERS].index(cell.axis), cell.family)):
        told = cell.reason[:200].replace("<", "&lt;") or f"difference {cell.difference}"
        lines.append(f"- {cell.family}, {cell.axis}: {cell.kind}, {told}")
    lines += ["", "## Families", "", f"| family | {' | '.join(AXES)} |", "|---|" + "---|" * len(AXES)]
    for family in families:
        row = [_shown(shown.get((family, axis)), number) for axis in AXES]
        lines.append(f"| {family} | {' | '.join(row)} |")
    lines += [
        "",
        "## Other kinds",
        "",
        "Each with a batch and a loss of its own (tests/dist/kinds), 3 steps of SGD.",
        "",
    ]
    lines += [f"| kind | {' | '.join(OF_KINDS)} |", "|---|" + "---|" * len(OF_KINDS)]
    for kind in kinds:
        row = [_shown(shown.get((kind, axis)), number) for axis in OF_KINDS]
        lines.append(f"| {kind.replace('_', ' ')} | {' | '.join(row)} |")
    lines += [
        "",
        "## Several towers",
        "",
        "`ac language`, `vision`, `encoder`: activation checkpointing with that `recompute.scope`, fsdp2. `frozen`: "
        "the vision tower, or the encoder, is not trained.",
        "",
        f"| kind | {' | '.join(OF_TOWERS)} |",
        "|---|" + "---|" * len(OF_TOWERS),
    ]
    for kind in towers:
        row = [_shown(shown.get((kind, axis)), number) for axis in OF_TOWERS]
        lines.append(f"| {kind.replace('_', ' ')} | {' | '.join(row)} |")
    lines += ["", "## Reasons", "", "| | cells | reason |", "|---|---|---|"]
    lines += [f"| {number[reason]} | {count} | {reason} |" for reason, count in reasons.most_common()]
    return "\n".join(lines) + "\n"


def _shown(cell: Cell | None, number: Mapping[str, int]) -> str:
    if cell is None:
        return ""
    if cell.kind == "equal":
        return f"{cell.difference:.0e}"
    if cell.kind == "refused":
        return f"r{number[why(cell)]}"
    if cell.kind == "wrong":
        return f"**wrong** {'nan' if cell.difference is None else format(cell.difference, '.0e')}"
    return f"**{cell.kind}** {number.get(why(cell), '')}"


def write(
    folder: Path, families: list[str], kinds: list[str], towers: list[str], cells: Mapping[tuple[str, str], Cell]
) -> None:
    """docs/zoo.md and docs/zoo.json. towers: kinds that have several."""
    (folder / "zoo.md").write_text(page(families, kinds, towers, cells), encoding="utf-8")
    axes = (*AXES, *OF_TOWERS)
    ordered = [cells[key] for family in (*families, *kinds) for axis in axes if (key := (family, axis)) in cells]
    text = ",\n".join(cell.line() for cell in ordered)
    (folder / "zoo.json").write_text(f"[\n{text}\n]\n", encoding="utf-8")
