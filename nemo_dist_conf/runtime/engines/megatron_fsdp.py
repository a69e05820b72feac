"""strategy=megatron_fsdp: NVIDIA's megatron-fsdp around a model, and what its gradients and optimizer need.

The library is used as it is; what surrounds it here makes a plain loop right for every option of it:

- Gradients are reduced in a step's last backward and made ready once, before they are clipped or used. The library's
  own automatic mode reduces them twice for ZeRO-0/1 without overlap, and in every microbatch for ZeRO-0/1 with it.
- The optimizer's state is made without a step that changes weights or counts.
- Weights are gathered again where they are not gathered in forward.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import logging
import types
from typing import TYPE_CHECKING, Any, Iterator, Mapping, Sequence

import torch
from torch import nn

from nemo_dist_conf.errors import ConfigError, Problem, TrainingError
from nemo_dist_conf.names import MeshAxisName as A
from nemo_dist_conf.runtime.engines.base import Engine
from nemo_dist_conf.runtime.engines.gradient_norm import clip
from nemo_dist_conf.runtime.engines.megatron_library import (
    ARGUMENTS,
    UsedParameters,
    in_whole_rows,
    refuse_parameters,
    require_cuda,
    shard_axis,
    unit_classes,
)
from nemo_dist_conf.runtime.engines.megatron_local_shards import keep_local_shards
from nemo_dist_conf.runtime.engines.megatron_outputs import show_outputs
from nemo_dist_conf.runtime.engines.model_refusals import refuse_max_norm
from nemo_dist_conf.runtime.model.blocks import Blocks
from nemo_dist_conf.runtime.model.materialise import tied_names
from nemo_dist_conf.runtime.model.shared_memory import refuse_shared_memory
from nemo_dist_conf.runtime.rank_agreement import together
from nemo_dist_conf.runtime.techniques.batch_statistics import refuse_sync_on_cpu
from nemo_dist_conf.runtime.techniques.precision import tell_precision
from nemo_dist_conf.runtime.torch_inside import chunks_told, is_megatrons, keep_ties, own_children, show_sharded
from nemo_dist_conf.strategies.megatron_fsdp import library_problems

if TYPE_CHECKING:
    from nemo_dist_conf.runtime.model.build import Built, Fill
    from nemo_dist_conf.runtime.techniques.expert.parallel import SplitExperts
    from nemo_dist_conf.runtime.typed_configs import MegatronFSDPConfig

__all__ = ["MegatronFSDPEngine"]

log = logging.getLogger(__name__)


class MegatronFSDPEngine(Engine):
    """device_mesh: axes dp, cp, tp. The library takes the values from the model, which gets them before."""

    name = "megatron_fsdp"
    fill_when = "before_sharding"

    _used: UsedParameters
    _norm: torch.Tensor | None = None

    def device(self, model: nn.Module) -> torch.device:
        if self._mesh.device_type == "cuda":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device(self._mesh.device_type)

    def refuse(self, model: nn.Module) -> None:
        ConfigError.raise_if(library_problems())
        require_cuda(self._mesh)
        refuse_max_norm(model)
        refuse_shared_memory(model, self._mesh)
        refuse_sync_on_cpu(model, self._mesh.device_type)
        refuse_parameters(model)

    def split_tensors(self, model: nn.Module, example: Mapping[str, Any] | None, apart: Sequence[str]) -> None:
        """By the plan that the model comes with; a plan on the command line is an option of fsdp2."""
        try:
            super().split_tensors(model, example, apart)
        except ConfigError as error:
            problems = (
                dataclasses.replace(problem, instead=f"strategy=fsdp2 {problem.instead}")
                if "strategy.tp_plan" in problem.instead
                else problem
                for problem in error.problems
            )
            raise ConfigError(*problems) from None

    def how_to_fill(self, built: Built, fill: Fill) -> Fill:
        """With init_fsdp_with_meta_device the library fills the model, module by module."""
        return _initialiser(built) if self.config.init_fsdp_with_meta_device else fill

    def after_split(self, model: nn.Module) -> None:
        keep_local_shards(model)

    def set_precision(self, model: nn.Module) -> None:
        float32, config = torch.float32, self.config
        reduced = float32 if config.grad_reduce_in_fp32 else None
        tell_precision(self.name, model, None, reduced, float32 if config.preserve_fp32_weights else None)

    def shard(self, model: nn.Module, blocks: Blocks, experts: SplitExperts | None) -> Any:
        """The model in the library's wrapper, its parameters sharded as the config says.

        model: materialised, or on meta with init_fsdp_with_meta_device, where the library lets it initialise itself.
        Raises ConfigError for unit modules that the model does not have.
        """
        config: MegatronFSDPConfig = self.config
        library = importlib.import_module("megatron_fsdp")
        classes = unit_classes(model, config, blocks)
        policy = library.MixedPrecisionPolicy(
            main_params_dtype=torch.float32 if config.preserve_fp32_weights else None,
            main_grads_dtype=torch.float32 if config.grad_reduce_in_fp32 else None,
        )
        options = {argument: getattr(config, name) for name, argument in ARGUMENTS.items()}
        self._used = UsedParameters(model)
        wrap = functools.partial(
            library.fully_shard_model,
            model,
            device_mesh=self._mesh,
            dp_shard_dim=shard_axis(self._mesh, self.sizes),
            tp_dim=A.TP.value,
            # Of the same axes: the library asks it of each parameter with ".experts." in its name, and to average.
            expt_device_mesh=self._mesh,
            fsdp_unit_modules=classes,
            device=self.device(model),
            mixed_precision_policy=policy,
            sync_model_each_microbatch=False,
            **options,
        )
        hooked = [module for module in model.modules() if module is model or isinstance(module, tuple(classes))]
        ties = tied_names(model)
        wrapped, _ = together(lambda: show_outputs(hooked, lambda: in_whole_rows(model, wrap)))
        if any(len(names) > 2 for names in ties):
            keep_ties(wrapped, max(map(len, ties)))
        wrapped.is_last_microbatch = config.overlap_grad_reduce
        show_sharded(wrapped)
        zero = config.zero_dp_strategy
        log.info("megatron-fsdp: %d classes of units, ZeRO-%d over %s", len(classes), zero, dict(self.sizes))
        return wrapped

    # ------------------------------------------------------------------------------------------- of a wrapped model

    @classmethod
    def owns(cls, model: nn.Module) -> bool:
        return type(model).__module__.startswith("megatron_fsdp.")

    def inner(self, model: nn.Module) -> nn.Module | None:
        return own_children(model)["module"]

    @contextlib.contextmanager
    def microbatch(self, model: Any, last: bool) -> Iterator[None]:
        overlaps = self._own_config.overlap_grad_reduce
        model.is_last_microbatch = last and overlaps
        try:
            yield
        finally:
            # A loop without microbatches comes in between: each of its backwards is a last one.
            model.is_last_microbatch = overlaps

    def finish_gradients(self, model: Any) -> None:
        """Let the gradients of a step be those of all ranks, in ``.grad`` of the sharded parameters; once a step.

        Raises ConfigError where the library has not reduced some, because a step did not use all of a group.
        """
        if self._own_config is not None and model.microbatch_count:
            self._used.check(model)
            model.finish_grad_sync()
            self._norm = None  # an earlier step's

    @classmethod
    def reduces_without_gradient(cls, parameter: torch.Tensor) -> bool:
        return parameter.requires_grad and is_megatrons(parameter)

    def note_norm(self, model: nn.Module, norm: torch.Tensor) -> None:
        self._norm = norm

    def adopt_optimizer(self, model: Any, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Let ``step`` and ``zero_grad`` of an optimizer over a wrapped model's parameters do what the library needs.

        Raises ConfigError for an optimizer over other parameters.
        """
        from megatron_fsdp import fully_shard_optimizer

        known = {id(parameter) for parameter in model.parameters()}
        if not all(id(p) in known for group in optimizer.param_groups for p in group["params"]):
            raise ConfigError(
                Problem(
                    what="the optimizer holds parameters that are not the wrapped model's",
                    asked=type(optimizer).__name__,
                    allowed="an optimizer over model.parameters() of the wrapped model, before its first forward",
                    instead="instantiate(cfg, optimizer=factory)",
                )
            )
        # The library makes the state by a step with gradients of zero: it must neither move a weight nor count.
        still = {"lr": 0.0, "weight_decay": 0.0}
        held = [{key: group[key] for key in still if key in group} for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group.update({key: value for key, value in still.items() if key in group})
        fully_shard_optimizer(optimizer)
        for group, values in zip(optimizer.param_groups, held):
            group.update(values)
        for state in optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"].zero_()
        library_step: Any = optimizer.step

        def step(_: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
            self.finish_gradients(model)
            if self.config.check_for_nan_in_grad:
                self._check_finite(model)
            result = library_step(
                *args, sync_grad_before_optimizer_step=False, install_optimized_model_weights=False, **kwargs
            )
            self._install_weights(model)
            return result

        optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]
        return optimizer

    def show_shards(self, model: Any) -> None:
        """Put the sharded parameters into the model, each knowing which part of the whole it is.

        The library splits a unit's parameters as one, so a rank may hold all of one and nothing of another.
        """
        from megatron_fsdp.uneven_dtensor import update_uneven_dtensor_chunk_metadata

        show_sharded(model)
        for _, parameter in sorted(model.module.named_parameters()):
            sharded = any(not placement.is_replicate() for placement in parameter.placements)
            if sharded and chunks_told(parameter) is None:
                update_uneven_dtensor_chunk_metadata(parameter)

    def weights_changed(self, model: Any) -> None:
        """What was gathered by a forward since the last step would be used once more."""
        self._install_weights(model)
        model.all_gather_pipeline.reset()

    # ------------------------------------------------------------------------------------------------------ inside

    @property
    def _own_config(self) -> MegatronFSDPConfig:
        if self.config is None:
            raise ConfigError(
                Problem(
                    what="megatron-fsdp has wrapped this model without nemo_dist_conf, which knows none of its options",
                    asked="accumulate(model, last), clip_grad_norm_(model, max_norm)",
                    allowed="a model of nemo_dist_conf.instantiate or of MegatronFSDPManager",
                    instead="MegatronFSDPManager(config, device_mesh).parallelize(model)",
                )
            )
        return self.config

    def _install_weights(self, model: Any) -> None:
        """Let forward see what an optimizer has put into the sharded parameters."""
        model.install_optimized_model_weights()
        config = self._own_config
        if config.zero_dp_strategy in (1, 2) and not config.overlap_param_gather:
            model.start_param_sync(force_sync=True)

    def _check_finite(self, model: Any) -> None:
        norm, self._norm = self._norm, None
        if norm is None:
            norm = clip(model.parameters(), None)
        if not torch.isfinite(norm):
            raise TrainingError(
                f"the norm of all gradients is {float(norm)}; no weight was changed\n"
                "  try     a smaller learning rate, or clip_grad_norm_ before optimizer.step()\n"
                "  or      strategy.check_for_nan_in_grad=false, which goes on regardless"
            )


def _initialiser(built: Built) -> Fill:
    """What prepares a model on meta for a library that fills it module by module."""
    from nemo_dist_conf.runtime.model.materialise import initialise_in_turn

    record = built.record
    reason = "its weights are read from a folder, which is done before it is sharded" if built.weights else None
    if record is None:
        reason = f"{type(built.model).__name__} was built with values, which a module of it cannot give again"
    elif built.ties:
        reason = f"{' and '.join(built.ties[0])} are one parameter, and the library makes two of it there"
    if record is None or reason is not None:
        key = "strategy.init_fsdp_with_meta_device"
        what = f"the model cannot be built on the meta device: {reason}"
        allowed = "false: each rank holds the whole model once"
        raise ConfigError(Problem(what=what, asked=f"{key}=true", allowed=allowed, instead=f"{key}=false"))
    return functools.partial(initialise_in_turn, record=record)
