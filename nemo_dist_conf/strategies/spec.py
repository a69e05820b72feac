"""What a strategy is to the rest of the package: one row, torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Mapping

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.names import ACTIVATION_CHECKPOINTING_MODES, STRATEGY_NAMES
from nemo_dist_conf.topology.axes import AxisRules
from nemo_dist_conf.wording import Spelling

__all__ = ["Rules", "Strategy"]

#: (the strategy node as plain values, the sizes, spelling of keys) -> what cannot work
Rules = Callable[[Mapping[str, Any], Mapping[str, Any], Spelling], list[Problem]]


@dataclass(frozen=True)
class Strategy:
    """One strategy: its schema, its axes, its rules, and where the rest of it is.

    typed: the class of its typed config. engine: what executes it (a subclass of ``runtime.engines.base.Engine``).
    Both as ``module:Class``, imported when the strategy is executed, never while composing.
    target: the class path that a composed node's ``_target_`` has, where it is not that of ``typed``.
    costs: ``module:OBJECT``, an instance of nemo_dist_conf.plan.strategies.base.StrategyCosts, imported by the plan
    alone; None: the plan refuses the strategy by name.
    schema: its fields are the options; one is activation_checkpointing. Options that are called as some of ours are
    (autocast_dtype, enable_compile) are executed as ours are.
    needs_mesh: False: its ranks are all there are, and until a model is wrapped no process group has to be started.
    sums_gradients: the option with which gradients are added over ranks instead of averaged.
    compute_dtype: the option that holds the dtype in which a model computes, dotted, and off by a switch ``enabled``
    beside it; None: the strategy has none, so ``train.dtype`` alone says it.
    loss_scaling: whether losses can be scaled, without which gradients in float16 become zero.
    """

    name: str
    schema: type
    typed: str
    axes: AxisRules
    rules: Rules
    engine: str
    target: str = ""
    activation_checkpointing: tuple[bool | str, ...] = ACTIVATION_CHECKPOINTING_MODES
    costs: str | None = None
    needs_mesh: bool = True
    sums_gradients: str | None = None
    compute_dtype: str | None = None
    loss_scaling: bool = True

    def __post_init__(self) -> None:
        if not self.target:
            object.__setattr__(self, "target", self.typed.replace(":", "."))

    @property
    def names(self) -> tuple[str, ...]:
        """The name and its aliases."""
        return (self.name, *STRATEGY_NAMES.get(self.name, ()))

    @property
    def config(self) -> Any:
        """The class of the typed config, which holds torch's objects: asking for it imports torch."""
        return self._loaded("typed")

    def load_engine(self) -> Any:
        """The class of the engine: asking for it imports torch."""
        return self._loaded("engine")

    def load_costs(self) -> Any:
        """The object of the costs; None where the row names none."""
        return None if self.costs is None else self._loaded("costs")

    def _loaded(self, part: str) -> Any:
        """What the row names as ``part``. Raises ConfigError where another package's row names what is not there."""
        import pkgutil  # not while composing

        path: str = getattr(self, part)
        try:
            return pkgutil.resolve_name(path)
        except (ImportError, AttributeError, ValueError) as error:
            if self.name in STRATEGY_NAMES:
                raise
            what = f"strategy={self.name}: its {part} {path} cannot be loaded: {type(error).__name__}: {error}"
            default = next(iter(STRATEGY_NAMES))
            raise ConfigError(
                Problem(
                    what=what,
                    asked=f"strategy={self.name}",
                    allowed=f"{', '.join(STRATEGY_NAMES)}; or the package that adds {self.name}, repaired",
                    instead=f"strategy={default}",
                )
            ) from error
