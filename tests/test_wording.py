"""A word that is offered means its value when it is typed in a shell, an unknown name is told with the one that was
meant, and a path means the folder in which it was typed, also in a job that runs in another one.
"""

import enum
import json
import math
import random
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import QuotedString
from omegaconf import OmegaConf

from nemo_dist_conf.families.config_facts import facts_from_folder
from nemo_dist_conf.names import DType
from nemo_dist_conf.topology.schedule_file import read_schedule
from nemo_dist_conf.wording import Spelling, assigned, typed, typed_path, unknown_name


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A job with hydra.job.chdir=true; the folder in which its command was typed."""
    folder = tmp_path / "job"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", OmegaConf.create({"hydra": {"runtime": {"cwd": str(tmp_path)}}}))
    return tmp_path


def test_a_path_of_a_job(job, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert typed_path("a/b") == job / "a" / "b"
    assert typed_path("/a/b") == Path("/a/b") and typed_path("~/a") == Path("/home/me/a")


def test_a_path_outside_a_hydra_app(tmp_path, monkeypatch):
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    monkeypatch.chdir(tmp_path)
    assert typed_path("a") == tmp_path / "a"


def test_files_that_a_config_names_are_found_from_a_job(job):
    (job / "model").mkdir()
    (job / "model" / "config.json").write_text(json.dumps({"num_hidden_layers": 3}))
    facts = facts_from_folder("model")
    assert facts is not None and facts.num_layers == 3
    (job / "schedule.csv").write_text("0F0,0B0\n")
    assert read_schedule("schedule.csv").ranks == (0,)


# A value as it is typed.

PARSER = OverridesParser.create()


def meant(word):
    """The value of an override that was typed in a shell, as Hydra reads it."""
    [typed_word] = shlex.split(word)
    override = PARSER.parse_override(typed_word)
    assert not override.is_sweep_override(), word
    return plain(override.value())


def plain(value):
    if isinstance(value, dict):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return list(map(plain, value))
    return value.text if isinstance(value, QuotedString) else value


TEXTS = (
    *(
        "",
        " ",
        "a",
        "1f1b",
        "localhost:29400",
        "two words",
        " a ",
        "a,b",
        "a=b",
        "a: b",
        "[a]",
        "{a:b}",
        "f(x)",
        "#",
        "~/x",
    ),
    *(
        "it's",
        'say "no"',
        'it\'s "x"',
        "back\\slash",
        "end\\",
        "q\\'u",
        "tab\tline\n",
        "naïve",
        "$HOME",
        "`ls`",
        "a!b",
        "*.txt",
        "?",
    ),
    *(
        "1",
        "-1",
        "+1",
        "1_000",
        "1e-5",
        ".5",
        "5.",
        "nan",
        "-inf",
        "true",
        "False",
        "null",
        "NULL",
        "None",
        "0x10",
        "1.2.3",
    ),
    *(
        "${a.b}",
        "${oc.env:HOME}",
        "${oc.env:HOME,1}",
        "${a:${b.c}}",
        "${a:'b'}",
        "\\${a}",
        "/data/my texts/a.txt",
        "C:\\x",
    ),
)
VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        -3,
        1e-5,
        1e-08,
        1.0,
        3e20,
        math.inf,
        [],
        {},
        [1, "1", None, 1.5],
        ["a,b", "c d", "it's"],
        [["a"], ["b", ""]],
    ),
    *({"layers.*.q_proj": "colwise", "lm head": "a b"}, {"a": {"b": [1, {"c": "1"}]}}, {"a,b=c:{d}": True}),
)


@pytest.mark.parametrize("value", [*TEXTS, *VALUES], ids=repr)
def test_a_word_means_its_value_when_it_is_typed(value):
    found = meant(assigned("group.key", value))
    assert found == value and type(found) is type(value)
    assert meant(f"+{assigned('key', [value])}") == [value]


def test_any_text_can_be_typed():
    chance = random.Random(0)
    signs = "ab1.e-_ ,=:{}[]()'\"\\$~#!?*/+%@|&;<>`^é\n\t0Truenulfa"
    for text in ("".join(chance.choices(signs, k=chance.randrange(8))) for _ in range(2000)):
        assert meant(assigned("key", text)) == text


def test_a_shell_hands_a_word_on_as_it_was_meant():
    texts = [text for text in TEXTS if text]
    words = " ".join(assigned("key", text) for text in texts)
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, text=True, check=True)
    found = [plain(PARSER.parse_override(word).value()) for word in done.stdout.split("\0")[:-1]]
    assert found == texts


class _Kind(enum.Enum):
    up = 1


def test_what_needs_no_quotes_has_none():
    plain_ones = {None: "null", True: "true", 1e-5: "1e-05", "a/b-c.txt": "a/b-c.txt", "node0:29400": "node0:29400"}
    for value, text in plain_ones.items():
        assert assigned("key", value) == f"key={text}"
    assert typed(DType.bfloat16) == "bfloat16" and typed(_Kind.up) == "up"
    assert typed(Path("/a b")) == "/a b" and typed(("a", 1)) == "[a,1]"
    spelling = Spelling("dist")
    assert spelling.set("moe.x", "1", "+") == "'+dist.moe.x=\"1\"'" and spelling.set("moe.x", 1) == "dist.moe.x=1"


# A name that is not known.


def unknown(name, **more):
    known = ("fsdp2", "megatron_fsdp", "ddp")
    return unknown_name(name, known, what=f"no {name}", asked=f"s={name}", offer="s={}".format, **more)


def test_an_unknown_name_lists_the_known_ones_nearest_first():
    problem = unknown("pdd")
    assert (problem.instead, problem.allowed) == ("s=ddp", "ddp, fsdp2, megatron_fsdp")
    assert (problem.what, problem.asked) == ("no pdd", "s=pdd")
    assert unknown("mega").instead == "s=megatron_fsdp"  # not much alike, but how it begins
    assert unknown("FSDP", hint=True).what == "no FSDP; did you mean fsdp2?"
    assert unknown("zzz", hint=True).what == "no zzz"
    assert (unknown("zzz").instead, unknown(7, otherwise="~s").instead) == ("s=fsdp2", "~s")
    assert unknown("x", allowed="any", meant=["ddp"]) == unknown_name(
        "x", ["ddp"], what="no x", asked="s=x", offer="s={}".format, allowed="any"
    )
