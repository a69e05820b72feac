"""Which layers a pipeline stage holds, and which rank holds which stage. Integers only."""

from __future__ import annotations

__all__ = ["rank_of_stage", "spread_layers", "stages_for"]


def spread_layers(num_layers: int, stages: int, weighted: bool = True) -> list[int]:
    """Layers of every stage, in order; each stage has one or more.

    weighted: embedding and head count as a layer each, on the first and on the last stage. What does not divide goes
    to the last stages, which hold the fewest activations at a time.
    Needs 1 <= stages <= num_layers.
    """
    if stages == 1:
        return [num_layers]
    extra = 1 if weighted else 0
    load, rest = divmod(num_layers + 2 * extra, stages)
    loads = [load] * stages
    # The ends first: with one layer a stage they are the only ones to have room for embedding and head.
    for stage in [stages - 1, 0, *range(stages - 2, 0, -1)][:rest]:
        loads[stage] += 1
    loads[0] -= extra
    loads[-1] -= extra
    return loads


def stages_for(num_layers: int, layers_per_stage: int, pp_size: int, rounding: str | None) -> int:
    """Stages that ``layers_per_stage`` asks for, rounded "up" or "down" to a multiple of pp_size, or not (None)."""
    stages = -(-num_layers // layers_per_stage)
    if rounding == "up":
        return -(-stages // pp_size) * pp_size
    if rounding == "down":
        return max(pp_size, stages // pp_size * pp_size)
    return stages


def rank_of_stage(stage: int, stages: int, pp_size: int, v_shaped: bool = False) -> int:
    """The pipeline rank that holds a stage: round after round, or in a V, so that rank 0 holds the first and the last.

    Source: torch/distributed/pipelining/_utils.py, generate_stage_to_rank_mapping.
    """
    if not v_shaped:
        return stage % pp_size
    return stage if stage < pp_size else stages - 1 - stage
