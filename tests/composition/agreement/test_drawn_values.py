"""What is random or a time is drawn once for all ranks; everything else stays as lazy as it was written."""

import datetime
import itertools
import logging
import os
import pickle
import random
import time
import uuid
from dataclasses import dataclass, field
from typing import Any, Union

import pytest
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from nemo_dist_conf.composition.agreement.drawn_values import find_drawn, put_constants, put_drawn, put_missing
from nemo_dist_conf.composition.hydra_inside import resolver_calls
from nemo_dist_conf.composition.store import register_resolver

RANK_VARIABLES = ("LOCAL_RANK", "RANK", "SLURM_PROCID")


@pytest.fixture(autouse=True)
def count():
    """``${count:}`` is another number each time that it is asked."""
    numbers = itertools.count()
    register_resolver("count", lambda *_: next(numbers))
    register_resolver("draw", lambda *_: f"{random.SystemRandom().getrandbits(32):x}")
    register_resolver("double", lambda value: 2 * (list(value) if OmegaConf.is_config(value) else value))
    register_resolver("join", lambda *values: "-".join(map(str, values)))
    return numbers


def sent(config):
    return pickle.loads(pickle.dumps(find_drawn(config)))


def ranks(tree, **flags):
    """The tree as rank 0 has it and as another rank has it, which composed for itself."""
    make = OmegaConf.structured if hasattr(tree, "__dataclass_fields__") else OmegaConf.create
    both = [make(tree) for _ in "01"]
    for made in both:
        for name, value in flags.items():
            getattr(OmegaConf, f"set_{name}")(made, value)
    drawn = sent(both[0])
    for made in both:
        put_drawn(made, drawn)
    put_constants(both[1], drawn)
    return both


def written(tree, key):
    *path, last = key.split(".")
    node = OmegaConf.select(tree, ".".join(path)) if path else tree
    return node._get_node(int(last) if last.isdigit() else last)._value()


def read(tree):
    return OmegaConf.to_container(tree, resolve=True)


def test_what_draws_stands_still_and_is_the_same_everywhere():
    many = ["${count:}", {"x": "${draw:}"}]
    tree = {"a": "${count:}", "b": "${count:}", "many": many, "name": "run-${draw:}-${draw:}"}
    first, second = ranks(tree)
    assert read(first) == read(second) == read(first)
    assert first.a != first.b and len(set(first.name.split("-"))) == 3
    assert isinstance(written(second, "a"), int) and "${" not in written(second, "name")


def test_what_refers_to_it_is_left_and_reads_the_same():
    deep = {"near": ["${...twice}"]}
    tree = {"before": "x${seed}", "seed": "${count:}", "twice": "${double:${seed}}", "deep": deep}
    first, second = ranks(tree)
    assert read(first) == read(second)
    assert first.before == f"x{first.seed}" and first.deep.near == [first.twice] == [2 * first.seed]
    assert [written(second, key) for key in ("before", "twice")] == ["x${seed}", "${double:${seed}}"]


@pytest.mark.parametrize(
    "value",
    ["${data.size}", "n${data.size}", "${double:${data.size}}", "${join:a,${data.size}}", "${oc.select:data.size}"],
)
def test_everything_else_follows_what_the_app_changes(value):
    first, second = ranks({"data": {"size": 1}, "model": {"in": value}, "also": "${model.in}"})
    before = first.also
    for made in (first, second):
        made.data.size = 7
        assert written(made, "model.in") == value and made.also == made.model["in"] != before


def test_a_resolver_that_reads_state_of_the_program_is_not_frozen():
    state = {"size": 1}
    register_resolver("state", lambda: state["size"])
    first, second = ranks({"a": "${state:}"})
    state["size"] = 2
    assert first.a == second.a == 2


def test_only_the_part_that_draws_is_replaced():
    tree = {
        "name": "m",
        "text": "${name}-${draw:}-${oc.env:LOCAL_RANK,x}",
        "inside": "${join:${name},${draw:},'q ${draw:} ${name}',${count:}}",
        "made": "${double:${count:}}",
    }
    first, second = ranks(tree)
    assert read(first) == read(second)
    drawn = {key: written(first, key) for key in tree}
    assert drawn["text"].startswith("${name}-") and drawn["text"].endswith("-${oc.env:LOCAL_RANK,x}")
    assert drawn["made"].startswith("${double:${oc.decode:'")
    for made in (first, second):
        made.name = "other"
    assert read(first) == read(second)
    assert first.text.startswith("other-") and first.inside.startswith("other-") and first.inside.count("other") == 2


def test_a_resolver_of_ranks_keeps_its_own_beside_what_is_drawn(monkeypatch):
    tree = {
        "mine": "${join:${draw:},${oc.env:LOCAL_RANK}}",
        "id": "${id_and_rank:}",
        "rank": "${my_rank:}",
        "read": "${double:${my_rank:}}",
    }
    register_resolver("my_rank", lambda: int(os.environ.get("RANK", "0")))
    register_resolver("id_and_rank", lambda: f"{uuid.uuid4()}-{os.getenv('LOCAL_RANK')}")
    for name in RANK_VARIABLES:
        monkeypatch.setenv(name, "0")
    first, second = ranks(tree)
    assert written(second, "rank") == tree["rank"] and written(second, "id") == tree["id"]
    first_mine = first.mine
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert (second.rank, second.read) == (1, 2)
    assert second.mine.endswith("-1") and second.mine[:-1] == first_mine[:-1]


@pytest.mark.parametrize(
    "value", ["${oc.env:LOCAL_RANK}", "${oc.env:RANK,0}", "${oc.decode:${oc.env:LOCAL_RANK}}", "${oc.env:SLURM_PROCID}"]
)
def test_what_reads_a_ranks_variable_is_left_to_the_rank(monkeypatch, value):
    for name in RANK_VARIABLES:
        monkeypatch.setenv(name, "7")
    tree, _ = ranks({"mine": value, "refers": "${double:${mine}}"})
    for name in RANK_VARIABLES:
        monkeypatch.setenv(name, "5")
    assert str(tree.mine) == "5" and str(tree.refers) in ("55", "10")


CLOCKS = {
    "datetime": lambda: datetime.datetime.now().strftime("%Y-%m-%d"),
    "time": lambda: time.strftime("%H"),
    "date": lambda: datetime.date.today().isoformat(),
    "seconds": lambda: int(time.time()) // 1_000_000_000,
}


@pytest.mark.parametrize("name", CLOCKS)
def test_a_resolver_that_asks_the_clock_is_asked_once_also_where_two_answers_are_the_same(name):
    register_resolver("clock", CLOCKS[name])
    first, second = ranks({"a": "at ${clock:}"})
    assert written(first, "a") == written(second, "a") == f"at {CLOCKS[name]()}"


def test_a_line_in_the_log_makes_no_clock_of_a_resolver():
    def logs():
        logging.getLogger(__name__).warning("asked")
        return os.getpid()

    register_resolver("logs", logs)
    assert written(ranks({"a": "${logs:}"})[1], "a") == "${logs:}"


def test_a_cached_resolver_gives_one_answer_to_the_whole_tree():
    register_resolver("id", lambda: str(uuid.uuid4()), use_cache=True)
    register_resolver("cached", lambda: 3, use_cache=True)
    first, second = ranks({"a": "${id:}", "b": {"c": "x/${id:}"}, "d": "${cached:}"})
    assert read(first) == read(second) and first.b.c == f"x/{first.a}"
    assert written(second, "d") == "${cached:}"
    asked = OmegaConf.create({"a": "${id:}"})
    before = asked.a
    put_drawn(asked, find_drawn(asked))
    assert asked.a == before  # what the process has read already holds


@pytest.mark.parametrize("constant", ["UUID", "hex", "time", "random"])
def test_a_constant_that_was_drawn_when_a_module_was_imported_is_rank_0s(constant):
    """Another process has another constant, which neither the call nor its answer here can tell."""
    times = iter(["2031-01-02_03-04-05", "2031-01-02_03-04-06"])
    values = {
        "UUID": lambda: f"run-{uuid.uuid4()}",
        "hex": lambda: f"run_{uuid.uuid4().hex[:7]}a1",
        "time": lambda: next(times),
        "random": lambda: f"{random.randint(10**9, 10**10)}.log",
    }
    first, second = (OmegaConf.create({"a": "${constant:}", "b": "in/${constant:}"}) for _ in "01")
    mine, theirs = values[constant](), values[constant]()
    register_resolver("constant", lambda: mine)
    drawn = sent(first)
    register_resolver("constant", lambda: theirs)
    put_constants(second, drawn)
    assert (second.a, second.b) == (mine, f"in/{mine}")


@pytest.mark.parametrize(
    "mine, theirs",
    [(0, 1), ("0", "1"), ("cuda:0", "cuda:1"), ("rank_00000000", "rank_00000001"), ("node-a", "node-b"), ("p9", "p10")],
)
def test_a_constant_that_belongs_to_a_rank_stays_its_own(mine, theirs):
    first, second = (OmegaConf.create({"a": "${constant:}"}) for _ in "01")
    register_resolver("constant", lambda: mine)
    drawn = sent(first)
    register_resolver("constant", lambda: theirs)
    put_drawn(second, drawn)
    put_constants(second, drawn)
    assert second.a == theirs


def test_a_resolver_that_the_process_lacks_is_answered_by_the_one_that_has_it():
    """Registered below ``if __name__ == "__main__":``, which a rank that the launcher starts does not run."""
    register_resolver("main_only", lambda value=3: value)
    register_resolver("main_list", lambda value: OmegaConf.create([value]))
    tree = OmegaConf.create(
        {
            "a": "${main_only:}",
            "b": "x-${main_only:q}-${c}",
            "c": 1,
            "d": "${join:${main_only:},${c}}",
            "e": "${main_only:${main_only:${c}}}",
            "f": "${double:${main_list:${c}}}",
        }
    )
    drawn = sent(tree)
    OmegaConf.clear_resolver("main_only")
    OmegaConf.clear_resolver("main_list")
    put_missing(tree, drawn)
    tree.c = 2
    assert read(tree) == {"a": 3, "b": "x-q-2", "c": 2, "d": "3-2", "e": 1, "f": [1, 1]}


def test_the_apps_own_random_numbers_are_left():
    register_resolver("dice", random.random)
    random.seed(3)
    expected = random.random()
    random.seed(3)
    ranks({"a": "${dice:}", "b": "${dice:}"})
    assert random.random() == expected


def test_what_cannot_be_said_here_is_left_and_gives_omegaconfs_own_error_in_the_rank(monkeypatch):
    def broken(*_):
        raise RuntimeError("not here")

    register_resolver("broken", broken)
    monkeypatch.delenv("LATER", raising=False)
    tree = {"a": "${broken:}", "b": "${join:${oc.env:LATER},x}", "c": "${no_such:1}", "d": "${join:${missing}}"}
    first, _ = ranks({**tree, "text": "${oc.env:LATER}-${draw:}", "missing": MISSING})
    assert [written(first, key) for key in "abcd"] == [tree[key] for key in "abcd"]
    with pytest.raises(InterpolationResolutionError):
        first.a
    monkeypatch.setenv("LATER", "now")
    assert first.b == "now-x" and first.text == first.text and first.text.startswith("now-")


def test_objects_made_anew_each_time_are_not_drawn():
    register_resolver("function", lambda: lambda x: x)
    assert written(ranks({"a": "${function:}"})[1], "a") == "${function:}"


@pytest.mark.parametrize("made", [True, False])
def test_a_drawn_list_or_mapping_and_what_stands_in_it(made):
    numbers = itertools.count()
    register_resolver("layers", lambda: (OmegaConf.create if made else list)([next(numbers), {"x": 1}]))
    first, second = ranks({"a": "${layers:}", "b": "${a.1}", "c": "n${a.0}"})
    assert read(first) == read(second) and second.b == {"x": 1} and second.c == f"n{second.a[0]}"


@pytest.mark.parametrize(
    "text",
    [
        "\\${not_one}",
        "\\\\${count:}\\${d",
        "\\${e} ${count:}",
        "a\\\\${count:}${f}",
        "${count:}\\\\${f}",
        "tail\\ \\${g} \\\\",
    ],
)
def test_escaped_text_stays_text(text, count):
    plain = {"f": "end"}
    register_resolver("count", lambda: 5)
    expected = OmegaConf.create({"a": text, **plain}).a
    answers = itertools.cycle([5, 6])
    register_resolver("count", lambda: next(answers))
    first, second = ranks({"a": text, **plain})
    assert first.a == second.a == expected


def test_texts_that_must_be_quoted():
    words = itertools.count()
    register_resolver("word", lambda: f"it's {next(words)} \\${{x}}")
    first, second = ranks({"whole": "${word:}", "part": "a ${word:}", "inside": "${join:${word:},b}"})
    assert first.whole == second.whole and first.whole.startswith("it's ") and first.whole.endswith("\\${x}")
    assert first.inside == second.inside and first.inside.endswith("-b")
    assert written(second, "part") == "a ${word:}"  # nothing written reads as this text


@pytest.mark.parametrize("value", [True, None, 1.5e-7, float("inf"), float("nan"), -3, "true", "3", "", "a b", "null"])
def test_values_of_each_kind_come_as_they_are_also_inside_other_interpolations(value):
    answers = itertools.cycle([value, "another"])
    register_resolver("flip", lambda: next(answers))
    register_resolver("kind", lambda value: f"{type(value).__name__} {value}")
    first, second = ranks({"whole": "${flip:}", "inside": "${kind:${flip:}}", "quoted": "${kind:'a ${flip:}'}"})
    assert repr(first.whole) == repr(second.whole) == repr(value)
    assert first.inside == second.inside == f"{type(value).__name__} {value}"
    assert first.quoted == second.quoted == f"str a {value}"


def test_missing_values_none_and_empty_nodes_stay():
    tree = {"missing": MISSING, "none": None, "empty": {}, "list": [], "refers": "${missing}", "x": "${count:}"}
    first, _ = ranks(tree)
    assert OmegaConf.is_missing(first, "missing") and written(first, "refers") == "${missing}"
    assert (first.none, first.empty, first.list) == (None, {}, [])


@pytest.mark.parametrize("flags", [{"readonly": True}, {"struct": True}])
def test_flags_are_no_obstacle_and_stay(flags):
    first, second = ranks({"a": "${count:}", "b": {"c": "${count:}"}}, **flags)
    assert read(first) == read(second) == read(second)
    with pytest.raises(Exception, match="read-only|not in struct"):
        second.new = 1


def test_a_readonly_node_below_one_that_is_not():
    tree = OmegaConf.create({"b": {"c": {"d": "${count:}", "e": ["${count:}"]}}})
    OmegaConf.set_readonly(tree.b.c, True)
    put_drawn(tree, find_drawn(tree))
    assert read(tree) == read(tree) and OmegaConf.is_readonly(tree.b.c) and not OmegaConf.is_readonly(tree.b)


@dataclass
class Inner:
    size: int = "${draw_int:}"  # type: ignore[assignment]
    also: Union[int, str] = "${draw:}"


@dataclass
class Typed:
    seed: int = "${draw_int:}"  # type: ignore[assignment]
    name: str = "run-${draw:}"
    wrong: int = "${draw_text:}"  # type: ignore[assignment]
    inner: Inner = field(default_factory=Inner)
    any: Any = "${inner}"
    many: list[int] = field(default_factory=lambda: ["${draw_int:}", "${seed}"])  # type: ignore[list-item]


def test_structured_configs_keep_their_types():
    numbers = itertools.count(1)
    register_resolver("draw_int", lambda: str(next(numbers)))  # converted, as when it is asked in the app
    register_resolver("draw_text", lambda: f"no number {next(numbers)}")
    first, second = ranks(Typed)
    assert written(second, "wrong") == "${draw_text:}"
    for made in (first, second):
        with pytest.raises(Exception, match="could not be converted to Integer"):
            made.wrong
        made.wrong = 0
    assert read(first) == read(second) == read(second)
    assert isinstance(second.seed, int) and second.many[1] == second.seed and second.any.size == second.inner.size
    with pytest.raises(Exception, match="could not be converted"):
        second.seed = "x"


def test_a_rank_with_something_else_written_there_keeps_it():
    first, second = OmegaConf.create({"a": "${count:}", "b": "${count:}"}), OmegaConf.create({"a": 5, "c": 1})
    put_drawn(second, find_drawn(first))
    assert second == {"a": 5, "c": 1}


def test_resolvers_are_as_before_afterwards(monkeypatch):
    monkeypatch.setenv("RANK", "2")
    ranks({"a": "${oc.env:RANK}", "b": "${count:}"})
    assert OmegaConf.create({"a": "${oc.env:RANK}"}).a == "2"
    first = OmegaConf.create({"b": "${count:}"})
    assert first.b != first.b


def test_calls_in_a_text_inner_ones_first():
    text = "a${f:x,'q-${u:{p:1}}'}${b}\\${g:}${h.i:}"
    assert [(text[start:end], name) for start, end, name in resolver_calls(text)] == [
        ("${u:{p:1}}", "u"),
        ("${f:x,'q-${u:{p:1}}'}", "f"),
        ("${h.i:}", "h.i"),
    ]
    assert resolver_calls("${f:") == []
