"""Hydra's own ways to the typed classes; tests/contract/test_hydra_ways.py has each as a test of its own."""

from __future__ import annotations

from functools import partial
from typing import Any, Callable

from tests.conformance.case import Case
from tests.contract import test_hydra_ways as ways
from tests.dist import test_instantiate as hook

__all__ = ["CASES"]

_AREA = "Hydra's own ways"


def _holds(check: Callable[..., Any], *arguments: Any) -> float:
    check(*arguments)
    return 0.0


CASES: list[Case] = [
    *(
        Case(
            _AREA,
            "hydra.utils.instantiate of a node, of the tree, and of a tree that holds it",
            f"strategy={strategy}, _convert_={mode}",
            partial(_holds, ways.test_hydras_instantiate_makes_the_typed_configs, strategy, mode),
            in_suite=False,
        )
        for strategy in ways.WORDS
        for mode in ways.MODES
    ),
    *(
        Case(
            _AREA,
            "a node _target_: nemo_dist_conf.instantiate, with a model and an optimizer as nodes",
            f"2 ranks, {words[0]}, _convert_={mode}" + (", not recursive" if node else ""),
            partial(_holds, hook.test_the_hook_is_a_node_too, words, node, mode),
            in_suite=False,
        )
        for words in (("strategy=ddp",), (hook.FP32,))
        for mode in ("none", "all")
        for node in ({}, {"_recursive_": False})
    ),
    *(
        Case(_AREA, f"{name} on {kind.__name__}", "no process group", partial(_holds, check, kind), in_suite=False)
        for name, check in (
            ("typing.get_type_hints", ways.test_hints_can_be_read),
            ("OmegaConf.structured", ways.test_omegaconf_reads_a_class_and_gives_it_back),
            ("hydra_zen.builds with the full signature", ways.test_hydra_zen_builds_a_class_with_its_full_signature),
        )
        for kind in ways.CLASSES
    ),
]
