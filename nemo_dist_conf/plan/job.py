"""What is planned: a checked config, a model's shape, a batch and a machine, as plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any, Mapping

from nemo_dist_conf.families.built_shape import BuiltShape
from nemo_dist_conf.families.shapes import ModelShape
from nemo_dist_conf.families.styles import SEQUENCE_STYLES, match_pattern, unalias
from nemo_dist_conf.names import SCHEDULES
from nemo_dist_conf.plan.schedule_orders import PlayedSchedule, from_file, played_schedule, unknown_schedule
from nemo_dist_conf.plan.strategy_costs import costs_of
from nemo_dist_conf.schema.hardware import HardwareConf
from nemo_dist_conf.schema.own_groups import default_groups
from nemo_dist_conf.strategies import Strategy
from nemo_dist_conf.topology.recomputed_modules import recomputed_names
from nemo_dist_conf.topology.schedule_file import read_schedule
from nemo_dist_conf.topology.schedule_rules import find_schedule, stage_count
from nemo_dist_conf.topology.solve import MeshSpec
from nemo_dist_conf.topology.stage_layers import rank_of_stage, spread_layers

if TYPE_CHECKING:
    from nemo_dist_conf.plan.strategies.base import StrategyCosts

__all__ = ["DTYPE_BYTES", "Dtypes", "Job", "Stage", "Styles", "Update"]

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Update:
    """The optimizer. states: float32 tensors that it keeps for each parameter; scalars: numbers of 4 bytes beside.

    of_groups: settings on which states depend that groups of parameters have of their own, which are not counted.
    """

    name: str = "adamw"
    states: int = 2
    scalars: int = 1
    fused: bool = False
    of_groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Dtypes:
    """Dtypes by name: of gathered parameters, of gradients as they are reduced, of logits (None: as computed)."""

    param: str = "float32"
    reduce: str = "float32"
    output: str | None = None


@dataclass(frozen=True)
class Stage:
    """What a pipeline stage holds: layers first to last - 1, and the parts outside of layers."""

    index: int
    rank: int
    first: int
    last: int
    outer: tuple[str, ...]

    @property
    def layers(self) -> int:
        return self.last - self.first


class Styles:
    """Tensor-parallel styles by a parameter's name, each looked up once; equal only to itself, so quick to hash.

    plan: pattern -> style, or several of one module. An entry that names one module overrules a pattern.
    """

    def __init__(self, plan: Mapping[str, str | tuple[str, ...]]) -> None:
        several = ((pattern, (style,) if isinstance(style, str) else style) for pattern, style in plan.items())
        self.plan = {pattern: tuple(map(unalias, styles)) for pattern, styles in several}
        self._patterns = {p: styles for p, styles in self.plan.items() if any(sign in p for sign in "*?[")}
        self._known: dict[str, str] = {}
        self._of_modules: dict[str, tuple[str, ...]] = {}

    def of(self, parameter: str) -> str:
        """The style of a parameter, or of its module; ``replicated`` where no pattern means either."""
        if parameter not in self._known:
            places = (parameter, parameter.rpartition(".")[0])
            found = (styles[0] for place in places if (styles := self.of_module(place)))
            self._known[parameter] = next(found, "replicated")
        return self._known[parameter]

    def of_module(self, name: str) -> tuple[str, ...]:
        """The styles of exactly this module or parameter; empty where no pattern means it."""
        if name not in self._of_modules:
            found = (styles for pattern, styles in self._patterns.items() if match_pattern(pattern, name))
            self._of_modules[name] = self.plan[name] if name in self.plan else next(found, ())
        return self._of_modules[name]

    @cached_property
    def splits_sequence(self) -> bool:
        return any(style in SEQUENCE_STYLES for styles in self.plan.values() for style in styles)


@lru_cache(maxsize=64)
def _own_styles(model: ModelShape | BuiltShape, sequence_parallel: bool) -> Styles:
    return Styles(model.plan(sequence_parallel))


_NO_STYLES = Styles({})


@dataclass(frozen=True)
class Job:
    """Everything that the formulas of a plan need.

    rows, seq_len: of a microbatch on a data rank, [rows, tokens]. microbatches: of a step on a data rank.
    calls: times a step hands rows to a pipeline; 1 without one. options: values of the strategy node by field.
    untrained: names of parameters that have no gradient and no state of the optimizer.
    """

    strategy: Strategy
    options: Mapping[str, Any]
    mesh: MeshSpec
    model: ModelShape | BuiltShape
    hardware: HardwareConf
    rows: int = 1
    seq_len: int = 1024
    microbatches: int = 1
    calls: int = 1
    pipeline: Mapping[str, Any] = field(default_factory=dict)
    moe: Mapping[str, Any] = field(default_factory=dict)
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=default_groups)
    checkpointing: bool | str = False
    autocast: str | None = None
    update: Update = Update()
    untrained: frozenset[str] = frozenset()

    @cached_property
    def costs(self) -> StrategyCosts:
        """What the strategy costs. Raises ConfigError for one that the plan knows nothing of."""
        return costs_of(self.strategy)

    # ------------------------------------------------------------------------------------------------ sizes

    @cached_property
    def tp(self) -> int:
        return self.mesh.size("tp")

    @cached_property
    def cp(self) -> int:
        return self.mesh.size("cp")

    @cached_property
    def context_method(self) -> str:
        """As ``context.method`` was asked for."""
        method: str = self.groups["context"]["method"]
        return method

    @cached_property
    def pp(self) -> int:
        return self.mesh.size("pp")

    @cached_property
    def ep(self) -> int:
        return self.mesh.size("ep")

    @cached_property
    def ep_shard(self) -> int:
        return self.mesh.size("ep_shard") if self.ep > 1 else 1

    @cached_property
    def replicas(self) -> int:
        """Copies of the sharded model: HSDP's."""
        return self.mesh.size("dp_replicate")

    @cached_property
    def data_size(self) -> int:
        """Parts of the global batch."""
        return self.mesh.size("dp")

    @cached_property
    def shards(self) -> int:
        """Ranks over which parameters, or what ZeRO shards, are split."""
        return self.costs.shards(self)

    @cached_property
    def global_rows(self) -> int:
        return self.rows * self.microbatches * self.calls * self.data_size

    @cached_property
    def tokens(self) -> int:
        """Tokens of a microbatch on one rank: rows x seq_len / cp."""
        return self.rows * self.seq_len // self.cp

    # ------------------------------------------------------------------------------------------------ dtypes

    @cached_property
    def _dtypes(self) -> Dtypes:
        return self.costs.dtypes(self.options)

    @cached_property
    def param_dtype(self) -> str:
        """Dtype of gathered parameters."""
        return self._dtypes.param

    @cached_property
    def compute_dtype(self) -> str:
        """Dtype of matrix products: the gathered parameters', or autocast's."""
        return self.autocast or self.param_dtype

    @cached_property
    def reduce_dtype(self) -> str:
        return self._dtypes.reduce

    @cached_property
    def output_dtype(self) -> str:
        """Dtype of the logits that the model returns."""
        return self._dtypes.output or self.compute_dtype

    # ------------------------------------------------------------------------------------------------ techniques

    @cached_property
    def sequence_parallel(self) -> bool:
        return self.styles.splits_sequence or self.follows_stream

    @cached_property
    def follows_stream(self) -> bool:
        """Whether no style says how the sequence is split, so that the model itself is asked when it is built."""
        return self.tp > 1 and bool(self.options.get("sequence_parallel")) and not self.styles.splits_sequence

    @cached_property
    def styles(self) -> Styles:
        """The plan of tensor parallelism: the user's, else the model's own; empty without it."""
        if self.tp == 1:
            return _NO_STYLES
        given = self.options.get("tp_plan")
        if given:
            return Styles({str(key): str(style) for key, style in dict(given).items()})
        return _own_styles(self.model, bool(self.options.get("sequence_parallel")))

    @cached_property
    def compiled(self) -> bool:
        """Whether blocks are compiled."""
        return bool(self.options.get("enable_compile"))

    @cached_property
    def _recomputed(self) -> frozenset[str]:
        """Names of the modules that run again in backward, where that are not all blocks. Raises ConfigError for names
        that the model has not; of a family whose row has shapes, blocks alone are known."""
        model, values = self.model, self.groups["recompute"]
        names = [model.block_name(layer) for layer in range(model.layers)]
        if isinstance(model, BuiltShape):
            return frozenset(recomputed_names(names, model.words, values, model.inside))
        return frozenset(recomputed_names(names, dict.fromkeys(names, "language"), values))

    @cached_property
    def recomputed(self) -> tuple[bool, ...]:
        """Of each layer, whether all of it runs again in backward."""
        if self.checkpointing is False or self.groups["recompute"] == default_groups()["recompute"]:
            return (self.checkpointing is not False,) * self.model.layers
        return tuple(self.model.block_name(layer) in self._recomputed for layer in range(self.model.layers))

    @cached_property
    def recomputed_inside(self) -> tuple[str, ...]:
        """Names of the modules inside of blocks that run again alone."""
        if self.checkpointing is False or not self.groups["recompute"]["modules"]:
            return ()
        return tuple(sorted(self._recomputed - {self.model.block_name(layer) for layer in range(self.model.layers)}))

    def recomputed_share(self, stage: Stage) -> float:
        """The part of a stage's blocks that runs again in backward, by the weights in it."""
        layers = range(stage.first, stage.last)
        if not self.recomputed_inside:
            return sum(self.recomputed[stage.first : stage.last]) / max(1, len(layers))
        again = total = 0
        for layer in layers:
            for weight in self.model.block_weights(self.model.kind(layer)):
                name = f"{self.model.block_name(layer)}.{weight.name}"
                total += weight.count
                again += weight.count * (self.recomputed[layer] or self.is_recomputed(name))
        return again / max(1, total)

    def is_recomputed(self, parameter: str) -> bool:
        """Whether a parameter is of a module inside of a block that runs again alone."""
        return any(parameter.startswith(f"{module}.") for module in self.recomputed_inside)

    # ------------------------------------------------------------------------------------------------ stages

    @cached_property
    def schedule(self) -> str:
        """The option name of the pipeline's schedule, or ``file``. Raises ConfigError for a name that is none."""
        if self.pipeline.get("pp_schedule_csv") is not None:
            return "file"
        asked = str(self.pipeline.get("pp_schedule"))
        found = find_schedule(asked)
        names = [name for name, schedule in SCHEDULES.items() if schedule is found]
        if not names:
            raise unknown_schedule(asked)
        return names[0]

    @cached_property
    def played(self) -> PlayedSchedule:
        """How the plan plays the schedule. Raises ConfigError for one whose row does not say."""
        if self.schedule == "file":
            return from_file(read_schedule(self.pipeline["pp_schedule_csv"]))
        return played_schedule(self.schedule)

    @cached_property
    def splits_backward(self) -> bool:
        """Whether the schedule computes gradients of inputs and of weights apart."""
        if self.schedule == "file":
            return read_schedule(self.pipeline["pp_schedule_csv"]).splits_backward
        return SCHEDULES[self.schedule].splits_backward

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """All stages of the pipeline; one that holds everything where there is none."""
        outer = ("embedding", "final_norm") if self.model.tied else ("embedding", "final_norm", "head")
        if self.pp == 1:
            return (Stage(0, 0, 0, self.model.layers, outer),)
        if self.schedule == "file":
            ranks: tuple[int, ...] = read_schedule(self.pipeline["pp_schedule_csv"]).ranks
            count = len(ranks)
        else:
            count = stage_count(self.pipeline, self.pp, self.model.layers) or self.pp
            v_shaped = SCHEDULES[self.schedule].v_shaped
            ranks = tuple(rank_of_stage(stage, count, self.pp, v_shaped) for stage in range(count))
        parts = self.pipeline.get("module_fqns_per_model_part")
        if parts is not None:
            return tuple(_named_stage(index, ranks[index], list(part), self.model) for index, part in enumerate(parts))
        found, first = [], 0
        weighted = self.pipeline.get("layers_per_stage") is None
        for index, layers in enumerate(spread_layers(self.model.layers, count, weighted)):
            held = ("embedding",) * (index == 0) + ("final_norm", "head") * (index == count - 1)
            found.append(Stage(index, ranks[index], first, first + layers, held))
            first += layers
        return tuple(found)

    def stages_of(self, pp_rank: int) -> list[Stage]:
        return [stage for stage in self.stages if stage.rank == pp_rank]


def _named_stage(index: int, rank: int, names: list[str], model: ModelShape | BuiltShape) -> Stage:
    """A stage given by the names of its modules; layers are those whose last part is a number."""
    numbers = sorted(int(leaf) for leaf in (name.rpartition(".")[2] for name in names) if leaf.isdigit())
    return Stage(index, rank, numbers[0] if numbers else 0, numbers[-1] + 1 if numbers else 0, model.parts_named(names))
