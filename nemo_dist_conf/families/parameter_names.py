"""Names of a model's parameters where its family's row says them, so that nothing has to be built."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Mapping

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.families.registry import find_family

if TYPE_CHECKING:
    from nemo_dist_conf.families.built_shape import BuiltShape
    from nemo_dist_conf.families.shapes import ModelShape

__all__ = ["names_of", "parameter_names"]


def parameter_names(config: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, int]] | None:
    """(every name -> the one by which a parameter is counted once, that one -> the parameter's dimensions).

    config: the fields of a transformers config. None where the model has to be built, or its sizes are refused.
    """
    family = find_family(config.get("model_type"))
    if family is None or family.shapes is None:
        return None
    from nemo_dist_conf.families.shapes import shape_of, weights

    try:
        shape = shape_of(config)
    except ConfigError:  # told by who needs the sizes
        return None
    return names_of(shape), {name: len(weight.shape) for name, weight in weights(shape)}


def names_of(model: ModelShape | BuiltShape) -> dict[str, str]:
    """Every name of a parameter -> the one by which it is counted once."""
    from nemo_dist_conf.families.shapes import weights

    keys = {name: name for name, _ in weights(model)}
    return {**keys, **model.aliases}
