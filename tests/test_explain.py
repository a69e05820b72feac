"""Help texts on the command line."""

import dataclasses

import pytest

from nemo_dist_conf.explain import explain, main
from nemo_dist_conf.sections import SECTIONS
from nemo_dist_conf.strategies import STRATEGIES, strategy_names


def test_without_a_name_every_option_of_every_section_is_explained():
    text = explain()
    for strategy in STRATEGIES:
        for item in dataclasses.fields(strategy.schema):
            assert f"strategy.{item.name}" in text
    for name, schema in SECTIONS.items():
        for item in dataclasses.fields(schema):
            assert f"{name}.{item.name}" in text


@pytest.mark.parametrize("name", strategy_names())
def test_every_name_of_a_strategy_is_known(name):
    assert f"strategy={name}" in explain(f"strategy={name}").replace(" | ", " strategy=")


def test_defaults_are_shown_as_they_are_typed():
    text = explain("strategy=fsdp2", "parallelism")
    assert "strategy.mp_policy.param_dtype=bfloat16" in text
    assert "strategy.reshard_after_forward=null" in text
    assert "parallelism.tp_size=1" in text


def test_an_unknown_name_is_refused_with_the_nearest(capsys):
    assert main(["paralelism"]) == 1
    assert "type     parallelism" in capsys.readouterr().err
    assert main(["strategy=dpp"]) == 1
    assert "type     strategy=ddp" in capsys.readouterr().err
