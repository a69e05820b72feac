"""A model cut into pipeline stages: which module runs on which stage, and the module that one stage is.

A stage is the whole model in which the modules of other stages are stand-ins, so the model's own forward runs in every
stage, and every parameter keeps its name. What a stage hands on is found by a trial without weights, and proven by a
second one, before anything is built.

Shapes: B rows, S tokens.
"""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any, Mapping, Sequence

from torch import nn

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.model.blocks import Blocks
from nemo_dist_conf.runtime.model.forward_state import generators_kept
from nemo_dist_conf.runtime.model.trial import first_line
from nemo_dist_conf.runtime.techniques.pipeline.flow import Flow, Placed, place
from nemo_dist_conf.runtime.techniques.pipeline.own_skips import OwnSkips, check_own_skips, cut_as_it_skips
from nemo_dist_conf.runtime.techniques.pipeline.parts import loose_parameters, no_chain, parts_of, short
from nemo_dist_conf.runtime.techniques.pipeline.stage_forward import StageForward, stage_of
from nemo_dist_conf.runtime.techniques.pipeline.trial import Opened, Trial, prove
from nemo_dist_conf.runtime.torch_inside import with_own_places
from nemo_dist_conf.topology.schedule_rules import stage_count
from nemo_dist_conf.topology.stage_layers import spread_layers
from nemo_dist_conf.wording import unknown_name

__all__ = ["Chain", "chain_of", "cut", "plan_stages", "spread"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Chain:
    """A model's modules in the order of its forward, by name.

    names: the blocks and each module of the others that is called once, and gives what follows from weights.
    parts: of those and the others. idle: of those with weights which are never called. loose: names of parameters
    outside of parts. trial: the trial that found it.
    """

    names: tuple[str, ...]
    blocks: tuple[str, ...]
    parts: Mapping[str, nn.Module]
    idle: tuple[str, ...]
    loose: tuple[str, ...]
    flow: Flow
    trial: Trial

    @property
    def before(self) -> tuple[str, ...]:
        return self.names[: self.names.index(self.blocks[0])]

    @property
    def after(self) -> tuple[str, ...]:
        return self.names[self.names.index(self.blocks[-1]) + 1 :]


def chain_of(model: nn.Module, blocks: Blocks, pipeline: Mapping[str, Any]) -> Chain:
    """The model's chain, found by running it on a few tokens, its modules on meta.

    Call it before the model is wrapped in any way. Raises ConfigError for a model that is no such chain: blocks used
    twice; a forward that does not run so, or whose modules hand on something else than tensors. Also where
    patch_inner_model or patch_causal_lm_model of ``pipeline`` is off and the model's forward does not skip modules that
    are None.
    """
    if not blocks:
        raise no_chain(model, "it has no repeated layers to split", "blocks= in the model's config, or pp_size=1")
    with generators_kept():
        chain = _chain_of(_apart(model), blocks)
        if _skips_by_itself(pipeline):
            trial = chain.trial
            check_own_skips(trial.model, chain.parts, chain.names, chain.flow, trial.tried, pipeline)
    return chain


def _apart(model: nn.Module) -> nn.Module:
    """The model with attributes of its own, so that a trial cannot change them, and with the same tensors."""
    tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    try:
        return copy.deepcopy(model, tensors)
    except Exception as error:  # an attribute that cannot be copied: a lock, a process group
        log.info("%s is tried as it is, because it cannot be copied (%s)", type(model).__name__, first_line(error))
        return model


def _chain_of(model: nn.Module, blocks: Blocks) -> Chain:
    opened: frozenset[str] = frozenset()
    while True:
        parts = parts_of(model, blocks, opened)
        trial = Trial(model, parts, blocks)
        try:
            flow = trial.flow()
            break
        except Opened as found:
            opened |= found.names
    called = [call.name for call in flow.calls]
    run = [name for name in called if name in blocks]
    if len(set(run)) < len(run):
        once = list(dict.fromkeys(run))
        raise no_chain(model, f"its forward runs the blocks {short(run, 6)}, not {short(once)} once each")
    if not run:
        raise no_chain(model, f"its forward runs none of the blocks {short(list(blocks))}")
    names = tuple(
        call.name for call in flow.calls if called.count(call.name) == 1 and (call.depends or call.name in run)
    )
    idle = tuple(
        name for name, part in parts.items() if name not in called and next(part.parameters(), None) is not None
    )
    return Chain(names, tuple(run), parts, tuple(idle), tuple(loose_parameters(model, parts)), flow, trial)


def plan_stages(chain: Chain, pipeline: Mapping[str, Any], pp_size: int) -> list[tuple[str, ...]]:
    """The modules of every stage, in order, as ``module_fqns_per_model_part`` or the number of layers say.

    Raises ConfigError where the parts do not hold each module of the chain once, in its order.
    """
    parts = pipeline["module_fqns_per_model_part"]
    if parts is not None:
        return _given(chain, parts)
    stages = stage_count(pipeline, pp_size, len(chain.blocks))
    assert stages is not None
    if stages > len(chain.blocks):
        what = f"{len(chain.blocks)} layers are too few for {stages} pipeline stages"
        asked, fewer = f"parallelism.pp_size={pp_size}", max(1, pp_size * len(chain.blocks) // stages)
        raise ConfigError(
            Problem(what=what, asked=asked, allowed="one layer a stage or more", instead=f"parallelism.pp_size={fewer}")
        )
    weighted = pipeline["layers_per_stage"] is None
    last_blocks, end = [], 0
    for count in spread_layers(len(chain.blocks), stages, weighted):
        end += count
        last_blocks.append(chain.blocks[end - 1])
    # What runs between blocks runs where the block before it does.
    planned: list[list[str]] = [[]]
    ended = False
    for name in chain.names:
        if name in chain.blocks and ended:
            planned.append([])
        ended = name == last_blocks[len(planned) - 1] or (ended and name not in chain.blocks)
        planned[-1].append(name)
    return [tuple(names) for names in planned]


def spread(chain: Chain, planned: Sequence[Sequence[str]], pipeline: Mapping[str, Any]) -> Placed:
    """Which calls each stage makes, what it holds for them and what it hands on, for modules as they were planned.

    Raises ConfigError where stages one after the other would not compute what the whole model does.
    """
    home = {name: stage for stage, names in enumerate(planned) for name in names}
    owner = {
        f"{name}.{key}": name for name, part in chain.parts.items() for key, _ in part.named_parameters(recurse=False)
    }
    placed = place(chain.flow, home, len(planned), chain.idle, chain.loose, owner)
    for call, stage in zip(placed.flow.calls, placed.stage_of):
        for other in call.reads:
            if placed.stage_of[other] != stage:
                writer = placed.flow.calls[other].name
                why = f"{call.name} reads what {writer} has written, which lies on another stage"
                raise no_chain(chain.trial.model, why)
    if not _skips_by_itself(pipeline):
        with generators_kept():
            placed = prove(chain.trial, placed)
    return placed


def _skips_by_itself(pipeline: Mapping[str, Any]) -> bool:
    """Whether the model's forward is to skip modules of other stages that are None."""
    return not (pipeline["patch_inner_model"] and pipeline["patch_causal_lm_model"])


def cut(
    model: nn.Module, placed: Placed, parts: Sequence[str], stage: int, pipeline: Mapping[str, Any]
) -> tuple[nn.Module, StageForward | OwnSkips]:
    """The stage of this number, and its forward: the modules that it holds are the same objects; what is outside of
    the chain is copied.

    parts: names of all parts. Its forward takes ids [B, S] and what the stage before has handed on, and returns what
    this one hands on. patch_inner_model and patch_causal_lm_model of ``pipeline`` say whether modules of other stages
    are stand-ins, or None for a forward that skips those by itself.
    """
    found = {name: model.get_submodule(name) for name in parts}
    if _skips_by_itself(pipeline):
        return cut_as_it_skips(model, found, placed, stage, pipeline)
    forward = StageForward(placed, stage)

    def part(name: str, module: nn.Module) -> nn.Module:
        if next(module.parameters(), None) is None:
            return copy.deepcopy(module)
        several = sum(name in names for names in placed.parts) > 1
        return with_own_places(module) if several else module

    built = stage_of(model, found, placed, stage, forward, part)
    built.forward = forward
    return built, forward


def _given(chain: Chain, parts: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    key = "pipeline.module_fqns_per_model_part"
    listed = [name for part in parts for name in part]
    problems = []
    unknown = [name for name in listed if name not in chain.names]
    missing = [name for name in chain.names if name not in listed]
    if unknown:
        problems.append(
            unknown_name(
                unknown[0],
                chain.names,
                what=f"{key} names {unknown[0]}, which is not a module of the chain",
                asked=f"{key} with {unknown[0]}",
                allowed=short(list(chain.names), 12),
                offer=str,
            )
        )
    if missing:
        what = f"{key} leaves out {short(missing)}"
        problems.append(
            Problem(what=what, asked=f"{key} without {missing[0]}", allowed="every module once", instead=f"{key}=null")
        )
    if not problems and listed != list(chain.names):
        what = f"{key} does not follow the order of the model's forward"
        problems.append(
            Problem(what=what, asked=short(listed, 12), allowed=short(list(chain.names), 12), instead=f"{key}=null")
        )
    ConfigError.raise_if(problems)
    return [tuple(part) for part in parts]
