"""Sizes + world size + a strategy's axes -> the shape of the mesh, or every reason why there is none."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any, Mapping

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.names import MeshAxisName as A
from nemo_dist_conf.topology.axes import AXES, Axis, AxisRules
from nemo_dist_conf.wording import Spelling

__all__ = ["LAUNCH", "MeshSpec", "divisors", "model_ranks", "number_problem", "solve"]


#: How ranks are started by hand, when the program's own name is not known.
LAUNCH = "torchrun --nproc-per-node {n} app.py {asked}"


@dataclass(frozen=True)
class MeshSpec:
    """A solved mesh: root axes with their sizes, flattened names, and the MoE mesh over the same ranks.

    The product of ``shape`` is ``world_size``. ``moe_axes`` is empty where ep_size is 1.
    """

    world_size: int
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    flattened: tuple[tuple[str, tuple[str, ...]], ...] = ()
    moe_axes: tuple[str, ...] = ()
    moe_shape: tuple[int, ...] = ()

    def size(self, axis: str) -> int:
        """Ranks along a root, flattened or MoE axis; 1 for an axis that this mesh lacks."""
        sizes = dict(zip(self.axes, self.shape)) | dict(zip(self.moe_axes, self.moe_shape))
        if axis in sizes:
            return sizes[axis]
        return prod(sizes[a] for a in dict(self.flattened).get(axis, ()))

    def describe(self) -> str:
        """``pp 2 x dp_shard 4 x tp 2``: axes above 1, or the data axis alone."""
        parts = [f"{axis} {size}" for axis, size in zip(self.axes, self.shape) if size > 1]
        parts += [f"{axis} {size}" for axis, size in zip(self.moe_axes, self.moe_shape) if axis == A.EP and size > 1]
        return " x ".join(parts) or "1 rank"


def divisors(number: int) -> list[int]:
    """Positive divisors in ascending order."""
    low = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return sorted(set(low) | {number // d for d in low})


def model_ranks(sizes: Mapping[str, Any]) -> int:
    """Ranks that work on the same rows together: pp x cp x tp. A size that is missing or null is 1."""
    return prod(sizes.get(name) or 1 for name in ("pp_size", "cp_size", "tp_size"))


def number_problem(axis: Axis, size: Any, spelling: Spelling = Spelling()) -> Problem | None:
    """What is wrong with the size of an axis by itself; None for a whole number of ranks, or what stands for one."""
    key = f"parallelism.{axis.size_field}"
    if size is None and axis.default is None:
        return None
    if isinstance(size, int) and not isinstance(size, bool) and size >= 1:
        return None
    return Problem(
        what=f"{key}={size!r} is not a number of ranks",
        asked=spelling.set(key, size),
        allowed=f"a whole number, 1 or more{' or null' if axis.default is None else ''}",
        instead=spelling.set(key, axis.default),
    )


def _size_problems(
    sizes: Mapping[str, Any], world_size: int, rules: AxisRules, spelling: Spelling = Spelling(), launch: str = LAUNCH
) -> list[Problem]:
    """What is wrong with the sizes alone: not whole and positive, or an axis that the strategy lacks."""
    problems = []
    for axis in AXES:
        value, key = sizes.get(axis.size_field), f"parallelism.{axis.size_field}"
        problem = number_problem(axis, value, spelling)
        if problem is not None:
            problems.append(problem)
        elif value is not None and axis.name not in rules.allowed and value > 1:
            why = rules.why_not.get(axis.name, f"it has no {axis.title}")
            asked = f"{spelling.choose('strategy', rules.strategy)} {spelling.set(key, value)}"
            instead = f"{spelling.choose('strategy', rules.instead)} {spelling.set(key, value)}"
            if axis.name not in rules.instead_for:
                instead = spelling.set(key, axis.default)
            elif world_size == 1:
                # HSDP needs two ranks or more in each replica.
                ranks = 2 * value if axis.name == "dp_replicate" else value
                instead = launch.format(n=ranks, asked=instead)
            problems.append(
                Problem(
                    what=f"strategy={rules.strategy}: {axis.size_field}={value} is not possible",
                    asked=asked,
                    allowed=f"{axis.size_field}=1 ({rules.strategy} {why})",
                    instead=instead,
                )
            )
    return problems


def solve(
    sizes: Mapping[str, Any], world_size: int, rules: AxisRules, spelling: Spelling = Spelling(), launch: str = LAUNCH
) -> MeshSpec:
    """Mesh shape for these sizes, without touching torch.

    The product of the root axes equals world_size exactly. dp_size None: world_size / (pp x cp x tp).
    launch: the command that starts {n} ranks with the words {asked}, for the refusals.
    Raises ConfigError with all problems: a size that is not a positive whole number, an axis that the
    strategy lacks, or no product that equals world_size.
    """
    problems = _size_problems(sizes, world_size, rules, spelling, launch)
    ConfigError.raise_if(problems)
    tp, pp, cp, ep = (sizes.get(name) or 1 for name in ("tp_size", "pp_size", "cp_size", "ep_size"))
    dp_asked, replicate = sizes.get("dp_size"), sizes.get("dp_replicate_size") or 1
    together = model_ranks(sizes)
    if together > world_size or world_size % together:
        problems.append(_product_problem(sizes, world_size, together, spelling, launch))
        ConfigError.raise_if(problems)
    dp = world_size // together
    if dp_asked is not None and dp_asked != dp:
        problems.append(
            Problem(
                what=f"{_factors(sizes)} = {dp_asked * together} ranks, but there are {world_size}",
                asked=spelling.set("parallelism.dp_size", dp_asked),
                allowed=f"dp_size={dp} or null (world size {world_size} / (pp {pp} x cp {cp} x tp {tp}))",
                instead=launch.format(n=dp_asked * together, asked=_typed(sizes, spelling))
                if world_size == 1
                else spelling.set("parallelism.dp_size", None),
            )
        )
        dp = dp_asked  # further findings should speak of what was asked
    if replicate > 1 and (dp % replicate or replicate >= dp):
        legal = [d for d in divisors(dp) if d < dp]
        problems.append(
            Problem(
                what=f"dp_replicate_size={replicate} does not divide dp_size={dp} into groups of two ranks or more",
                asked=spelling.set("parallelism.dp_replicate_size", replicate),
                allowed=f"dp_replicate_size: {', '.join(map(str, legal)) or 1}",
                instead=spelling.set("parallelism.dp_replicate_size", legal[-1] if legal else 1),
            )
        )
    stage_ranks = dp * cp * tp
    if ep > 1 and stage_ranks % ep:
        problems.append(
            Problem(
                what=f"ep_size={ep} does not divide the {stage_ranks} ranks of a pipeline stage "
                f"(dp {dp} x cp {cp} x tp {tp})",
                asked=spelling.set("parallelism.ep_size", ep),
                allowed=f"ep_size: {', '.join(map(str, divisors(stage_ranks)))}",
                instead=spelling.set("parallelism.ep_size", max(d for d in divisors(stage_ranks) if d <= ep)),
            )
        )
    ConfigError.raise_if(problems)
    known = {A.PP: pp, A.DP: dp, A.DP_REPLICATE: replicate, A.DP_SHARD: dp // replicate, A.CP: cp, A.TP: tp}
    shape = tuple(known[A(axis)] for axis in rules.mesh)
    if prod(shape) != world_size:
        raise AssertionError(f"{dict(zip(rules.mesh, shape))} does not cover {world_size} ranks")
    moe_axes: tuple[str, ...] = ()
    moe_shape: tuple[int, ...] = ()
    if ep > 1:
        moe_axes, moe_shape = (A.EP_SHARD.value, A.EP.value), (stage_ranks // ep, ep)
        if pp > 1:
            moe_axes, moe_shape = (A.PP.value, *moe_axes), (pp, *moe_shape)
    return MeshSpec(world_size, rules.mesh, shape, rules.flattened, moe_axes, moe_shape)


def _factors(sizes: Mapping[str, Any]) -> str:
    named = [(axis.name, sizes.get(axis.size_field)) for axis in AXES if axis.name in ("pp", "dp", "cp", "tp")]
    return " x ".join(f"{name} {size}" for name, size in sorted(named, key=lambda n: "pp dp cp tp".index(n[0])) if size)


def _typed(sizes: Mapping[str, Any], spelling: Spelling) -> str:
    """The sizes that differ from their defaults, as they are typed."""
    given = [(axis, sizes.get(axis.size_field)) for axis in AXES]
    changed = [(axis.size_field, size) for axis, size in given if size not in (None, axis.default)]
    return " ".join(spelling.set(f"parallelism.{name}", size) for name, size in changed)


def _product_problem(
    sizes: Mapping[str, Any], world_size: int, together: int, spelling: Spelling, launch: str
) -> Problem:
    asked_sizes = {f: sizes[f] for f in ("pp_size", "cp_size", "tp_size") if (sizes.get(f) or 1) > 1}
    asked = " ".join(spelling.set(f"parallelism.{name}", size) for name, size in asked_sizes.items())
    needed = together * (sizes.get("dp_size") or 1)
    what = f"pp x cp x tp = {together} does not divide the world size {world_size}"
    if world_size == 1:
        start = launch.format(n=needed, asked=_typed(sizes, spelling))
        return Problem(what=what, asked=asked, allowed=f"{together} ranks or a multiple of it", instead=start)
    # Shrink the innermost axis that can be shrunk: it is the one a user varies most.
    for name in reversed(asked_sizes):
        rest = together // asked_sizes[name]
        legal = [d for d in divisors(world_size) if world_size % (rest * d) == 0]
        if legal:
            best = max((d for d in legal if d <= asked_sizes[name]), default=1)
            allowed = f"{name}: {', '.join(map(str, legal))} with {world_size} ranks"
            return Problem(what=what, asked=asked, allowed=allowed, instead=spelling.set(f"parallelism.{name}", best))
    legal = divisors(world_size)
    reset = " ".join(spelling.set(f"parallelism.{name}", 1) for name in asked_sizes)
    return Problem(what=what, asked=asked, allowed=f"pp x cp x tp: {', '.join(map(str, legal))}", instead=reset)
