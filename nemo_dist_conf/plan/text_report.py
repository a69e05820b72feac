"""A plan as text for a terminal of 120 columns."""

from __future__ import annotations

from typing import Sequence

from nemo_dist_conf.families.built_shape import BuiltShape
from nemo_dist_conf.plan.context_methods import context_shown
from nemo_dist_conf.plan.fit import NO, usable_bytes
from nemo_dist_conf.plan.memory import Memory
from nemo_dist_conf.plan.plan import Plan
from nemo_dist_conf.plan.search import Result
from nemo_dist_conf.plan.step_time import FORMULAS

__all__ = ["amount", "columns", "count_of", "counted", "duration", "found_table", "percent", "summary", "table"]


def amount(size: float) -> str:
    """1.5 GiB, 12.0 MiB or 96 B."""
    for unit, name in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size:,.0f} B"


def count_of(number: float) -> str:
    """8.03 B, 2.5 M or 12,345."""
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if number >= unit:
            return f"{number / unit:,.2f} {name}"
    return f"{number:,.0f}"


def counted(number: int, what: str) -> str:
    """``1 rank``, ``2,048 ranks``, ``2 microbatches``."""
    plural = f"{what}es" if what.endswith(("ch", "s")) else f"{what}s"
    return f"{number:,} {what if number == 1 else plural}"


def percent(part: float) -> str:
    """12.3 %; 0.02 % where a tenth would be nothing."""
    return f"{100 * part:.1f} %" if part >= 0.0005 or not part else f"{100 * part:.2g} %"


def duration(seconds: float) -> str:
    """1.25 s, 12.5 ms or 80 us."""
    if seconds >= 1:
        return f"{seconds:,.2f} s"
    return f"{1e3 * seconds:,.1f} ms" if seconds >= 1e-3 else f"{1e6 * seconds:,.0f} us"


def columns(rows: Sequence[Sequence[str]], indent: str = "  ") -> list[str]:
    """Rows as lines, every column as wide as its widest cell; the first row is the heading."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [(indent + "  ".join(cell.ljust(n) for cell, n in zip(row, widths))).rstrip() for row in rows]


def table(plan: Plan, formulas: bool = False) -> str:
    """Layout, memory, traffic, time and verdict."""
    parts = [_head(plan), _topology(plan), _memory(plan), _traffic(plan), _time(plan), _verdict(plan)]
    if formulas:
        parts.append(["formulas", *columns([(name, text) for name, text in FORMULAS.items()])])
        parts[-1].append(f"  hardware: {plan.job.hardware.source}")
    return "\n\n".join("\n".join(part) for part in parts)


def summary(plan: Plan) -> str:
    """One line: memory, time and verdict."""
    job, step = plan.job, plan.step
    return (
        f"{amount(plan.most.peak)} of {job.hardware.memory_gib:g} GiB ({plan.verdict}), "
        f"{duration(step.seconds)} a step, {step.tokens_per_second:,.0f} tokens/s, MFU {percent(step.mfu)}"
    )


def _head(plan: Plan) -> list[str]:
    job = plan.job
    model, mesh = job.model, job.mesh
    active = ""
    if model.experts and model.experts_per_token:
        active = f" ({count_of(model.active_parameters)} for a token)"
    nodes = -(-mesh.world_size // job.hardware.ranks_per_node)
    rows = f"{counted(job.global_rows, 'row')} x {counted(job.seq_len, 'token')}"
    runs = counted(job.microbatches * job.calls, "microbatch")
    ranks = f"{counted(mesh.world_size, 'rank')} on {counted(nodes, 'node')}"
    layers = counted(model.layers, "layer")
    facts = [
        ("model", f"{model.model_type}, {count_of(model.parameters)} parameters{active}, {layers}"),
        ("layout", f"{job.strategy.name}, {mesh.describe()} ({ranks})"),
        ("batch", f"{rows}: {counted(job.data_size, 'data rank')} x {runs} x {counted(job.rows, 'row')}"),
        ("hardware", f"{job.hardware.name}, {job.hardware.memory_gib:g} GiB, {job.compute_dtype}"),
    ]
    if job.cp > 1:
        facts.append(("context", context_shown(job)))
    source = [("read off", model.source)] if isinstance(model, BuiltShape) else []
    return columns([facts[0], *source, *facts[1:]], "")


def _topology(plan: Plan) -> list[str]:
    rows = [("axis", "size", "groups", "nodes", "first group")]
    for group in plan.groups:
        members = group.members(0) if group.size <= 4096 else group.members(0)[:4]
        shown = ", ".join(map(str, members[:4])) + (", ..." if group.size > 4 else "")
        where = "inside one" if group.inside_nodes else f"{group.nodes:,}"
        rows.append((group.axis, f"{group.size:,}", f"{group.count:,}", where, shown))
    return ["groups", *columns(rows)] if len(rows) > 1 else ["groups", "  one rank"]


def _memory(plan: Plan) -> list[str]:
    def row(title: str, memory: Memory) -> tuple[str, ...]:
        names = ("parameters", "gradients", "optimizer", "activations", "gathered", "working")
        return (title, *(amount(getattr(memory, name)) for name in names), amount(memory.peak), memory.moment)

    heading = ("", "parameters", "gradients", "optimizer", "activations", "gathered", "working", "peak", "at")
    where = " (pp rank {})" if plan.job.pp > 1 else ""
    rows = [heading, row("most" + where.format(plan.most.pp_rank), plan.most)]
    if plan.least != plan.most:
        rows.append(row("least" + where.format(plan.least.pp_rank), plan.least))
    lines = ["memory of a rank", *columns(rows)]
    if plan.most.host:
        lines.append(f"  in host memory: {amount(plan.most.host)}")
    return lines


def _traffic(plan: Plan) -> list[str]:
    rows = [("axis", "collective", "calls", "each", "in all", "when", "of")]
    for e in sorted(plan.traffic, key=lambda e: -e.bytes):
        rows.append((e.axis, e.kind, f"{e.calls:,}", amount(e.size), amount(e.bytes), e.when, e.why))
    return ["traffic of a step", *columns(rows)] if len(rows) > 1 else ["traffic of a step", "  none"]


def _time(plan: Plan) -> list[str]:
    step = plan.step
    parts = {name: f"{100 * value / step.seconds:.0f} %" for name, value in step.parts.items() if value}
    speed = f"{step.tokens_per_second:,.0f} tokens/s, MFU {percent(step.mfu)}"
    lines = [f"step  about {duration(step.seconds)}, {speed}"]
    if step.timeline is not None:
        lines.append(f"  bubble of {plan.job.schedule}: {percent(step.bubble)} of all ranks' time in the pipeline")
    whose = "of the busiest pp rank's step: " if plan.job.pp > 1 else ""
    return [*lines, f"  {whose}" + ", ".join(f"{name} {part}" for name, part in parts.items())]


def _verdict(plan: Plan) -> list[str]:
    room_gib = usable_bytes(plan.job.hardware) / 2**30
    lines = [f"{plan.verdict}: {amount(plan.most.peak)} of {room_gib:.1f} GiB that are free for torch"]
    lines += [f"  not counted  {note}" for note in plan.notes]
    lines += [f"  a run tries  {one}" for one in plan.tried]
    ways = plan.ways_out()
    if ways:
        lines += [f"  type  {way}" for way in ways]
    elif plan.verdict == NO:
        lines.append("  more ranks, or another layout: plan.search=true lists those that fit")
    return lines


def found_table(result: Result) -> str:
    """The best layouts, with the words that choose them."""
    head = f"{result.allowed:,} layouts that the rules allow, {result.fitting:,} fit"
    left_out = [f"not searched  strategy={name}: the plan does not know what it costs" for name in result.left_out]
    rows = [("", "step", "MFU", "peak", "type")]
    for place, one in enumerate(result.best, 1):
        step, peak = one.plan.step, one.plan.most.peak
        rows.append((f"{place}.", duration(step.seconds), percent(step.mfu), amount(peak), one.words))
    return "\n".join([head, *columns(rows), *left_out])
