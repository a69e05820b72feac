"""The code of a model family that transformers does not bring itself."""

from __future__ import annotations

import importlib

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.families.registry import find_family

__all__ = ["import_modeling"]


def import_modeling(model_type: object) -> None:
    """Import the module by which transformers knows a family of another package (``modeling`` in its row).

    Nothing is done for a family that has none. Raises ConfigError where it cannot be imported.
    """
    family = find_family(model_type)
    if family is None or not family.modeling:
        return
    try:
        importlib.import_module(family.modeling)
    except Exception as error:  # whatever another package's code raises while it is imported
        what = f"{family.modeling}, the code of the family {family.name}, cannot be imported: "
        raise ConfigError(
            Problem(
                what=f"{what}{type(error).__name__}: {error}",
                asked=f"model.config.model_type={family.name}",
                allowed="a family whose package can be imported, or one of transformers",
                instead=f"python -c 'import {family.modeling}'",
            )
        ) from error
