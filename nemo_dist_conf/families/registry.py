"""All families, by the name that a config has for them. A new one is a file in this package and a name here."""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING

from nemo_dist_conf.entry_points import AddedRows

if TYPE_CHECKING:
    from nemo_dist_conf.families.spec import Family

__all__ = ["FAMILY_NAMES", "families", "find_family"]

#: model_type -> nemo_dist_conf.families.<model_type>, whose FAMILY is the row. First those of which most is known: they
#: come first where messages list families.
FAMILY_NAMES: tuple[str, ...] = (
    *("llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"),
    *("bamba", "bloom", "codegen", "falcon", "falcon_h1", "falcon_mamba", "gpt_neo", "gptj", "granitemoehybrid"),
    *("jamba", "mamba", "mamba2", "minimax", "mpt", "nemotron_h", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text"),
    *("qwen3_next", "recurrent_gemma", "rwkv", "xglm", "xlstm", "zamba", "zamba2"),
)


def find_family(model_type: object) -> Family | None:
    """The row of the family that a config calls so; None where nothing is known of it.

    Its module is imported, and no other family's. Rows of other packages are looked for only where we have none.
    Raises ConfigError for a row of another package that cannot be used.
    """
    if not isinstance(model_type, str) or not model_type:
        return None
    return _own(model_type) if model_type in FAMILY_NAMES else _added().find(model_type)


@functools.cache
def _own(name: str) -> Family:
    family: Family = importlib.import_module(f"nemo_dist_conf.families.{name}").FAMILY
    return family


@functools.cache
def _added() -> AddedRows[Family]:
    from nemo_dist_conf.families.spec import Family  # for a family only, and most apps have none that we hear of

    return AddedRows("nemo_dist_conf.families", Family, "family", FAMILY_NAMES)


def families() -> list[Family]:
    """Every row, ours first: imports them all, for messages and tests. What a package adds wrongly is left out."""
    return [*map(_own, FAMILY_NAMES), *_added().all()]
