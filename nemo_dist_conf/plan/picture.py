"""A plan as one HTML file with drawings in it, for any browser, without a script or anything from outside.

Ranks in their nodes coloured by group, memory as bars, the pipeline as a time line.
"""

from __future__ import annotations

import html
import math
from typing import Iterable, Iterator, Sequence

from nemo_dist_conf.plan.memory import Memory
from nemo_dist_conf.plan.plan import FITS, NO, Plan
from nemo_dist_conf.plan.ranks import Groups
from nemo_dist_conf.plan.report import amount, duration, table
from nemo_dist_conf.plan.schedule import Slot

__all__ = ["picture"]

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


def picture(plan: Plan) -> str:
    """The plan as a page of HTML."""
    job = plan.job
    mark = {FITS: "fits", NO: "no"}.get(plan.verdict, "tight")
    title = f"{job.strategy}, {job.mesh.describe()}, {job.mesh.world_size:,} ranks"
    body = [
        f"<h1>{html.escape(title)}</h1>",
        f"<p>{html.escape(job.model.model_type)}, {job.model.parameters / 1e9:,.2f} B parameters on "
        f'{html.escape(job.hardware.name)}: <strong class="{mark}">{plan.verdict}</strong>, '
        f"about {duration(plan.step.seconds)} a step, {plan.step.tokens_per_second:,.0f} tokens/s, "
        f"MFU {100 * plan.step.mfu:.1f} %</p>",
        *_rank_maps(plan),
        *_memory_bars(plan),
        *_timeline(plan),
        "<h2>All numbers</h2>",
        f"<pre>{html.escape(table(plan, formulas=True))}</pre>",
    ]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


# ---------------------------------------------------------------------------------------------------- ranks


def _rank_maps(plan: Plan) -> Iterator[str]:
    for group in plan.groups or [Groups("rank", plan.job.mesh.world_size, (), plan.job.hardware.ranks_per_node)]:
        where = "every group inside one node" if group.inside_nodes else f"a group touches {group.nodes:,} nodes"
        count = f"{group.count:,} groups of {group.size:,}" if group.size > 1 else "one rank"
        yield f"<h2>{group.axis}: {count}</h2>"
        yield f"<p>One colour a group (colours come again); {where}. Rank 0's group is outlined.</p>"
        yield _rank_map(group)


def _rank_map(group: Groups) -> str:
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
    note = f"<p>{left:,} more ranks go on like this.</p>" if left > 0 else ""
    return _svg(shapes, across * (per_node * cell + gap), down * (high + 5)) + note


def _first_groups(group: Groups, ranks: int) -> Iterable[int]:
    """First ranks of the groups that the drawn ranks are in, in order."""
    return dict.fromkeys(group.first_of(rank) for rank in range(ranks))


def _ink(colour: int) -> str:
    return "#000" if _COLOURS[colour] in ("#e69f00", "#56b4e9", "#f0e442") else "#fff"


# ---------------------------------------------------------------------------------------------------- memory


def _memory_bars(plan: Plan) -> Iterator[str]:
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
            size = getattr(memory, name) if name in _counted(memory) else 0
            wide = size / _GIB * scale
            if wide > 0:
                shapes.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="18" fill="{colour}">'
                    f"<title>{name} {amount(size)}</title></rect>"
                )
            x += wide
        shapes.append(f'<text x="{x + 6:.1f}" y="{y + 14}">{memory.peak_gib:.2f} GiB</text>')
    for limit, dash in ((whole, ""), (plan.room / _GIB, ' stroke-dasharray="4 3"')):
        x = 110 + limit * scale
        shapes.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="-4" y2="{len(rows) * 24}" stroke="#a02000"{dash}/>')
    yield "<h2>Memory of a rank at its peak</h2>"
    yield f"<p>Lines: {whole:g} GiB of the hardware, and (dashed) what of it is free for torch.</p>"
    yield _key(_PARTS)
    yield _svg(shapes, _WIDTH, len(rows) * 24 + 4)


def _counted(memory: Memory) -> set[str]:
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
    return max(memory.peak, sum(getattr(memory, name) for name in _counted(memory)))


# ---------------------------------------------------------------------------------------------------- time


def _timeline(plan: Plan) -> Iterator[str]:
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
    yield f"<h2>Pipeline: {html.escape(plan.job.schedule)}, bubble {100 * line.bubble:.1f} %</h2>"
    shown = "" if len(slots) == len(line.slots) else f" Shown: the first {duration(end)}."
    yield f"<p>{plan.job.microbatches} microbatches in {duration(line.seconds)}.{shown}</p>"
    titles = {"forward": "F", "backward": "B", "backward of inputs": "I", "of weights": "W"}
    used = {slot.action.kind for slot in slots}
    yield _key({title: _ACTIONS[kind] for title, kind in titles.items() if kind in used})
    yield _svg(shapes, _WIDTH, ranks * (high + 3))


def _key(colours: dict[str, str]) -> str:
    marks = (f'<span><i style="background:{colour}"></i>{name}</span>' for name, colour in colours.items())
    return f'<p class="key">{"".join(marks)}</p>'


def _svg(shapes: Sequence[str], width: float, height: float) -> str:
    return (
        f'<svg viewBox="-2 -6 {width + 4:.0f} {height + 10:.0f}" width="{width + 4:.0f}" height="{height + 10:.0f}" '
        f'xmlns="http://www.w3.org/2000/svg">' + "".join(shapes) + "</svg>"
    )
