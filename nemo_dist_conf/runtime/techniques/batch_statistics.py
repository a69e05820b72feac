"""What is computed over the rows of a batch together: over those of a rank, or over those of all data ranks.

Normalisation over a batch mixes its rows, so a loss depends on which rows a rank has: with those of its own it is not
the loss of one process. Where asked to, mean and variance are taken over the rows of all ranks that hold different ones
(each weighted by how many it has), in forward and in backward. torch's SyncBatchNorm does the same on CUDA only.

Shapes: B rows, C channels; what else x has is normalised over like rows.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import types
from typing import Any, Iterator, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.model.replaced_forwards import Around

__all__ = [
    "keeps_statistics",
    "refuse_sync_on_cpu",
    "use_global_statistics",
    "warn_of_own_rows",
]

log = logging.getLogger(__name__)

_BATCH = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_INSTANCE = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_SIGNATURE = inspect.signature(F.batch_norm)
#: What torch.batch_norm, which says nothing of its own, takes; the last one is an option of a kernel.
_BARE = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")


def _with_statistics(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that normalise over a batch in training, or keep running statistics of it, by name.

    torch's and classes derived from them, and any whose code calls ``batch_norm`` itself. Not SyncBatchNorm, whose
    statistics are those of all ranks already.
    """
    return {name: module for name, module in model.named_modules() if _is_batch(module) or _is_instance(module)}


def keeps_statistics(module: nn.Module) -> bool:
    """Whether this is a normalisation of torch's with running statistics, which are float32 whatever the model is."""
    kinds = (*_BATCH, *_INSTANCE, nn.SyncBatchNorm)
    return isinstance(module, kinds) and module.running_mean is not None


def _is_batch(module: nn.Module) -> bool:
    if isinstance(module, nn.SyncBatchNorm):
        return False
    kind: Any = type(module)  # Module has a __hash__ that mypy takes for its class'
    return isinstance(module, _BATCH) or _calls_in(kind) or any(map(_is_call, vars(module).values()))


@functools.cache
def _calls_in(kind: type) -> bool:
    """Whether a method of the class, or a function that one calls, calls ``batch_norm``."""
    own = [base for base in kind.__mro__ if not f"{base.__module__}.".startswith(("torch.", "builtins."))]
    waiting = [inspect.unwrap(v) for base in own for v in vars(base).values() if isinstance(v, types.FunctionType)]
    waiting += [v.__func__ for base in own for v in vars(base).values() if isinstance(v, (staticmethod, classmethod))]
    seen: set[int] = set()
    while waiting:
        function = waiting.pop()
        if id(function) in seen or not isinstance(function, types.FunctionType):
            continue
        seen.add(id(function))
        for name in _names(function.__code__):
            if name == "batch_norm":
                return True
            called = function.__globals__.get(name)
            if isinstance(called, types.FunctionType) and called.__module__.partition(".")[0] != "torch":
                waiting.append(called)
            elif _is_call(called):
                return True
    return False


def _names(code: types.CodeType) -> Iterator[str]:
    """Globals and attributes that code asks for, also that of functions inside it."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _is_call(value: Any) -> bool:
    """Whether calling this normalises over a batch: the function, also with arguments or another name, or a forward."""
    function = getattr(value, "func", value) if isinstance(value, functools.partial) else value
    if isinstance(function, types.MethodType):
        return isinstance(function.__self__, _BATCH)
    return function is F.batch_norm or function is torch.batch_norm


def _is_instance(module: nn.Module) -> bool:
    return isinstance(module, _INSTANCE) and module.running_mean is not None


def use_global_statistics(model: nn.Module, groups: Sequence[dist.ProcessGroup]) -> None:
    """Let the model's batch statistics be those of the rows of all ranks, in place; parameters keep their names.

    groups: each joins ranks with different rows; statistics are added up over one after the other. Every rank has to
    run the same forwards in training mode.
    """
    found = _with_statistics(model)
    for module in found.values():
        module.forward = (_GlobalBatch if _is_batch(module) else _GlobalInstances)(module, groups)
    if found:
        log.info("batch statistics over all data ranks: %s", _listed(found))


def refuse_sync_on_cpu(model: nn.Module, device_type: str) -> None:
    """Raise ConfigError for a SyncBatchNorm that trains where torch has none."""
    norms = [name or "the model" for name, module in model.named_modules() if isinstance(module, nn.SyncBatchNorm)]
    if norms and device_type == "cpu":
        what = f"SyncBatchNorm ({norms[0]}{f' and {len(norms) - 1} more' if len(norms) > 1 else ''}) runs on GPUs only"
        allowed = "BatchNorm, with batch_statistics=global for statistics of all ranks' rows, on any device"
        way_out = "batch_statistics=global, and torch.nn.BatchNorm1d, 2d or 3d in the model"
        raise ConfigError(
            Problem(what=what, asked=f"{norms[0]}: SyncBatchNorm on a CPU", allowed=allowed, instead=way_out)
        )


def warn_of_own_rows(model: nn.Module, ranks: int) -> None:
    """Say, by name, what is computed over a rank's own rows together. ranks: with different rows.

    Statistics are said at once; a loss that compares rows (``return_loss`` of transformers' contrastive models) when
    it is asked for.
    """
    names = list(inspect.signature(model.forward).parameters)
    if ranks > 1 and "return_loss" in names and dist.get_rank() == 0:
        compared = _Compared(type(model).__name__, names.index("return_loss"), ranks)
        model.register_forward_pre_hook(compared, with_kwargs=True)
    local = {name: m for name, m in _with_statistics(model).items() if not isinstance(m.forward, _Global)}
    if ranks > 1 and local and dist.get_rank() == 0:
        what = "%s: statistics of a rank's own rows, so the losses of %d ranks are not those of one process; "
        log.warning(what + "batch_statistics=global: of all ranks' rows, in each microbatch", _listed(local), ranks)


class _Compared:
    """Says once that a loss compares the rows of a rank. name: of the model's class, which FSDP gives another one.

    place: of the argument that asks for the loss.
    """

    def __init__(self, name: str, place: int, ranks: int) -> None:
        self.name, self.place, self.ranks, self.said = name, place, ranks, False

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.said or not (kwargs.get("return_loss") or (len(args) > self.place and args[self.place])):
            return
        self.said = True
        what = "%s: return_loss compares a rank's own rows, so the losses of %d ranks are not those of one process; "
        log.warning(what + "gather the features of all ranks and compare those", self.name, self.ranks)


def _listed(found: dict[str, nn.Module]) -> str:
    kinds = ", ".join(dict.fromkeys(type(module).__name__ for module in found.values()))
    names = [name or "the model" for name in found]
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''} ({kinds})"


class _Global(Around):
    def __init__(self, module: nn.Module, groups: Sequence[dist.ProcessGroup]) -> None:
        super().__init__(module.forward)
        self.module, self.groups = module, groups

    def __deepcopy__(self, memo: dict[int, Any]) -> _Global:
        """Process groups cannot be copied."""
        copied = object.__new__(type(self))
        copied.__wrapped__, copied.module = copy.deepcopy((self.__wrapped__, self.module), memo)
        copied.groups = self.groups
        return copied


class _GlobalBatch(_Global):
    """A module's forward in which ``batch_norm``, while training, computes with the statistics of all ranks."""

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Everywhere(self.groups):
            return self.__wrapped__(*args, **kwargs)


class _Everywhere(TorchFunctionMode):
    def __init__(self, groups: Sequence[dist.ProcessGroup]) -> None:
        super().__init__()
        self.groups = groups

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.batch_norm:
            given = {**dict(zip(_BARE, args)), **(kwargs or {})}
            given.pop("cudnn_enabled")
        elif func is F.batch_norm:
            bound = _SIGNATURE.bind(*args, **(kwargs or {}))
            bound.apply_defaults()
            given = bound.arguments
        else:
            return func(*args, **(kwargs or {}))
        if not given["training"] or given["input"].is_meta:  # on meta it is a trial
            return func(*args, **(kwargs or {}))
        return _batch_norm(self.groups, **given)


def _batch_norm(
    groups: Sequence[dist.ProcessGroup],
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """torch.nn.functional.batch_norm in training, over the rows of all ranks."""
    with torch.no_grad():
        mean_C, var_C, count = _statistics(input, groups)
        for running, now in ((running_mean, mean_C), (running_var, var_C * (count / (count - 1).clamp_min(1)))):
            if running is not None:
                running.lerp_(now.to(running.dtype), momentum)
    dtype = torch.promote_types(input.dtype, torch.float32)
    return _Normalise.apply(input, weight, bias, mean_C.to(dtype), var_C.to(dtype), eps, count, groups)


def _statistics(x: Tensor, groups: Sequence[dist.ProcessGroup]) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, biased variance, number of values) of each channel over all ranks, in float64."""
    channels = x.size(1)
    x_CN = x.detach().to(torch.promote_types(x.dtype, torch.float32)).transpose(0, 1).reshape(channels, -1)
    count = x_CN.size(1)
    var_C, mean_C = torch.var_mean(x_CN, 1, correction=0) if count else (x_CN.sum(1), x_CN.sum(1))
    # float64: squares are added up here, and a variance may be small beside its mean.
    mean_C, var_C = mean_C.double(), var_C.double()
    sums = _summed(torch.cat([mean_C * count, (var_C + mean_C.square()) * count, mean_C.new_full((1,), count)]), groups)
    mean_C, square_C = sums[:channels] / sums[-1], sums[channels:-1] / sums[-1]
    return mean_C, (square_C - mean_C.square()).clamp_min(0), sums[-1]


class _Normalise(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias with statistics that all ranks' x went into."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_C: Tensor | None,
        bias_C: Tensor | None,
        mean_C: Tensor,
        var_C: Tensor,
        eps: float,
        count: Tensor,
        groups: Sequence[dist.ProcessGroup],
    ) -> Tensor:
        ctx.save_for_backward(x, weight_C, mean_C, torch.rsqrt(var_C + eps), count)
        ctx.groups, ctx.dtype_of_bias = groups, None if bias_C is None else bias_C.dtype
        return F.batch_norm(x, mean_C, var_C, weight_C, bias_C, False, 0.0, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, weight_C, mean_C, scale_C, count = ctx.saved_tensors
        shape = (1, -1, *([1] * (x.dim() - 2)))
        over = [0, *range(2, x.dim())]
        gradient = gradients[0].to(mean_C.dtype)
        normal = (x.to(mean_C.dtype) - mean_C.view(shape)) * scale_C.view(shape)
        bias_C, weighted_C = gradient.sum(over), (gradient * normal).sum(over)
        of_x = None
        if ctx.needs_input_grad[0]:
            sums = _summed(torch.stack([bias_C, weighted_C]).double(), ctx.groups) / count
            mean_bias_C, mean_weighted_C = sums.to(mean_C.dtype)
            of_x = gradient - mean_bias_C.view(shape) - normal * mean_weighted_C.view(shape)
            of_x = of_x * (scale_C if weight_C is None else scale_C * weight_C.to(scale_C.dtype)).view(shape)
            of_x = of_x.to(x.dtype)
        # Of weight and bias it is this rank's own part: the strategy averages it like every other.
        of_weight = None if weight_C is None else weighted_C.to(weight_C.dtype)
        of_bias = None if ctx.dtype_of_bias is None else bias_C.to(ctx.dtype_of_bias)
        return of_x, of_weight, of_bias, None, None, None, None, None


class _GlobalInstances(_Global):
    """Instance normalisation, which mixes no rows; its running statistics are those of all ranks' rows."""

    @torch.compiler.disable
    def __call__(self, x: Tensor) -> Tensor:
        out = self.__wrapped__(x)
        module: Any = self.module
        if module.training and not x.is_meta:
            with torch.no_grad():
                # They moved towards the mean over rows, so the mean of them is where all rows would have moved them.
                kept = torch.cat([module.running_mean, module.running_var, module.running_mean.new_ones(1)]).double()
                *sums, rows = _summed(kept * x.size(0), self.groups).split([len(module.running_mean)] * 2 + [1])
                for running, value in zip((module.running_mean, module.running_var), sums):
                    running.copy_(value / rows)
        return out


def _summed(tensor: Tensor, groups: Sequence[dist.ProcessGroup]) -> Tensor:
    for group in groups:
        dist.all_reduce(tensor, group=group)
    return tensor
