"""Styles that a run finds for a small model of each family, where a plan on paper would take others: ``python -m
tests.plan.found``. Its output is the table of nemo_dist_conf/families/found_styles.py.

python -m tests.plan.found gpt2 mamba2    those families only
"""

from __future__ import annotations

import sys
from typing import Any
from unittest.mock import patch

from nemo_dist_conf.families.built_shape import BuiltShape
from nemo_dist_conf.families.shapes import weights
from nemo_dist_conf.instantiate import instantiate
from nemo_dist_conf.plan.job import Styles
from nemo_dist_conf.runtime.techniques.tensor import parallel
from tests.dist.layouts import ADAMW, composed
from tests.dist.pool import run_ranks
from tests.plan.families import config_of
from tests.plan.measure import shape_for
from tests.tiny_configs import causal_families

__all__ = ["found_beside_the_plan", "styles_of_a_run"]


def _applied(config: dict[str, Any]) -> dict[str, Any]:
    """On a rank: the styles by which a model is split."""
    seen: dict[str, Any] = {}

    def apply(model: Any, styles: Any, mesh: Any) -> Any:
        seen.update(styles)
        return real(model, styles, mesh)

    real = parallel.apply_styles
    with patch.object(parallel, "apply_styles", apply):
        instantiate(composed("parallelism.tp_size=2", model={"config": config}, optimizer=ADAMW))
    return seen


def styles_of_a_run(config: dict[str, Any]) -> dict[str, Any]:
    """Module -> styles of a model split over two ranks."""
    found: dict[str, Any] = run_ranks(2, _applied, config)[0]
    return found


def found_beside_the_plan(shape: BuiltShape, named: dict[str, Any]) -> dict[str, str]:
    """Pattern -> style of the modules that a run splits otherwise than the plan on paper."""
    planned, split = Styles(shape.plan(False)), Styles(named)
    names = {*shape.run_of(1, 16, "float32", False).passages, *(name for name, _ in weights(shape)), *named}
    found: dict[str, str] = {}
    for name in sorted(names):
        now, then = (tuple(style for style in one.of_module(name) if style != "replicated") for one in (split, planned))
        if now != then:
            block = next((block for block in shape.names if name == block or name.startswith(f"{block}.")), "")
            found[parallel.pattern_of(block) + name[len(block) :]] = now[0] if now else "replicated"
    return found


def main() -> int:
    for family in sys.argv[1:] or causal_families():
        try:
            config = config_of(family)
            shape = shape_for(config)
            found = found_beside_the_plan(shape, styles_of_a_run(config)) if isinstance(shape, BuiltShape) else {}
        except Exception as error:  # what a run refuses has no styles
            print(f"# {family}: {str(error).splitlines()[0]}", flush=True)
            continue
        if found:
            by_style = {style: [name for name, other in found.items() if other == style] for style in found.values()}
            print(f'"{family}": { ({style: " ".join(names) for style, names in by_style.items()}) },', flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
