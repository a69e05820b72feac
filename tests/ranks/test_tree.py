"""A tree resolved once reads the same in every rank, and what belongs to a rank alone is left for it."""

import datetime
import itertools
import os
import re

import pytest
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from nemo_dist_conf.ranks.tree import different_keys, flat_config, replace_tree, resolve_for_ranks, same_now
from nemo_dist_conf.store import register_resolver


@pytest.fixture(autouse=True)
def count():
    """``${count:}`` is another number each time that it is asked."""
    numbers = itertools.count()
    register_resolver("count", lambda: next(numbers))
    return numbers


def resolved(tree, **flags):
    made = OmegaConf.create(tree)
    for name, value in flags.items():
        getattr(OmegaConf, f"set_{name}")(made, value)
    resolve_for_ranks(made)
    return made


def written(tree, key):
    *path, last = key.split(".")
    node = OmegaConf.select(tree, ".".join(path)) if path else tree
    return node._get_node(int(last) if last.isdigit() else last)._value()


def test_what_answers_differently_each_time_is_asked_once_for_each_place():
    tree = resolved({"a": "${count:}", "b": "${count:}", "list": ["${count:}"], "name": "run-${count:}-${count:}"})
    first, again = (OmegaConf.to_container(tree, resolve=True) for _ in range(2))
    assert first == again == {"a": 0, "b": 1, "list": [2], "name": "run-3-4"}
    assert [written(tree, key) for key in ("a", "list.0", "name")] == [0, 2, "run-3-4"]


def test_what_refers_to_a_value_gets_the_same_one_wherever_it_stands():
    tree = resolved({"before": "x${seed}", "seed": "${count:}", "deep": {"after": "${seed}", "near": "${.after}"}})
    assert (tree.before, tree.seed, tree.deep) == ("x0", 0, {"after": 0, "near": 0})


@pytest.mark.parametrize(
    "value", ["${oc.env:LOCAL_RANK}", "${oc.env:RANK,0}", "${oc.decode:${oc.env:LOCAL_RANK}}", "${oc.env:SLURM_PROCID}"]
)
def test_what_reads_a_ranks_variable_is_left_to_the_rank(monkeypatch, value):
    """Also where the launcher has such a variable itself."""
    for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"):
        monkeypatch.setenv(name, "7")
    tree = resolved({"mine": value, "refers": "${mine}", "inside": {"refers": ["${mine}"]}})
    assert written(tree, "mine") == value
    assert str(tree.mine) == str(tree.refers) == str(tree.inside.refers[0]) == "7"
    for name in ("LOCAL_RANK", "RANK", "SLURM_PROCID"):
        monkeypatch.setenv(name, "5")
    assert str(tree.mine) == str(tree.refers) == str(tree.inside.refers[0]) == "5"


def test_only_the_part_of_a_text_that_reads_a_ranks_variable_is_left(monkeypatch):
    tree = resolved({"name": "run${count:}-${oc.env:LOCAL_RANK}-${x}", "two": "${oc.env:LOCAL_RANK}${x}", "x": "y"})
    assert re.fullmatch(r"run\d-\$\{oc.env:LOCAL_RANK\}-y", written(tree, "name"))
    assert written(tree, "two") == "${oc.env:LOCAL_RANK}y"
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert tree.two == "3y"


def test_other_variables_of_the_environment_are_read_here(monkeypatch):
    monkeypatch.setenv("MY_RANK", "here")
    tree = resolved({"a": "${oc.env:MY_RANK}", "b": "${oc.env:NOT_SET_ANYWHERE,default}"})
    monkeypatch.setenv("MY_RANK", "there")
    assert (tree.a, tree.b) == ("here", "default")


def test_what_cannot_be_resolved_here_is_left_and_gives_omegaconfs_own_error_in_the_rank(monkeypatch):
    monkeypatch.delenv("LATER", raising=False)
    tree = resolved({"later": "${oc.env:LATER}", "wrong": "${no_such:1}", "text": "a-${oc.env:LATER}-${count:}"})
    with pytest.raises(InterpolationResolutionError):
        tree.later
    monkeypatch.setenv("LATER", "now")
    assert tree.later == "now" and tree.text == tree.text and tree.text.startswith("a-now-")
    with pytest.raises(Exception, match="no_such"):
        tree.wrong


def test_a_resolver_that_raises_is_left_too():
    def broken():
        raise RuntimeError("not here")

    register_resolver("broken", broken)
    assert written(resolved({"a": "${broken:}", "b": "${count:}"}), "a") == "${broken:}"


def test_resolving_is_over_afterwards(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    resolved({"a": "${oc.env:RANK}"})
    assert OmegaConf.create({"a": "${oc.env:RANK}"}).a == "2"


@pytest.mark.parametrize(
    "text", ["\\${not_one}", "a\\${b}-c", "\\\\${count:}\\${d", "\\${e} ${count:}", "\\${e} ${f}", "tail\\ \\${g} \\\\"]
)
def test_escaped_text_stays_text(text, count):
    expected = OmegaConf.create({"a": text, "f": "\\${h}"}).a
    asked_before = next(count)
    tree = resolved({"a": text, "f": "\\${h}"})
    assert tree.a == tree.a == expected.replace("0", str(asked_before + 1)) and "${" in tree.a


def test_missing_values_none_and_empty_nodes_stay():
    tree = resolved({"missing": MISSING, "none": None, "empty": {}, "list": [], "refers": "${missing}"})
    assert OmegaConf.is_missing(tree, "missing") and written(tree, "refers") == "${missing}"
    assert (tree.none, tree.empty, tree.list) == (None, {}, [])


def test_nodes_and_types_that_are_referred_to_come_as_they_are():
    tree = resolved({"a": {"x": 1, "y": ["${count:}"]}, "b": "${a}", "n": "${a.x}", "many": "${a.y}"})
    assert tree.b == {"x": 1, "y": [0]} and tree.n == 1 and tree.many == [0]
    tree.a.x = 2
    assert tree.b.x == tree.n == 1


def test_a_resolver_with_a_dictionary_among_its_arguments():
    register_resolver("size", lambda words: len(words))
    tree = resolved({"a": "x${size:{p:1,q:2}}-${oc.env:LOCAL_RANK}"})
    assert written(tree, "a") == "x2-${oc.env:LOCAL_RANK}"


@pytest.mark.parametrize("flags", [{"readonly": True}, {"struct": True}])
def test_flags_are_no_obstacle_and_stay(flags):
    tree = resolved({"a": "${count:}", "b": {"c": "${count:}"}}, **flags)
    assert (tree.a, tree.b.c) == (0, 1) and tree.b.c == 1
    with pytest.raises(Exception, match="read-only|not in struct"):
        tree.new = 1


def test_a_readonly_node_inside_is_resolved_too():
    tree = OmegaConf.create({"b": {"c": "${count:}"}})
    OmegaConf.set_readonly(tree.b, True)
    resolve_for_ranks(tree)
    assert written(tree, "b.c") == 0 and OmegaConf.is_readonly(tree.b)


def test_a_readonly_node_below_one_that_is_not_is_resolved_too():
    tree = OmegaConf.create({"b": {"c": {"d": "${count:}", "e": ["${count:}"]}}})
    OmegaConf.set_readonly(tree.b.c, True)
    resolve_for_ranks(tree)
    assert (written(tree, "b.c.d"), written(tree, "b.c.e.0")) == (0, 1)


def test_replacing_the_contents_reaches_those_who_hold_the_tree():
    mine = OmegaConf.create({"a": 1, "gone": 2, "b": {"c": "${count:}"}})
    OmegaConf.set_struct(mine, True)
    replace_tree(mine, OmegaConf.create({"a": 3, "b": {"c": 4, "lazy": "${oc.env:HOME}"}, "new": "${a}"}))
    assert OmegaConf.to_container(mine) == {"a": 3, "b": {"c": 4, "lazy": "${oc.env:HOME}"}, "new": "${a}"}
    assert mine.new == 3 and mine.b.lazy == os.environ["HOME"]
    with pytest.raises(Exception, match="struct"):
        mine.other = 1


def test_replacing_forgets_what_resolvers_answered():
    tree = OmegaConf.create({"when": "${same:}"})
    register_resolver("same", lambda: "mine", use_cache=True)
    assert tree.when == "mine"
    register_resolver("same", lambda: "theirs", use_cache=True)
    replace_tree(tree, OmegaConf.create({"when": "${same:}"}))
    assert tree.when == "theirs"


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
    assert flat == {"a.b": "true", "a.c": "null", "d": "${a.b}", "e": "[1, 2]", "f": "{}"}


def test_different_keys_are_those_with_another_value_or_on_one_side_only():
    assert different_keys({"a": "1", "b": "2", "d": "4"}, {"a": "1", "b": "3", "c": "4"}) == ["b", "c", "d"]
    assert different_keys({"a": "1"}, {"a": "1"}) == []
