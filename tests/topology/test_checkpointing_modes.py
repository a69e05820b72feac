"""Activation checkpointing has one answer, wherever it was said, and a word for it that is none is refused."""

import pytest

from nemo_dist_conf.topology.checkpointing_modes import mode_problem, one_mode
from nemo_dist_conf.wording import Spelling

ALL = (False, True, "selective")


@pytest.mark.parametrize(
    ("outer", "inner", "mode"),
    [
        (False, False, False),
        (False, "selective", "selective"),
        ("full", False, True),
        (True, "full", True),
        ("false", "true", True),
        ("selective", "selective", "selective"),
    ],
)
def test_the_answers_of_both_places_are_one(outer, inner, mode):
    assert one_mode({"a": outer, "s.a": inner}, ALL, "fsdp2") == (mode, [])


def test_two_different_answers_are_refused():
    _, (problem,) = one_mode({"a": "selective", "s.a": True}, ALL, "fsdp2", Spelling("dist"))
    assert problem.what == "activation checkpointing has two different answers"
    assert (problem.asked, problem.instead) == (
        "dist.a=selective dist.s.a=true",
        "dist.a=selective dist.s.a=selective",
    )


def test_a_word_is_no_mode_or_none_of_this_strategy():
    _, problems = one_mode({"a": "some", "s.a": "selective"}, (False, True), "megatron_fsdp")
    assert [problem.what for problem in problems] == [
        "a=some is not a mode",
        "s.a=selective is not a mode of strategy=megatron_fsdp",
    ]
    assert {problem.allowed for problem in problems} == {"false, true"}
    assert mode_problem("a", "full", (False, True)) is None and mode_problem("a", 1) is not None
