"""A plan in drawings: one HTML file for any browser, without a script or anything from outside, or one SVG file.

Ranks in their nodes coloured by group, memory as bars, the pipeline as a time line.
"""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field
from typing import Iterable, Iterator, Sequence

from nemo_dist_conf.plan.fit import FITS, NO, usable_bytes
from nemo_dist_conf.plan.memory import Memory
from nemo_dist_conf.plan.plan import Plan
from nemo_dist_conf.plan.rank_groups import Groups
from nemo_dist_conf.plan.schedule_timeline import Slot
from nemo_dist_conf.plan.text_report import amount, count_of, counted, duration, percent, table

__all__ = ["page", "svg"]

_WIDTH = 1120
_GIB = 2**30
#: So many ranks are drawn; more would be smaller than a point.
_RANKS = 4096
_SLOTS = 6000
#: Okabe and Ito's colours, which people with any colour vision tell apart.
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442", "#7f7f7f")
_PARTS = {
    "parameters": "#0072b2",
    "optimizer": "#56b4e9",
    "gradients": "#009e73",
    "gathered": "#f0e442",
    "activations": "#e69f00",
    "working": "#d55e00",
}
_ACTIONS = {"F": "#56b4e9", "B": "#e69f00", "I": "#d55e00", "W": "#009e73"}
_FONT = "12px system-ui, sans-serif"
_STYLE = """
body { font: 14px/1.45 system-ui, sans-serif; margin: 24px auto; max-width: 1120px; padding: 0 16px; color: #222;
       background: #fff; }
h1 { font-size: 20px; margin: 0 0 4px; } h2 { font-size: 16px; margin: 28px 0 6px; }
p { margin: 4px 0 10px; } svg { display: block; max-width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: #222; }
pre { font: 12px/1.4 ui-monospace, monospace; background: #f6f6f6; padding: 12px; white-space: pre-wrap; }
.fits { color: #006644; } .tight { color: #8a5a00; } .no { color: #a02000; }
.key span { display: inline-block; margin-right: 14px; white-space: nowrap; }
.key i { display: inline-block; width: 11px; height: 11px; margin-right: 4px; vertical-align: -1px; }
"""


@dataclass(frozen=True)
class _Drawing:
    """A drawing and what is written above and below it. key: what its colours mean. shapes: elements of SVG."""

    title: str
    text: str
    shapes: Sequence[str]
    width: float
    height: float
    key: dict[str, str] = field(default_factory=dict)
    below: str = ""

    def svg(self, place: str = "") -> str:
        width, height = self.width + 4, self.height + 10
        frame = f'viewBox="-2 -6 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
        return f'<svg {place}{frame} xmlns="http://www.w3.org/2000/svg">{"".join(self.shapes)}</svg>'


def _drawings(plan: Plan) -> list[_Drawing]:
    return [*_rank_maps(plan), _memory_bars(plan), *_timeline(plan)]


def _title(plan: Plan) -> str:
    return f"{plan.job.strategy.name}, {plan.job.mesh.describe()}, {counted(plan.job.mesh.world_size, 'rank')}"


def _facts(plan: Plan, verdict: str) -> str:
    job = plan.job
    return (
        f"{html.escape(job.model.model_type)}, {count_of(job.model.parameters)} parameters on "
        f"{html.escape(job.hardware.name)}: {verdict}, about {duration(plan.step.seconds)} a step, "
        f"{plan.step.tokens_per_second:,.0f} tokens/s, MFU {percent(plan.step.mfu)}"
    )


def page(plan: Plan) -> str:
    """The plan as a page of HTML."""
    mark = {FITS: "fits", NO: "no"}.get(plan.verdict, "tight")
    title = html.escape(_title(plan))
    verdict = f'<strong class="{mark}">{plan.verdict}</strong>'
    body = [f"<h1>{title}</h1>", f"<p>{_facts(plan, verdict)}</p>"]
    for drawing in _drawings(plan):
        body += [f"<h2>{html.escape(drawing.title)}</h2>", f"<p>{html.escape(drawing.text)}</p>"]
        if drawing.key:
            marks = (f'<span><i style="background:{colour}"></i>{name}</span>' for name, colour in drawing.key.items())
            body.append(f'<p class="key">{"".join(marks)}</p>')
        body.append(drawing.svg())
        body += [f"<p>{html.escape(drawing.below)}</p>"] if drawing.below else []
    body += ["<h2>All numbers</h2>", f"<pre>{html.escape(table(plan, formulas=True))}</pre>"]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def svg(plan: Plan) -> str:
    """The plan's drawings, one below the other, as an SVG file."""
    shapes: list[str] = []
    y = 0.0

    def write(text: str, size: int, weight: str = "normal") -> None:
        nonlocal y
        y += size + 8
        shapes.append(f'<text x="0" y="{y:.0f}" style="font:{weight} {size}px system-ui, sans-serif">{text}</text>')

    write(html.escape(_title(plan)), 20, "bold")
    write(_facts(plan, plan.verdict), 13)
    for drawing in _drawings(plan):
        y += 14
        write(html.escape(drawing.title), 16, "bold")
        write(html.escape(drawing.text), 13)
        if drawing.key:
            y += 22
            for index, (name, colour) in enumerate(drawing.key.items()):
                x = 130 * index
                shapes.append(f'<rect x="{x}" y="{y - 10:.0f}" width="11" height="11" fill="{colour}"/>')
                shapes.append(f'<text x="{x + 16}" y="{y:.0f}">{name}</text>')
        y += 12
        shapes.append(drawing.svg(f'x="0" y="{y:.0f}" '))
        y += drawing.height + 10
        if drawing.below:
            write(html.escape(drawing.below), 13)
    style = f"<style>text {{ font: {_FONT}; fill: #222; }}</style>"
    paper = f'<rect x="-16" y="-16" width="{_WIDTH + 36}" height="{y + 40:.0f}" fill="#fff"/>'
    return _Drawing("", "", [style, paper, *shapes], _WIDTH, y).svg() + "\n"


# ---------------------------------------------------------------------------------------------------- ranks


def _rank_maps(plan: Plan) -> Iterator[_Drawing]:
    for group in plan.groups or [Groups("rank", plan.job.mesh.world_size, (), plan.job.hardware.ranks_per_node)]:
        where = "every group inside one node" if group.inside_nodes else f"a group touches {group.nodes:,} nodes"
        count = f"{group.count:,} groups of {group.size:,}" if group.size > 1 else "one rank"
        text = f"One colour a group (colours come again); {where}. Rank 0's group is outlined."
        yield _rank_map(group, f"{group.axis}: {count}", text)


def _rank_map(group: Groups, title: str, text: str) -> _Drawing:
    """Nodes as rows of cells, as many nodes beside each other as leave a cell large enough."""
    ranks, per_node = min(group.world_size, _RANKS), min(group.ranks_per_node, group.world_size)
    nodes = -(-ranks // per_node)
    # A power of two, so that the pattern of a mesh is not sheared.
    across = min(nodes, 2 ** round(math.log2(max(1.0, math.sqrt(nodes * 5 / per_node)))))
    gap = 6 if nodes > 1 else 0
    cell = max(3.0, min(34.0, ((_WIDTH - across * gap) / across) / per_node))
    high = min(34.0, max(5.0, cell * 1.4))
    down = -(-nodes // across)
    numbered = cell >= 22
    own = set(group.members(0)) if group.size <= _RANKS else set()
    order = {first: index for index, first in enumerate(_first_groups(group, ranks))}
    shapes = []
    for node in range(nodes):
        x0 = (node % across) * (per_node * cell + gap)
        y0 = (node // across) * (high + 5)
        runs: list[list[int]] = []
        for local in range(min(per_node, ranks - node * per_node)):
            rank = node * per_node + local
            colour = order[group.first_of(rank)] % len(_COLOURS)
            if runs and runs[-1][2] == colour and not numbered and (rank in own) == bool(runs[-1][3]):
                runs[-1][1] += 1
            else:
                runs.append([local, 1, colour, int(rank in own)])
        for start, count, colour, mine in runs:
            edge = ' stroke="#000" stroke-width="1.6"' if mine else ' stroke="#fff" stroke-width="0.6"'
            if not mine and not numbered:
                edge += ' fill-opacity="0.45"'
            x, wide = x0 + start * cell, count * cell
            shapes.append(
                f'<rect x="{x:.1f}" y="{y0:.1f}" width="{wide:.1f}" height="{high:.1f}" '
                f'fill="{_COLOURS[colour]}"{edge}/>'
            )
            if numbered:
                label = str(node * per_node + start)
                shapes.append(
                    f'<text x="{x + wide / 2:.1f}" y="{y0 + high / 2 + 4:.1f}" text-anchor="middle" '
                    f'style="fill:{_ink(colour)}">{label}</text>'
                )
    left = group.world_size - ranks
    below = f"{left:,} more ranks go on like this." if left > 0 else ""
    return _Drawing(title, text, shapes, across * (per_node * cell + gap), down * (high + 5), below=below)


def _first_groups(group: Groups, ranks: int) -> Iterable[int]:
    """First ranks of the groups that the drawn ranks are in, in order."""
    return dict.fromkeys(group.first_of(rank) for rank in range(ranks))


def _ink(colour: int) -> str:
    return "#000" if _COLOURS[colour] in ("#e69f00", "#56b4e9", "#f0e442") else "#fff"


# ---------------------------------------------------------------------------------------------------- memory


def _memory_bars(plan: Plan) -> _Drawing:
    rows: list[tuple[str, Memory]] = [("rank", memory) for memory in plan.memory]
    if plan.job.pp > 1:  # the first rank of each, which has as much as any other
        rows = list({m.pp_rank: (f"pp rank {m.pp_rank}", m) for m in reversed(plan.memory)}.values())[::-1]
    elif len(rows) > 1:
        rows = [("first rank", rows[0][1]), ("last rank", rows[-1][1])]
    if len(rows) > 32:
        rows = rows[:16] + rows[-16:]
    whole = plan.job.hardware.memory_gib
    scale = (_WIDTH - 240) / max(whole, max(_all(memory) for _, memory in rows) / _GIB)
    shapes = []
    for index, (title, memory) in enumerate(rows):
        x, y = 110.0, index * 24
        shapes.append(f'<text x="0" y="{y + 14}">{title}</text>')
        for name, colour in _PARTS.items():
            size = getattr(memory, name) if name in _at_peak(memory) else 0
            wide = size / _GIB * scale
            if wide > 0:
                shapes.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="18" fill="{colour}">'
                    f"<title>{name} {amount(size)}</title></rect>"
                )
            x += wide
        shapes.append(f'<text x="{x + 6:.1f}" y="{y + 14}">{amount(memory.peak)}</text>')
    for limit, dash in ((whole, ""), (usable_bytes(plan.job.hardware) / _GIB, ' stroke-dasharray="4 3"')):
        x = 110 + limit * scale
        shapes.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="-4" y2="{len(rows) * 24}" stroke="#a02000"{dash}/>')
    text = f"Lines: {whole:g} GiB of the hardware, and (dashed) what of it is free for torch."
    return _Drawing("Memory of a rank at its peak", text, shapes, _WIDTH, len(rows) * 24 + 4, _PARTS)


def _at_peak(memory: Memory) -> set[str]:
    """The parts that are there at the peak: gradients only from the first backward on."""
    names = set(_PARTS)
    if memory.moment == "loss":
        names -= {"gradients"}
    if memory.moment == "update":
        names -= {"activations", "gathered"}
    if memory.host:
        names -= {"parameters", "optimizer", "gradients"}
    return names


def _all(memory: Memory) -> int:
    return max(memory.peak, sum(getattr(memory, name) for name in _at_peak(memory)))


# ---------------------------------------------------------------------------------------------------- time


def _timeline(plan: Plan) -> Iterator[_Drawing]:
    line = plan.step.timeline
    if line is None:
        return
    slots: Sequence[Slot] = line.slots
    if len(slots) > _SLOTS:  # its beginning shows how it goes on
        slots = sorted(slots, key=lambda slot: slot.start)[:_SLOTS]
    end = max(slot.end for slot in slots)
    ranks = plan.job.pp
    high = max(6.0, min(26.0, 640 / ranks))
    scale = (_WIDTH - 70) / end
    named = [rank for rank in range(ranks) if high > 10 or rank % 4 == 0]
    shapes = [f'<text x="0" y="{(rank + 0.7) * (high + 3):.1f}">pp {rank}</text>' for rank in named]
    for slot in slots:
        x, wide = 60 + slot.start * scale, (slot.end - slot.start) * scale
        y = slot.rank * (high + 3)
        shapes.append(
            f'<rect x="{x:.2f}" y="{y:.1f}" width="{max(wide - 0.3, 0.3):.2f}" height="{high:.1f}" '
            f'fill="{_ACTIONS[slot.action.kind]}"><title>{slot.action}: {duration(slot.start)} to '
            f"{duration(slot.end)}</title></rect>"
        )
        if wide > 16 and high > 14:
            shapes.append(
                f'<text x="{x + wide / 2:.1f}" y="{y + high / 2 + 4:.1f}" text-anchor="middle">'
                f"{slot.action.microbatch}</text>"
            )
    title = f"Pipeline: {plan.job.schedule}, bubble {percent(line.bubble)}"
    shown = "" if len(slots) == len(line.slots) else f" Shown: the first {duration(end)}."
    text = f"{counted(plan.job.microbatches, 'microbatch')} in {duration(line.seconds)}.{shown}"
    titles = {"forward": "F", "backward": "B", "backward of inputs": "I", "of weights": "W"}
    used = {slot.action.kind for slot in slots}
    key = {name: _ACTIONS[kind] for name, kind in titles.items() if kind in used}
    yield _Drawing(title, text, shapes, _WIDTH, ranks * (high + 3), key)
