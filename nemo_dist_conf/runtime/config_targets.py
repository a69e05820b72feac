"""Objects of the user's own that a config names by ``_target_``."""

from __future__ import annotations

import inspect
from typing import Any

from omegaconf import OmegaConf

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.wording import assigned

__all__ = ["build_target"]


def build_target(node: Any, section: str, *args: Any, instead: str, **kwargs: Any) -> Any:
    """What ``hydra.utils.instantiate`` makes of a node with ``_target_``.

    section: where the node stands, in the config's words. instead: words that choose something else there.
    Raises ConfigError for a target that is not there and for arguments that it does not take; an error inside it stays
    as it is.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    try:
        return instantiate(node, *args, **kwargs)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ConfigError):
            raise cause from None
        values: Any = OmegaConf.to_container(node) if OmegaConf.is_config(node) else node
        target = values.get("_target_")
        misfit = _misfit(target, args, {**values, **kwargs})
        if misfit is None:
            raise
        what = f"{section}: {misfit}"
        allowed = "the path of a class or function, and arguments that it takes"
        raise ConfigError(
            Problem(what=what, asked=assigned(f"{section}._target_", target), allowed=allowed, instead=instead)
        ) from error


def _misfit(target: Any, args: tuple[Any, ...], values: dict[str, Any]) -> str | None:
    """Why a target cannot be called so; None where it can."""
    from hydra.utils import get_object

    try:
        found = get_object(target)
    except Exception as error:
        return f"{target!r} cannot be imported ({_first(error)})"
    if not callable(found):
        return f"{target} is a {type(found).__name__}, which cannot be called"
    given = {key: value for key, value in values.items() if not (key.startswith("_") and key.endswith("_"))}
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # of a function in C
        return None
    try:
        bind = signature.bind_partial if values.get("_partial_") else signature.bind
        bind(*values.get("_args_", args), **given)
    except TypeError as error:
        return f"{target} cannot be called with these arguments ({_first(error)})"
    return None


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
