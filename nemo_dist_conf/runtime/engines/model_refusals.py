"""What a model may have that some strategies cannot take: told before anything is wrapped."""

from __future__ import annotations

import torch
from torch import nn

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.runtime.torch_inside import has_hooks

__all__ = ["refuse_container", "refuse_hooks", "refuse_max_norm", "refuse_script", "refuse_sparse"]


def refuse_sparse(model: nn.Module, why: str = "sparse gradients cannot be sharded", instead: str = "") -> None:
    """Raise ConfigError for embeddings whose gradients are sparse. instead: a strategy that takes them, if one does."""
    problems = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse and module.weight.requires_grad:
            what = f"{name} is an embedding with sparse=True, and {why}"
            dense = f"sparse=False where {name} is made: the same gradients as dense tensors"
            allowed = f"{instead}, or {dense}" if instead else dense
            type_ = instead or f"{type(module).__name__}(..., sparse=False)"
            problems.append(Problem(what=what, asked=f"{name}.sparse=True", allowed=allowed, instead=type_))
    ConfigError.raise_if(problems)


def refuse_max_norm(model: nn.Module) -> None:
    """Raise ConfigError for embeddings that scale rows of their weight in forward: a rank those of its own data."""
    problems = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            key = f"{name}.max_norm={module.max_norm:g}"
            what = f"{name} is an embedding with max_norm, which changes its weight on each rank by the rank's own rows"
            allowed = "one rank with strategy=ddp; or max_norm=None, and rows scaled where the model looks them up"
            problems.append(
                Problem(what=what, asked=key, allowed=allowed, instead=f"{type(module).__name__}(..., max_norm=None)")
            )
    ConfigError.raise_if(problems)


def refuse_hooks(model: nn.Module) -> None:
    """Raise ConfigError for hooks on parameters: fully_shard puts other parameters in their place."""
    problems = []
    for name, parameter in model.named_parameters():
        if has_hooks(parameter):
            what = f"{name} has a hook of register_hook or its like, which would be lost when the model is sharded"
            allowed = "gradients changed between backward and optimizer.step(); strategy=ddp, which keeps hooks"
            problems.append(
                Problem(what=what, asked=f"{name}.register_hook(...)", allowed=allowed, instead="strategy=ddp")
            )
    ConfigError.raise_if(problems)


def refuse_container(model: nn.Module) -> None:
    """Raise ConfigError for a list or dictionary of modules as the model: nothing calls it, so nothing is gathered."""
    if isinstance(model, (nn.ModuleList, nn.ModuleDict)) and type(model).forward is nn.Module.forward:
        what = f"the model is a {type(model).__name__}, which has no forward around which its parameters are gathered"
        allowed = "a module with a forward that holds it; or strategy=ddp, where every rank holds the whole"
        raise ConfigError(Problem(what=what, asked="strategy=fsdp2", allowed=allowed, instead="strategy=ddp"))


def refuse_script(model: nn.Module) -> None:
    """Raise ConfigError for modules of TorchScript, whose parameters torch does not let anybody replace."""
    scripts = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    if scripts:
        what = f"{scripts[0] or 'the model'} is a module of TorchScript, whose parameters cannot be sharded"
        allowed = "strategy=ddp, which leaves them in place; or the Python module that it was made of"
        raise ConfigError(Problem(what=what, asked="strategy=fsdp2", allowed=allowed, instead="strategy=ddp"))
