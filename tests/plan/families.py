"""Parameters of a plan against transformers' own model, for every causal family: ``python -m tests.plan.families``.

python -m tests.plan.families gpt2 mamba    those families only
"""

from __future__ import annotations

import sys
from typing import Any

import torch

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.families.shapes import weights
from tests.plan.measure import shape_for
from tests.tiny_configs import causal_families, tiny_config

__all__ = ["config_of", "what_differs"]


def config_of(family: str, layers: int = 2) -> dict[str, Any]:
    """Fields of a tiny config of a family, as they are typed."""
    unsaid = ("dtype", "transformers_version")
    fields = {k: v for k, v in tiny_config(family, layers).to_dict().items() if v is not None and k not in unsaid}
    return {**fields, "model_type": family}


def what_differs(family: str) -> list[str]:
    """Names of parameters that the plan has otherwise than transformers, which builds the model on meta."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config_of(family)
    planned = {name: weight.shape for name, weight in weights(shape_for(config))}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    wanted = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return sorted(name for name in planned.keys() | wanted.keys() if planned.get(name) != wanted.get(name))


def main() -> int:
    wrong = refused = 0
    chosen = sys.argv[1:] or causal_families()
    for family in chosen:
        try:
            found = what_differs(family)
        except ConfigError as error:  # transformers builds none either
            refused += 1
            print(f"{family:32} refused  {error.what}")
            continue
        except Exception as error:  # of its tiny config
            refused += 1
            print(f"{family:32} no config here  {type(error).__name__}: {str(error).splitlines()[0]}")
            continue
        wrong += bool(found)
        print(f"{family:32} {'differs  ' + ', '.join(found[:3]) if found else 'equal'}", flush=True)
    print(f"{len(chosen)} families: {len(chosen) - wrong - refused} equal, {refused} cannot be built, {wrong} differ")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
