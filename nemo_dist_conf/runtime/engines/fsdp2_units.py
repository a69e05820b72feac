"""fully_shard per block and on the root, with its policies, resharding and prefetch chains."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any, Sequence

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.families.model_rules import tied_head_problems
from nemo_dist_conf.runtime.engines.averaged_gradients import Averaged
from nemo_dist_conf.runtime.engines.fsdp2_unit_rules import (
    input_embeddings,
    lay_in_order,
    of_other_dtype,
    output_embeddings,
    scalars,
    unshared,
)
from nemo_dist_conf.runtime.engines.model_refusals import refuse_sparse
from nemo_dist_conf.runtime.model.blocks import Blocks
from nemo_dist_conf.runtime.techniques.batch_statistics import keeps_statistics
from nemo_dist_conf.runtime.techniques.expert.parallel import SplitExperts
from nemo_dist_conf.runtime.torch_inside import expect_views, own_parameters
from nemo_dist_conf.runtime.typed_configs import FSDP2Config, MoEParallelizerConfig
from nemo_dist_conf.strategies.fsdp2 import OUTER_UNIT_ELEMENTS

__all__ = ["large_outer", "shard_blocks"]

log = logging.getLogger(__name__)


def shard_blocks(
    model: nn.Module,
    blocks: Blocks,
    mesh: DeviceMesh,
    config: FSDP2Config,
    in_pipeline: bool = False,
    experts: SplitExperts | None = None,
) -> Averaged | None:
    """Shard the model in place: each block is gathered, computed and freed on its own, the root takes the rest.

    A large embedding is freed before the blocks compute and not gathered for backward, which needs only its indices; a
    large head, with the final norm, is reduced as soon as backward has passed it. Inside a pipeline a stage has one of
    them at most, and with split experts the group moe says how the outer modules are sharded: there the root has both.

    mesh: 1-D to shard over, or 2-D (replicate, shard) for HSDP.
    reshard_after_forward None: blocks free their gathered parameters after forward, all but the last one and the head,
    which backward needs first; inside a pipeline none does, because the next microbatch needs them at once.
    experts: what of the blocks is sharded over ep_shard in units of its own, as the group moe says.
    Returns what averages gradients of the parameters that stay whole on every rank (fsdp2_unit_rules.py);
    None where there are none.
    Raises ConfigError for what cannot be sharded.
    Source: torch.distributed.fsdp.fully_shard.
    """
    refuse_sparse(model, instead="strategy=ddp")
    lay_in_order(model)
    policy = config.mp_policy or MixedPrecisionPolicy()
    blocks, whole = unshared(model, blocks), _Whole(model, mesh, policy)
    # A cast of the outputs is meant for the model's outputs; between blocks it would only cost two copies.
    inner = dataclasses.replace(policy, output_dtype=None)
    shared: dict[str, Any] = {
        "mesh": mesh,
        "offload_policy": _offload(config.offload_policy, mesh),
        "ignored_params": whole.parameters,
    }
    if any(_is_packed(parameter) for parameter in model.parameters()):
        shared["shard_placement_fn"] = lambda parameter: Shard(1) if _is_packed(parameter) else None
    units = list(blocks.values())
    for index, block in enumerate(units):
        reshard = config.reshard_after_forward
        if reshard is None:
            reshard = not in_pipeline and index < len(units) - 1
        held = _shard_experts(block, experts, inner, shared) if experts is not None else None
        whole.shard_other_dtypes(block, held or inner, reshard, shared)
        fully_shard(block, mp_policy=held or inner, reshard_after_forward=reshard, **shared)
    embedding: nn.Module | None = None
    last: list[nn.Module] = []
    if experts is not None:
        _shard_outer(model, experts.config, inner, config.reshard_after_forward, shared)
    elif not in_pipeline:
        embedding, last = large_outer(model, units)
    if embedding is not None:
        reshard = config.reshard_after_forward is not False
        _expect_views(embedding)
        front: Any = fully_shard(embedding, mp_policy=inner, reshard_after_forward=reshard, **shared)
        front.set_unshard_in_backward(False)
    if last:
        _expect_views(*last)
        fully_shard(last, mp_policy=inner, reshard_after_forward=bool(config.reshard_after_forward), **shared)
    whole.shard_other_dtypes(model, inner, config.reshard_after_forward, shared)
    # None: torch keeps the root's parameters gathered, since backward starts with them.
    fully_shard(model, mp_policy=policy, reshard_after_forward=config.reshard_after_forward, **shared)
    if config.enable_fsdp2_prefetch:
        in_order = [*([embedding] if embedding is not None else []), *units, *last[-1:]]
        _chain_prefetch(in_order, config.fsdp2_forward_prefetch_depth, config.fsdp2_backward_prefetch_depth)
    shape = " x ".join(f"{name} {mesh.size(i)}" for i, name in enumerate(mesh.mesh_dim_names or ("ranks",)))
    log.info("fully_shard: %d blocks and the root over %s", len(units), shape)
    return whole.averaged()


class _Whole:
    """Parameters of a model that no unit can hold: they stay as they are on every rank."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
        self._places = scalars(model)
        if policy.param_dtype is not None:  # a batch norm takes weights in float32 beside its running statistics
            kept = [module for module in model.modules() if keeps_statistics(module)]
            named = ((module, module.named_parameters(recurse=False, remove_duplicate=False)) for module in kept)
            self._places += [(module, key) for module, own in named for key, _ in own]
        self._mesh = mesh
        self.parameters: set[nn.Parameter] = set(self._now())

    def shard_other_dtypes(
        self, unit: nn.Module, policy: MixedPrecisionPolicy, reshard: bool | None, shared: dict[str, Any]
    ) -> None:
        """Take out of a unit what is of another dtype than the most of it."""
        apart, whole = of_other_dtype(unit, self.parameters, casts=policy.param_dtype is not None)
        for module in apart:
            fully_shard(module, mp_policy=policy, reshard_after_forward=reshard, **shared)
        self._places += whole
        self.parameters.update(self._now())

    def averaged(self) -> Averaged | None:
        groups = [self._mesh.get_group(index) for index in range(self._mesh.ndim)]
        return Averaged(self._now, groups, few=True) if self._places else None

    def _now(self) -> list[nn.Parameter]:
        found = (own_parameters(module)[key] for module, key in self._places)
        return list({id(parameter): parameter for parameter in found if parameter is not None}.values())


def _is_packed(parameter: nn.Parameter) -> bool:
    """Whether tensor parallelism has split several weights in one along the first dimension, each by itself.

    Cut once more along it, a rank would have what DTensor has no words for.
    """
    placements: Any = parameter.placements if isinstance(parameter, DTensor) else ()
    return any(hasattr(placement, "split_factor") and placement.dim == 0 for placement in placements)


def _shard_experts(
    block: nn.Module, experts: SplitExperts, inner: MixedPrecisionPolicy, shared: dict[str, Any]
) -> MixedPrecisionPolicy | None:
    """Shard the experts of a block; returns the precision of such a block, None for a block without experts."""
    found = [module for module in block.modules() if any(module is one for one in experts.modules)]
    policy = inner
    if experts.config.mp_policy is not None and found:
        # What follows such a block computes as the rest does.
        output = inner.param_dtype or next(block.parameters()).dtype
        policy = dataclasses.replace(experts.config.mp_policy, output_dtype=output)
    for module in found:
        # Experts are split over ep along their first dimension, so over ep_shard along the second.
        # The block casts what it is given; routing weights are to stay as precise as the router made them.
        unit: Any = fully_shard(
            module,
            **{**shared, "mesh": experts.mesh, "shard_placement_fn": lambda parameter: Shard(1)},
            mp_policy=dataclasses.replace(policy, cast_forward_inputs=False, output_dtype=None),
            reshard_after_forward=experts.config.reshard_after_forward,
        )
        unit.set_gradient_divide_factor(1.0)  # they are averages already
        unit.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it reduces
    return policy if found else None


def _shard_outer(
    model: nn.Module,
    config: MoEParallelizerConfig,
    inner: MixedPrecisionPolicy,
    reshard: bool | None,
    shared: dict[str, Any],
) -> None:
    """Units for the head and the decoder, where they are not to be one with the root.

    Raises ConfigError for a head whose weights are the embedding's too.
    """
    head, embedding = output_embeddings(model), input_embeddings(model)
    if head is not None and next(head.parameters(), None) is None:
        head = None  # on another pipeline stage
    if head is not None and embedding is not None and _share(head, embedding):
        name = config.lm_head_precision and str(config.lm_head_precision).removeprefix("torch.")
        moe = {"lm_head_precision": name, "wrap_outer_model": config.wrap_outer_model}
        ConfigError.raise_if(tied_head_problems(moe))
    if head is not None and (config.lm_head_precision is not None or not config.wrap_outer_model):
        precision: Any = config.lm_head_precision or inner.param_dtype
        policy = dataclasses.replace(inner, param_dtype=precision, cast_forward_inputs=True)
        fully_shard(head, mp_policy=policy, reshard_after_forward=reshard, **shared)
    decoder = getattr(model, "base_model", model)
    if not config.wrap_outer_model and decoder is not model:
        fully_shard(decoder, mp_policy=inner, reshard_after_forward=reshard, **shared)


def large_outer(model: nn.Module, blocks: Sequence[nn.Module]) -> tuple[nn.Module | None, list[nn.Module]]:
    """The embedding, and the final norm with the head, of a language model in which they are large and not tied.

    Of transformers' own models only: a forward of somebody else's (a fused loss patched in) may use the head's weight
    without calling the head, and then only the root gathers it.
    """
    kind: Any = type(model)
    if not kind.__module__.startswith("transformers.") or kind.forward.__module__ != kind.__module__:
        return None, []
    embedding, head = input_embeddings(model), output_embeddings(model)
    if not isinstance(embedding, nn.Embedding) or not isinstance(head, nn.Linear) or _share(embedding, head):
        return None, []
    inside = {id(module) for block in blocks for module in block.modules()}
    if any(id(module) in inside or _elements(module) < OUTER_UNIT_ELEMENTS for module in (embedding, head)):
        return None, []
    after: list[nn.Module] = []
    for child in getattr(model, "base_model", model).children():
        if any(id(module) in inside for module in child.modules()):
            after = []
        elif _elements(child) and child is not head:
            after.append(child)
    # A norm is known by its place and its shape; anything else stays with the root.
    is_norm = len(after) == 1 and all(parameter.dim() == 1 for parameter in after[0].parameters())
    return embedding, [*(after if is_norm else []), head]


def _expect_views(*unit: nn.Module) -> None:
    """No warning of torch for what is to be a unit and split by tensor parallelism: its output is the rank's part of a
    DTensor, and so a view.

    Writing into that would be lost; transformers' models, of which alone this is a unit, write into neither.
    """
    if any(isinstance(parameter, DTensor) for module in unit for parameter in module.parameters()):
        expect_views(unit)


def _elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _share(one: nn.Module, other: nn.Module) -> bool:
    return not {id(p) for p in one.parameters()}.isdisjoint({id(p) for p in other.parameters()})


def _offload(policy: CPUOffloadPolicy | None, mesh: DeviceMesh) -> OffloadPolicy:
    if policy is None:
        return OffloadPolicy()
    if mesh.device_type == "cpu" and policy.pin_memory and not torch.cuda.is_available():
        if mesh.get_rank() == 0:
            log.warning("strategy.offload_policy.pin_memory: there is no GPU to pin memory for, so it is not pinned")
        return CPUOffloadPolicy(pin_memory=False)
    return policy


def _chain_prefetch(units: list[nn.Module], forward_depth: int, backward_depth: int) -> None:
    """Tell every unit which ones to gather while it computes: the next in forward, the previous in backward."""
    for index, unit in enumerate(units):
        if not isinstance(unit, FSDPModule):
            raise AssertionError("prefetch is set after fully_shard")
        ahead: list[Any] = units[index + 1 : index + 1 + forward_depth]
        before: list[Any] = units[max(0, index - backward_depth) : index][::-1]
        unit.set_modules_to_forward_prefetch(ahead)
        # Without any, torch gathers one ahead by itself; a unit that names itself, gathered already, gets none.
        unit.set_modules_to_backward_prefetch(before or [unit])
