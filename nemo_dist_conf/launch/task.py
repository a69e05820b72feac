"""What a rank is given: which function to call, with which config, in which surroundings."""

from __future__ import annotations

import ast
import datetime
import importlib
import os
import pickle
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

from omegaconf import DictConfig

from nemo_dist_conf.composition.agreement.drawn_values import Drawn
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.topology.launched_ranks import set_by_elastic

__all__ = ["Payload", "Reference", "pack", "refer", "refuse_unguarded"]


@dataclass(frozen=True)
class Reference:
    """A function by name, for another process: ``depth`` decorators were taken off (``__wrapped__``).

    The task function is what stands below ``@hydra.main``, so its name leads to the decorated one.
    """

    module: str
    qualname: str
    depth: int

    def find(self) -> Callable[..., Any]:
        """The function, in the process that calls this."""
        found: Any = sys.modules.get(self.module) or importlib.import_module(self.module)
        for part in self.qualname.split("."):
            found = getattr(found, part)
        for _ in range(self.depth):
            found = found.__wrapped__
        return found


@dataclass(frozen=True)
class Payload:
    """All that the ranks of a job share. body: pickled task function, its config, Hydra's and what was drawn, opened in
    the rank only after the surroundings are put up, because it may import the user's modules. allowed: the app's
    execution whitelist (Hydra 1.4).
    """

    body: bytes
    job_name: str
    now: datetime.datetime
    threads: int
    allowed: Any = None
    folder: str = field(default_factory=os.getcwd)
    argv: list[str] = field(default_factory=lambda: list(sys.argv))
    environment: dict[str, str] = field(
        default_factory=lambda: {name: value for name, value in os.environ.items() if not set_by_elastic(name)}
    )
    package_main: str | None = field(default_factory=lambda: _package_main())

    def open(self) -> tuple[Callable[..., Any] | None, DictConfig, DictConfig, Drawn]:
        """Task function (None: it comes by another way), task config, Hydra's config, what was drawn."""
        if self.package_main is not None:
            sys.modules["__main__"] = importlib.import_module(self.package_main)
        task, config, hydra, drawn = pickle.loads(self.body)
        return task.find() if isinstance(task, Reference) else task, config, hydra, drawn


def _package_main() -> str | None:
    """``package.__main__`` where the program is ``python -m package``: the one that multiprocessing does not import."""
    name = getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", None) or ""
    return name if name.endswith(".__main__") else None


def refer(task: Callable[..., Any]) -> Reference | None:
    """The function by name, or None where no name leads to it (a nested function, a lambda)."""
    module, qualname = getattr(task, "__module__", None), getattr(task, "__qualname__", "")
    if module is None or "<" in qualname:
        return None
    reference = Reference(module, qualname, 0)
    try:
        found: Any = reference.find()
    except (AttributeError, ImportError):
        return None
    depth = 0
    while found is not task:
        found, depth = getattr(found, "__wrapped__", None), depth + 1
        if found is None:
            return None
    return Reference(module, qualname, depth)


def refuse_unguarded(task: Callable[..., Any], start_method: str) -> None:
    """Raise ConfigError where a rank that imports the program would run all of it again, the sweep included."""
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    if start_method == "fork" or task.__module__ != "__main__" or file is None:
        return
    try:
        statements = ast.parse(Path(file).read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return
    for statement in statements:
        call = statement.value if isinstance(statement, ast.Expr) else None
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == task.__name__:
            name = Path(file).name
            raise ConfigError(
                Problem(
                    what=f"{name} calls {task.__name__}() when it is imported, which every rank would do",
                    asked=f"hydra.launcher.start_method={start_method}",
                    allowed=f'the call below if __name__ == "__main__": in {name}, or fork',
                    instead="hydra.launcher.start_method=fork",
                )
            )


def pack(task: Callable[..., Any] | None, config: DictConfig, hydra: DictConfig, drawn: Drawn) -> bytes:
    """The body of a payload. Raises ConfigError where it holds something that cannot leave this process."""
    body = ((refer(task) or task) if task else None, config, hydra, drawn)
    try:
        return pickle.dumps(body)
    except Exception as error:  # pickle raises nearly anything
        reason = str(error)
    try:
        import cloudpickle
    except ImportError:
        raise ConfigError(
            Problem(
                what=f"the task function or its config cannot be sent to another process: {reason}",
                asked="hydra.launcher.start_method=forkserver",
                allowed="a function at the top level of a module; fork; or the package cloudpickle",
                instead="pip install cloudpickle",
            )
        ) from None
    try:
        return cloudpickle.dumps(body)
    except Exception as error:
        raise ConfigError(
            Problem(
                what=f"the task function or its config cannot be sent to another process: {error}",
                asked="hydra.launcher.start_method=forkserver",
                allowed="a config of values that pickle can send; any task function with fork",
                instead="hydra.launcher.start_method=fork",
            )
        ) from None
