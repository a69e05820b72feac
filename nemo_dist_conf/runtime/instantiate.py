"""The hook: a composed tree becomes a DistributedSetup, the wrapped model and its optimizer."""

from __future__ import annotations

import logging
from typing import Any, Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import nn

from nemo_dist_conf.composition.check import Checked, check
from nemo_dist_conf.runtime.distributed_setup import DistributedSetup, setup_from_checked
from nemo_dist_conf.runtime.engines.base import Engine, engine_of
from nemo_dist_conf.runtime.model.build import Built, build_model, refuse_given_model
from nemo_dist_conf.runtime.model.load_weights import load_weights
from nemo_dist_conf.runtime.model.materialise import materialise
from nemo_dist_conf.runtime.optimizer import an_optimizer, build_optimizer, refuse_given
from nemo_dist_conf.runtime.parallelize import parallelize
from nemo_dist_conf.runtime.process_group import initialize_distributed
from nemo_dist_conf.runtime.rank_agreement import agree_on_config, agree_on_model, config_mark, together
from nemo_dist_conf.runtime.techniques.batch_statistics import use_global_statistics

__all__ = ["instantiate"]

log = logging.getLogger(__name__)


def instantiate(
    cfg: Any,
    model: nn.Module | Callable[[], nn.Module] | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    *,
    blocks: str | Iterable[str] | None = None,
    example: Mapping[str, Any] | None = None,
) -> tuple[DistributedSetup, Any, Any]:
    """(setup, wrapped model, optimizer) for a composed config.

    The config is checked, the process group started or joined, the meshes built, and the model built, wrapped as
    the strategy says and filled: with what its constructor gives, drawn from (``cfg.seed``, name), the same under
    every layout, or with the weights of ``cfg.model.name_or_path``. A rank holds its shards, the largest tensor and
    what that is made of, unless a warning says otherwise. With pp_size above 1 the model is a Pipeline: its ``step``
    runs forward and backward.

    cfg: a composed tree, or what hydra.utils.instantiate makes of one, whose nodes are typed configs by then and whose
    model and optimizer may be objects: so a node ``_target_: nemo_dist_conf.instantiate`` needs nothing else.
    model: a module (its weights are kept; FSDP2 and DDP take rank 0's), a factory of one, or None for ``cfg.model``.
    Without either, the model and the optimizer returned are None.
    optimizer: called with the wrapped parameters; None: built from ``cfg.optimizer``, or None where that is absent.
    blocks: path of the model's blocks, where they are not found by themselves (``runtime.blocks.find_blocks``).
    example: what the model's forward takes, by keyword, where that cannot be guessed: on it is tried, before anything
    is wrapped, whether tensor parallelism by a plan that nobody has proven computes what the plain model does.
    Raises ConfigError for whatever cannot work, before anything is started where that can be told.
    """
    if model is not None:
        refuse_given_model(model)
    if optimizer is not None:
        refuse_given(optimizer)
    # A group that the program has made already decides how many ranks there are, not a launcher's variables.
    checked = check(cfg, dist.get_world_size() if dist.is_initialized() else None)
    device = _value(cfg, "device", "auto")
    info = initialize_distributed(device=device)
    node = _value(cfg, "model", None)
    if model is None and callable(node):  # Hydra made it already
        model = node
    seed = int(_value(cfg, "seed", 0))

    engine: type[Engine] = checked.strategy.load_engine()
    whole = engine.whole_up_to(checked.strategy_values)

    def build() -> Built | None:
        nothing = model is None and node is None
        return None if nothing else build_model(node, model, seed, info.device, whole)

    built, marks = together(build, lambda built: (config_mark(cfg), built.mark if built is not None else ""))
    agree_on_config(cfg, [config for config, _ in marks])  # before the meshes: others would be made, and hang
    agree_on_model([mark for _, mark in marks], built.sums if built is not None else None)
    setup = setup_from_checked(checked, device)
    for note in checked.notes:
        if info.is_main:
            log.warning(note)
    if built is None:
        return setup, None, None
    if checked.batch_statistics == "global":
        groups = [group for group in setup.mesh_context.data_groups() if group is not None]  # there is a mesh
        use_global_statistics(built.model, groups)
    wrapped = _wrap(checked, setup, built, blocks if blocks is not None else built.blocks, example)
    settings = _value(cfg, "optimizer", None)
    if optimizer is not None:
        made: torch.optim.Optimizer | None = an_optimizer(optimizer(wrapped.parameters()))
    else:
        made = build_optimizer(settings, wrapped.named_parameters())
    if made is not None:
        made = engine_of(wrapped).adopt_optimizer(wrapped, made)
    return setup, wrapped, made


def _value(cfg: Any, key: str, default: Any) -> Any:
    value = cfg.get(key, default) if hasattr(cfg, "get") else default
    return default if value is None else value


def _wrap(checked: Checked, setup: DistributedSetup, built: Built, blocks: Any, example: Any) -> Any:
    meshes = setup.mesh_context
    kind: type[Engine] = checked.strategy.load_engine()
    engine = kind(
        setup.strategy_config,
        meshes.device_mesh,
        meshes.moe_mesh,
        pipeline=setup.pipeline_config,
        moe=setup.moe_parallel_config,
        groups=checked.groups,
    )

    def fill(model: nn.Module) -> None:
        if built.record is not None:
            materialise(model, built.record, engine.fill_device, built.loaded)
        if built.weights is not None:
            load_weights(model, built.weights, built.ties, built.parts)

    return parallelize(built.model, engine, blocks=blocks, fill=engine.how_to_fill(built, fill), example=example)
