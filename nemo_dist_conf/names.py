"""Names that appear in more than one layer: axes, strategies, dtypes, schedules. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Callable, Iterable

__all__ = [
    "ACTIVATION_CHECKPOINTING_MODES",
    "BATCH_STATISTICS",
    "DType",
    "HARDWARE",
    "MeshAxisName",
    "OWN_GROUPS",
    "SCHEDULES",
    "STRATEGY_NAMES",
    "Schedule",
    "checkpointing_mode",
    "nearest",
]

#: Strategy -> its aliases; the module nemo_dist_conf.strategies.<name> holds the rest. The default comes first.
STRATEGY_NAMES: dict[str, tuple[str, ...]] = {
    "fsdp2": (),
    "megatron_fsdp": ("megatron-fsdp", "mfsdp"),
    "ddp": (),
}

#: Options of the group ``hardware``; their figures are in schema/hardware.py.
HARDWARE: tuple[str, ...] = ("h100", "h200", "b200", "a100", "mi300x", "cpu")

#: Config groups beside those of the API page -> option -> values that differ from the schema's defaults; the default
#: option comes first. Schemas and rules are in schema/own_groups.py.
OWN_GROUPS: dict[str, dict[str, dict[str, Any]]] = {
    "context": {"default": {}},
}


class MeshAxisName(str, Enum):
    """The axes of a device mesh; each member equals its plain string (``MeshAxisName.TP == "tp"``)."""

    PP = "pp"
    DP = "dp"
    DP_REPLICATE = "dp_replicate"
    DP_SHARD = "dp_shard"
    DP_SHARD_CP = "dp_shard_cp"
    DP_CP = "dp_cp"
    CP = "cp"
    TP = "tp"
    EP = "ep"
    EP_SHARD = "ep_shard"

    def __str__(self) -> str:
        return self.value


class DType(Enum):
    """Floating point types by the name that torch gives them (torch.float32 is ``float32``)."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


#: What ``activation_checkpointing`` accepts: off, every block recomputed, or matmuls and attention saved.
ACTIVATION_CHECKPOINTING_MODES: tuple[bool | str, ...] = (False, True, "selective")

#: What ``batch_statistics`` accepts: of a rank's own rows, or of those of all data ranks.
BATCH_STATISTICS: tuple[str, ...] = ("local", "global")


def checkpointing_mode(value: Any) -> bool | str | None:
    """The mode that a value means; None where it means none.

    ``full`` is what logs and guides call true. A text that says true or false comes from the environment.
    """
    if isinstance(value, bool):
        return value
    words: dict[Any, bool | str] = {"full": True, "true": True, "false": False, "selective": "selective"}
    return words.get(value) if isinstance(value, str) else None


@dataclass(frozen=True)
class Schedule:
    """A pipeline schedule: torch's class name, how many stages a rank holds, and what the plan plays.

    multi: a rank holds several stages. v_shaped: exactly two, the r-th from the front and from the back.
    rounds: microbatches come in equal rounds of pp_size or more. splits_backward: gradients of inputs and of weights
    are computed apart. least: (pp_size, stages) -> microbatches that torch needs. played: ``module:OBJECT``, a
    PlayedSchedule of nemo_dist_conf.plan.schedule_orders; None: the plan refuses the schedule by name.
    """

    torch_name: str
    multi: bool = False
    v_shaped: bool = False
    rounds: bool = False
    splits_backward: bool = False
    least: Callable[[int, int], int] = lambda pp_size, stages: 1
    played: str | None = None


#: Option name of the group ``pipeline`` -> schedule. torch's own class names are accepted as well.
#: Source: torch/distributed/pipelining/schedules.py, get_schedule_class.
SCHEDULES: dict[str, Schedule] = {
    "gpipe": Schedule("GPipe", played="nemo_dist_conf.plan.schedule_orders:GPIPE"),
    "1f1b": Schedule(
        "1F1B", least=lambda pp_size, stages: pp_size, played="nemo_dist_conf.plan.schedule_orders:ONE_F_ONE_B"
    ),
    "interleaved_1f1b": Schedule(
        "Interleaved1F1B", multi=True, rounds=True, played="nemo_dist_conf.plan.schedule_orders:INTERLEAVED_1F1B"
    ),
    "looped_bfs": Schedule("LoopedBFS", multi=True, played="nemo_dist_conf.plan.schedule_orders:LOOPED_BFS"),
    "interleaved_zero_bubble": Schedule(
        "InterleavedZeroBubble",
        multi=True,
        rounds=True,
        splits_backward=True,
        played="nemo_dist_conf.plan.schedule_orders:INTERLEAVED_ZERO_BUBBLE",
    ),
    "zbv_zero_bubble": Schedule(
        "ZBVZeroBubble",
        multi=True,
        v_shaped=True,
        splits_backward=True,
        played="nemo_dist_conf.plan.schedule_orders:ZBV_ZERO_BUBBLE",
    ),
    "dualpipe_v": Schedule(
        "DualPipeV",
        multi=True,
        v_shaped=True,
        splits_backward=True,
        least=lambda pp_size, stages: stages,
        played="nemo_dist_conf.plan.schedule_orders:DUALPIPE_V",
    ),
}


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Known words, those most like ``word`` first, of these the ones that it begins; empty when none is alike.

    Capitals make no difference.
    """
    import difflib  # only for a refusal; every Hydra app of the environment imports this module

    small, names = str(word).lower(), {str(name).lower(): str(name) for name in known}
    found = difflib.get_close_matches(small, names, n=3, cutoff=cutoff)
    return [names[name] for name in sorted(found, key=lambda name: not name.startswith(small))]
