"""Models of constructors for tests: recorded, given their values, on meta.

Whether a tape is what a constructor did: played back in its order, from one generator, it gives the same bits.
"""

from __future__ import annotations

from typing import Any, Callable

import torch
from torch import Tensor, nn

from nemo_dist_conf.runtime.model.construct import Record, construct, named_tensors, record
from nemo_dist_conf.runtime.model.materialise import materialise
from nemo_dist_conf.runtime.model.recording.playback import _Run
from nemo_dist_conf.runtime.model.recording.tape import Op

__all__ = ["CPU", "NoInitialiser", "differences", "filled", "misfits", "on_meta", "recorded", "tensors"]

CPU = torch.device("cpu")


class _InOrder(_Run):
    """Draws as the constructor did: one number after the other, out of torch's own generator."""

    def __init__(self) -> None:
        super().__init__(CPU, 0, {})
        self.before: dict[Op, Tensor] = {}

    def step(self, op: Op) -> None:
        if op.again is not None:
            torch.set_rng_state(self.before[op.again])
        elif op.is_random:
            self.before[op] = torch.get_rng_state()
        with torch.random.fork_rng(devices=[], enabled=op.state is not None):
            super().step(op)

    def seed_draw(self, op: Op, device: torch.device) -> None:
        if op.state is not None:
            super().seed_draw(op, device)


def recorded(factory: Callable[[], Any], seed: int = 0) -> tuple[nn.Module, Record]:
    model, made = record(factory, seed, CPU)
    assert made is not None
    return model, made


def differences(factory: Callable[[], Any], seed: int = 5) -> list[str]:
    """What is not bit for bit as a plain constructor gives it: names, and ``name.dtype`` or the like."""
    plain = named_tensors(construct(factory, seed))
    model, made = recorded(factory, seed)
    run = _InOrder()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for op in made.tape.ops:  # also what was overwritten later: it drew numbers too
            run.step(op)
    found = []
    on_meta = named_tensors(model)
    if list(plain) != list(on_meta) or list(plain) != list(made.refs):
        return ["names"]
    for name, tensor in plain.items():
        ref = made.refs[name]
        value: Tensor = ref.of(run.storage(ref.stored) if ref.stored.real is None else ref.stored.real)
        if not on_meta[name].is_meta:
            found.append(f"{name}.is_meta")
        for what in ("dtype", "shape", "requires_grad"):
            if getattr(on_meta[name], what) != getattr(tensor, what) or type(on_meta[name]) is not type(tensor):
                found.append(f"{name}.{what}")
        if not torch.equal(_bits(value), _bits(tensor.detach())):
            found.append(name)
    return found


def misfits(factory: Callable[[], Any], seed: int = 5) -> list[str]:
    """What, as a run draws it, is not a constant of the plain constructor, or not distributed as there."""
    plain = named_tensors(construct(factory, seed))
    model, made = recorded(factory, seed)
    materialise(model, made)
    found = []
    for name, value in named_tensors(model).items():
        want, ref = plain[name].detach(), made.refs[name]
        draws = [made.tape.ops[index].is_random for index in made.tape.slice_of([ref])]
        if value.is_meta or not any(draws):
            if value.is_meta or not torch.equal(_bits(value.detach()), _bits(want)):
                found.append(name)
        elif value.is_floating_point() and value.numel() >= 1024:
            one, other = value.detach().double(), want.double()
            deviation = other.std() / value.numel() ** 0.5
            if not 0.8 < one.std() / other.std() < 1.25 or abs(one.mean() - other.mean()) > 8 * deviation:
                found.append(name)
    return found


def _bits(tensor: Tensor) -> Tensor:
    """NaN is equal to itself here."""
    return tensor.contiguous().flatten().view(torch.uint8) if tensor.numel() else tensor


def on_meta(kind: Any, *args: Any, **kwargs: Any) -> nn.Module:
    with torch.device("meta"):
        return kind(*args, **kwargs)


def filled(kind: Any, *args: Any, seed: int = 0, **kwargs: Any) -> nn.Module:
    """A model built without values and materialised without any sharding."""
    model, record = recorded(lambda: kind(*args, **kwargs), seed)
    materialise(model, record)
    return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, also those that are not saved."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {name: value.detach() for name, value in named}


class NoInitialiser(nn.Module):
    """Owns a parameter, and says nowhere how it starts but in its constructor."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.gain = nn.Parameter(torch.full((4,), 7.0))

    def forward(self, x_BH: Tensor) -> Tensor:
        return self.fc(x_BH) * self.gain
