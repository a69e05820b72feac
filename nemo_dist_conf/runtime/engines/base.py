"""What a strategy is at run time: the protocol of its engine, and the engine of a model."""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from typing import TYPE_CHECKING, Any, ClassVar, Collection, Literal, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from nemo_dist_conf.names import MeshAxisName as A
from nemo_dist_conf.runtime.model.blocks import Blocks
from nemo_dist_conf.runtime.techniques.precision import tell_precision
from nemo_dist_conf.schema.own_groups import default_groups
from nemo_dist_conf.strategies import STRATEGIES

if TYPE_CHECKING:
    from nemo_dist_conf.runtime.engines.averaged_gradients import Averaged
    from nemo_dist_conf.runtime.model.build import Built, Fill
    from nemo_dist_conf.runtime.techniques.expert.parallel import SplitExperts
    from nemo_dist_conf.runtime.typed_configs import MoEParallelizerConfig, PipelineConfig

__all__ = ["Engine", "engine_of", "reduces_without_gradient", "register", "unwrapped"]


class Engine:
    """How one strategy executes a model: subclassed once a strategy, named by its row (``Strategy.engine``).

    The first half is asked while a model is parallelised (runtime/parallelize.py); the second half of a model that is
    wrapped already, by the loop, the checkpoints and averaged weights. The defaults are those of a module that nothing
    wraps: every rank has all of it, and nothing reduces its gradients.

    One engine belongs to one wrapped model and must not hold it, so that it can be freed.
    """

    #: The strategy's name, as the log says it.
    name: ClassVar[str] = "plain"
    #: Whether a model that was built without values gets them before it is sharded (every rank whole tensors), or
    #: after (every rank its shards).
    fill_when: ClassVar[Literal["before_sharding", "after_sharding"]] = "after_sharding"
    #: Whether ``parallelize`` makes a model that has its values equal to rank 0's.
    makes_equal: ClassVar[bool] = True
    #: Whether sums of gradients are added up in another order after the first backward.
    first_backward_differs: ClassVar[bool] = False

    def __init__(
        self,
        config: Any = None,
        device_mesh: DeviceMesh | None = None,
        moe_mesh: DeviceMesh | None = None,
        *,
        pipeline: PipelineConfig | None = None,
        moe: MoEParallelizerConfig | None = None,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """config: the strategy's typed config; None for a model that somebody else has wrapped.

        device_mesh, moe_mesh: as in ``MeshContext``. pipeline: split the model into stages over the axis pp; None: on
        a mesh with that axis the model is taken to be a stage already. moe: how split experts are wrapped.
        groups: as in ``Checked``, of groups that are ours beyond the page's; None: all at their defaults.
        """
        self.config, self.device_mesh, self.moe_mesh = config, device_mesh, moe_mesh
        self.pipeline, self.moe = pipeline, moe
        self.groups: Mapping[str, Mapping[str, Any]] = default_groups() if groups is None else groups
        names = (device_mesh.mesh_dim_names or ()) if device_mesh is not None else ()
        #: Ranks of each named axis of the root mesh.
        self.sizes: Mapping[str, int] = {name: device_mesh.size(i) for i, name in enumerate(names) if device_mesh}

    # ------------------------------------------------------------------------------------- while it is parallelised

    @classmethod
    def whole_up_to(cls, options: Mapping[str, Any]) -> float:
        """Elements of parameters up to which a model has all its values before it is parallelised.

        options: the strategy's checked values, by field.
        """
        return 0

    @property
    def replicas(self) -> Sequence[dist.ProcessGroup]:
        """Groups of ranks that compute the same layers: over all axes but pp."""
        return [self._mesh.get_group(index) for index in self._axes_but(A.PP)]

    @property
    def data_ranks(self) -> int:
        """Ranks that see different tokens."""
        return math.prod(self._mesh.size(index) for index in self._axes_but(A.PP, A.TP))

    def device(self, model: nn.Module) -> torch.device:
        """Where the model computes."""
        return torch.device(self._mesh.device_type)

    @property
    def fill_device(self) -> torch.device | None:
        """Where values are put that a model was built without; None: where it computes."""
        return None

    def refuse(self, model: nn.Module) -> None:
        """Raise ConfigError for what this strategy cannot do with a plain model, or on this machine."""

    def split_tensors(self, model: nn.Module, example: Mapping[str, Any] | None, apart: Sequence[str]) -> None:
        """Tensor parallelism over the axis tp, in place. apart: names of modules that another axis splits."""
        from nemo_dist_conf.runtime.techniques.tensor.parallel import apply_tensor_parallel

        apply_tensor_parallel(model, self._mesh[A.TP.value], example=example, apart=apart)

    def how_to_fill(self, built: Built, fill: Fill) -> Fill:
        """What gives a model its values, in place of ``fill`` where the strategy's library does it in a way of its own.

        Raises ConfigError for a model that cannot be filled so.
        """
        return fill

    def after_split(self, model: nn.Module) -> None:
        """What a library needs of parameters that tensor parallelism has split, once they may have their values."""

    def set_precision(self, model: nn.Module) -> None:
        """Casts that stand around forwards, and a line of the log."""
        dtype = self.autocast_dtype
        tell_precision(self.name, model, dtype, said_by="strategy.autocast_dtype" if dtype is not None else None)

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        return getattr(self.config, "autocast_dtype", None)

    @property
    def compiles_blocks(self) -> bool:
        return bool(getattr(self.config, "enable_compile", False))

    @property
    def dtype_between_stages(self) -> torch.dtype | None:
        """What pipeline stages hand on, where the pipeline's config does not say; None: what their blocks return."""
        return None

    @property
    def reduces_every_backward(self) -> bool:
        """Whether gradients are reduced in the backward of every microbatch, not once a step."""
        return False

    def shard(self, model: nn.Module, blocks: Blocks, experts: SplitExperts | None) -> nn.Module:
        """The model wrapped, or sharded in place. blocks: by name. experts: those that are split over the axis ep."""
        return model

    def shard_stage(
        self, stage: nn.Module, blocks: Blocks, experts: SplitExperts | None, is_last: bool
    ) -> Averaged | None:
        """Shard one pipeline stage in place; returns what averages gradients that nothing else reduces.

        Called for strategies whose axes allow pp only.
        """
        raise NotImplementedError(f"strategy={self.name} allows the axis pp and shards no stages")

    def finish(self, wrapped: nn.Module) -> None:
        """What remains to be done with a model that is sharded and has its values."""

    # ------------------------------------------------------------------------------------------- of a wrapped model

    @classmethod
    def owns(cls, model: nn.Module) -> bool:
        """Whether somebody has wrapped this module in the way of this strategy."""
        return False

    def inner(self, model: nn.Module) -> nn.Module | None:
        """The module that the wrapper holds; None where the model is wrapped in place, or not at all."""
        return model.module if isinstance(model, nn.DataParallel) else None

    def model_name(self, model: nn.Module) -> str:
        """Name of the user's class."""
        return type(unwrapped(model)).__name__

    def microbatch(self, model: nn.Module, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around the forward and backward of one microbatch; ``last`` for the step's last one."""
        return contextlib.nullcontext()

    def finish_gradients(self, model: nn.Module) -> None:
        """Let the gradients of a step be those of all ranks, in ``.grad``. Raises ConfigError where they are not."""

    @classmethod
    def reduces_without_gradient(cls, parameter: torch.Tensor) -> bool:
        """Whether a rank without a gradient of this parameter takes part in its norm, because others may have one."""
        return False

    def note_norm(self, model: nn.Module, norm: torch.Tensor) -> None:
        """The norm of this step's gradients, so that it need not be measured a second time."""

    def adopt_optimizer(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimizer over a wrapped model's parameters, made to do what the strategy needs of its ``step``."""
        return optimizer

    def show_shards(self, model: nn.Module) -> None:
        """Put this rank's shards into the model, where a forward may have left whole ones; every rank calls it."""

    def weights_changed(self, model: nn.Module) -> None:
        """Somebody else than the optimizer has changed values of parameters: let forward see them."""

    def replica_groups(self, model: nn.Module) -> Sequence[dist.ProcessGroup]:
        """Groups over which, one after the other, all ranks are reached that hold the same part of the model."""
        world = dist.group.WORLD
        return [world] if world is not None and world.size() > 1 else []

    def stage_mesh(self, model: nn.Module) -> DeviceMesh | None:
        """The axis over whose ranks different modules of the model lie; None where every rank has all of them."""
        return None

    def stages(self, model: nn.Module) -> tuple[Any, ...]:
        """A row for each pipeline stage (``StageRow``); none of a model without."""
        return ()

    def counted_elsewhere(self, model: nn.Module) -> Collection[int]:
        """ids of parameters that a rank of another stage has too, and counts where each is counted once."""
        return ()

    def on_several_stages(self, model: nn.Module) -> Collection[str]:
        """Names of parameters that ranks of several stages have."""
        return ()

    def parts(self, model: nn.Module) -> list[nn.Module]:
        """The user's modules that this rank holds: the model, or its stages here."""
        return [unwrapped(model)]

    def own_name(self, name: str) -> str:
        """The name in the user's model of what the wrapper's ``named_parameters`` or ``state_dict`` calls ``name``."""
        return name

    # ------------------------------------------------------------------------------------------------------ inside

    @property
    def _mesh(self) -> DeviceMesh:
        if self.device_mesh is None:
            raise AssertionError(f"strategy={self.name} runs on a device mesh")
        return self.device_mesh

    def _axes_but(self, *left_out: A) -> list[int]:
        names = self._mesh.mesh_dim_names or ()
        return [index for index in range(self._mesh.ndim) if not set(names[index : index + 1]) & set(left_out)]


#: Wrapped model -> its engine, as long as the model lives.
_engines: weakref.WeakKeyDictionary[nn.Module, Engine] = weakref.WeakKeyDictionary()


def register(model: nn.Module, engine: Engine) -> None:
    """Let ``engine_of`` find the engine of a model that it has wrapped."""
    _engines[model] = engine


def engine_of(model: nn.Module) -> Engine:
    """The engine that has wrapped this model; of a model that somebody else has wrapped the one whose way it is.

    A module that no engine owns is a plain one, which has the defaults of ``Engine``.
    """
    found = _engines.get(model)
    if found is None:
        found = next((kind() for kind in _kinds() if kind.owns(model)), _PLAIN)
    return found


def reduces_without_gradient(parameter: torch.Tensor) -> bool:
    """``Engine.reduces_without_gradient`` of whichever strategy has this parameter."""
    return any(kind.reduces_without_gradient(parameter) for kind in _kinds())


@functools.cache
def _kinds() -> tuple[type[Engine], ...]:
    return tuple(strategy.load_engine() for strategy in STRATEGIES)


_PLAIN = Engine()


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's module below wrappers that replace it (DDP, Megatron-FSDP); FSDP2 wraps in place."""
    inner = engine_of(model).inner(model)
    while inner is not None:
        model, inner = inner, engine_of(inner).inner(inner)
    return model
