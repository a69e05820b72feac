"""A config as it is written and as it reads, and one time for all ranks."""

import datetime

from omegaconf import MISSING, OmegaConf

from nemo_dist_conf.composition.agreement.config_tree import as_ranks_read, different_keys, flat_config, same_now
from nemo_dist_conf.composition.store import register_resolver


def test_what_one_process_can_say_for_all_ranks_is_read_and_the_rest_is_as_written(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "7")
    register_resolver("object_of", object)
    tree = OmegaConf.create(
        {
            "x": 1,
            "refers": ["${x}", {"deep": "a${x}"}],
            "node": "${refers.1}",
            "mine": "gpu${oc.env:LOCAL_RANK}",
            "wrong": "${no_such:}",
            "object": "${object_of:}",
            "missing": MISSING,
            "none": None,
        }
    )
    assert as_ranks_read(tree) == {
        "x": 1,
        "refers": [1, {"deep": "a1"}],
        "node": {"deep": "a1"},
        "mine": "gpu${oc.env:LOCAL_RANK}",
        "wrong": "${no_such:}",
        "object": "${object_of:}",
        "missing": "???",
        "none": None,
    }
    assert tree.mine == "gpu7"


def test_one_time_for_all_also_where_another_was_read_before():
    tree = OmegaConf.create({"when": "${now:%Y-%f}"})
    same_now(datetime.datetime(2001, 1, 1, microsecond=1), tree)
    assert tree.when == "2001-000001"
    same_now(datetime.datetime(2002, 1, 1, microsecond=2), tree)
    assert tree.when == "2002-000002"


def test_a_flat_config_is_what_is_written():
    flat = flat_config(
        OmegaConf.create({"a": {"b": True, "c": None}, "d": "${a.b}", "e": [1, 2], "f": {}, "hydra": {"x": 1}})
    )
    assert flat == {"a.b": "true", "a.c": "null", "d": "${a.b}", "e": "[1,2]", "f": "{}"}


def test_different_keys_are_those_with_another_value_or_on_one_side_only():
    assert different_keys({"a": "1", "b": "2", "d": "4"}, {"a": "1", "b": "3", "c": "4"}) == ["b", "c", "d"]
    assert different_keys({"a": "1"}, {"a": "1"}) == []
