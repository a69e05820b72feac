"""One training step: one code path for every layout.

Shapes: B rows (sequences) of a microbatch, S tokens of a sequence, V ids of the vocabulary.
"""

from __future__ import annotations

import inspect
import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.gradients import accumulate, clip_grad_norm_
from nemo_dist_conf.runtime.device_meshes import MeshContext
from nemo_dist_conf.runtime.engines.base import engine_of, unwrapped
from nemo_dist_conf.runtime.engines.gradient_norm import scale_gradients
from nemo_dist_conf.runtime.techniques.expert.routing import ExpertLoad, balancing_loss, routed
from nemo_dist_conf.runtime.techniques.loss import token_loss_sum

if TYPE_CHECKING:
    from nemo_dist_conf.runtime.engines.pipeline_model import Pipeline
    from nemo_dist_conf.train.loss_scale import LossScale

__all__ = [
    "Microbatches",
    "StepResult",
    "settle",
    "train_step",
]

log = logging.getLogger(__name__)

Microbatches = Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StepResult:
    """Numbers of one step, the same on every rank.

    loss: mean over the counted tokens of the global batch. grad_norm: of all gradients, before clipping.
    updated: whether the optimizer made its step; false where a number is not finite.
    more: of a mixture-of-experts model: expert_imbalance (``ExpertLoad.imbalance``) and aux_loss, the balancing loss of
    the global batch, without its coefficient, where the model's config asks for it.
    """

    loss: float
    grad_norm: float
    updated: bool
    more: dict[str, float] = field(default_factory=dict)


def _forward_backward(
    model: nn.Module, microbatches: Microbatches, scale: float, context: MeshContext, times: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """Accumulate the gradients of ``scale`` times the loss sum of all microbatches; returns the plain sum.

    times: makes all gradients larger (``LossScale``).
    Also those of the loss that balances experts, where the model's config asks for it (output_router_logits), times
    its coefficient; returns that loss of the global batch, else None. With several microbatches it takes a forward of
    all of them without gradients first: what one adds depends on where the tokens of all go.
    """
    total = torch.zeros((), dtype=torch.float64, device=context.device)  # microbatches must not change the number
    balance: Tensor | None = None
    config: Any = getattr(unwrapped(model), "config", None)
    routing = _routed_before(model, microbatches, context) if len(microbatches) > 1 else None
    for number, (input_ids, labels) in enumerate(microbatches, 1):
        with accumulate(model, last=number == len(microbatches)):
            logits, router_logits = _forward(model, input_ids)
            loss_sum = token_loss_sum(logits, labels)
            objective = loss_sum * scale
            if router_logits is not None:
                if routing is None:
                    routing = context.sum_over_data(routed(router_logits, config.num_experts_per_tok))
                part = balancing_loss(router_logits, routing)
                objective = objective + part * (config.router_aux_loss_coef * context.gradient_size)
                balance = part.detach() if balance is None else balance + part.detach()
            (objective if times == 1.0 else objective * times).backward()
        total += loss_sum.detach()
    return total, None if balance is None else context.sum_over_data(balance)


@torch.no_grad()
def _routed_before(model: nn.Module, microbatches: Microbatches, context: MeshContext) -> Tensor | None:
    """``routed`` of the global batch, whose tokens will draw the same random numbers; None without such a loss."""
    config: Any = getattr(unwrapped(model), "config", None)
    if not getattr(config, "output_router_logits", False) or not getattr(config, "router_aux_loss_coef", 0.0):
        return None
    found: Tensor | None = None
    with torch.random.fork_rng(devices=[context.device] if context.device.type == "cuda" else []):
        for input_ids, _ in microbatches:
            _, router_logits = _forward(model, input_ids)
            if router_logits is not None:
                part = routed(router_logits, config.num_experts_per_tok)
                found = part if found is None else found + part
    return None if found is None else context.sum_over_data(found)


def settle(model: nn.Module, optimizer: Optimizer, microbatches: Microbatches, context: MeshContext) -> None:
    """Bring a wrapped model, before a checkpoint is loaded into it, to where it is after its first step.

    DDP sorts its buckets anew after its first backward, and the order of a sum of several ranks follows from the
    bucket: a run that goes on would differ in the last bit from one that never stopped. Nothing is updated here.
    """
    if engine_of(model).first_backward_differs and context.world_size > 1:
        _forward_backward(model, microbatches, 1.0, context)
        optimizer.zero_grad(set_to_none=True)


def _run_pipeline(
    model: Pipeline, microbatches: Microbatches, scale: float, context: MeshContext, times: float = 1.0
) -> tuple[Tensor, Tensor | None]:
    """``_forward_backward`` of a pipeline, which splits what it is given into microbatches of its own."""
    count = model.microbatches if model.scales_gradients else 1  # its losses and gradients are then means
    totals = [model.step(input_ids, labels, scale * times * count) * count for input_ids, labels in microbatches]
    return torch.stack(totals).sum(), None


def train_step(
    model: nn.Module,
    optimizer: Optimizer,
    microbatches: Microbatches,
    context: MeshContext,
    *,
    global_tokens: int,
    max_grad_norm: float | None,
    load: ExpertLoad | None = None,
    loss_scale: LossScale | None = None,
) -> StepResult:
    """One optimizer step on this rank's part of the global batch.

    load: counts the tokens of the model's experts. loss_scale: of a model that computes in float16; gradients are
    computed again with a lower one where they overflow.

    DDP and FSDP average gradients over the ranks that hold different tokens; scaling the loss sum by their number /
    global_tokens turns that into the gradient of the mean over the global batch, however unevenly tokens are spread
    over ranks.
    Nothing is updated where the global loss or gradient norm is not finite: all ranks see the same two numbers, so
    all of them decide alike.
    """
    run: Any = _run_pipeline if context.pp_enabled else _forward_backward
    while True:
        times = 1.0 if loss_scale is None else loss_scale.value
        loss_sum, balance = run(model, microbatches, context.gradient_size / global_tokens, context, times)
        loss = context.sum_over_data(loss_sum) / global_tokens
        norm = clip_grad_norm_(model, max_grad_norm if loss_scale is None else None) / times
        imbalance = None if load is None else load.imbalance(context)
        more = {"aux_loss": balance, "expert_imbalance": imbalance}
        more = {name: value for name, value in more.items() if value is not None}
        numbers = torch.stack([value.to(loss) for value in (loss, norm, *more.values())])
        loss_value, norm_value, *others = numbers.tolist()  # the only wait for the device in a step
        updated = math.isfinite(loss_value) and math.isfinite(norm_value)
        if updated or loss_scale is None or not math.isfinite(loss_value) or not loss_scale.lower():
            break
        log.info("gradients overflow float16; the step is computed again, its loss times %g", loss_scale.value)
        optimizer.zero_grad(set_to_none=True)
    if updated and loss_scale is not None:
        scale_gradients(model, min(1.0, max_grad_norm / (norm_value + 1e-6) if max_grad_norm else 1.0) / times)
        loss_scale.made_step()
    if updated:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return StepResult(loss_value, norm_value, updated, dict(zip(more, others)))


def _arguments(module: nn.Module, input_ids_BS: Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """transformers models take keywords; the user's own module takes the ids however it names them."""
    names = inspect.signature(module.forward).parameters
    if "input_ids" not in names and not hasattr(getattr(module, "config", None), "model_type"):
        return (input_ids_BS,), {}
    keywords: dict[str, Any] = {"input_ids": input_ids_BS}
    if "use_cache" in names:  # a cache of keys and values is for generating text
        keywords["use_cache"] = False
    return (), keywords


def _forward(model: nn.Module, input_ids_BS: Tensor) -> tuple[Tensor, Sequence[Tensor] | None]:
    """Logits [B, S, V], and those of the routers where the model's config asks for them (output_router_logits)."""
    args, kwargs = _arguments(unwrapped(model), input_ids_BS)
    output = model(*args, **kwargs)
    logits = getattr(output, "logits", output)
    if isinstance(logits, DTensor):
        logits = logits.full_tensor()
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[:2] != input_ids_BS.shape:
        got = f"a tensor of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        want = f"[{input_ids_BS.size(0)}, {input_ids_BS.size(1)}, vocabulary]"
        raise ConfigError(
            Problem(
                what=f"model: forward returned {got}, which is not a score for every next token",
                asked=f"model={type(unwrapped(model)).__name__}",
                allowed=f"a tensor of shape {want}, or an output with such .logits",
                instead="model=llama_tiny",
            )
        )
    config = getattr(unwrapped(model), "config", None)
    if not getattr(config, "output_router_logits", False):
        return logits, None
    router_logits = getattr(output, "router_logits", None)
    if not router_logits or not hasattr(config, "router_aux_loss_coef"):
        what = f"{type(unwrapped(model)).__name__} has no loss that balances its experts"
        key = "model.config.output_router_logits"
        raise ConfigError(
            Problem(what=what, asked=f"{key}=true", allowed="false for this model", instead=f"{key}=false")
        )
    return logits, router_logits
