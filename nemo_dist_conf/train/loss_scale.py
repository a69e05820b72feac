"""The factor by which a loss in float16 is multiplied, so that its gradients are not too small for that type."""

from __future__ import annotations

__all__ = ["LossScale"]

#: torch.amp.GradScaler's own values.
_FIRST, _FACTOR, _PATIENCE = 2.0**16, 2.0, 2000


class LossScale:
    """A power of two: lower as soon as gradients overflow, higher after many steps in which none did.

    Not torch.amp.GradScaler: that one looks at the gradients of a rank, and the stages of a pipeline would decide
    differently; the norm of the step is known on all ranks anyway. A step whose gradients overflow is computed again
    with a lower factor, so none is left out and layouts stay comparable.
    """

    def __init__(self, value: float = _FIRST, steps: int = 0) -> None:
        """steps: made since the value is what it is."""
        self.value, self.steps = value, steps

    def lower(self) -> bool:
        """After gradients that were not finite; False where the reason can not be the factor."""
        self.value, self.steps = self.value / _FACTOR, 0
        return self.value >= 1.0

    def made_step(self) -> None:
        self.steps += 1
        if self.steps == _PATIENCE:
            self.value, self.steps = self.value * _FACTOR, 0

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "steps": self.steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value, self.steps = state["value"], int(state["steps"])
