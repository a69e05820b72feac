"""Every node of the recipe given as something else, or taken away: refused with what to type, never a traceback."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, open_dict
from omegaconf.errors import OmegaConfBaseException

from nemo_dist_conf.composition.sections import SECTIONS
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.plan import job_of
from nemo_dist_conf.recipe.checks import check_recipe
from nemo_dist_conf.recipe.group_words import refuse_words
from nemo_dist_conf.recipe.yaml_folder import config_folder
from tests.typed_answers import Line, typed

GROUPS = ("strategy", *SECTIONS, "model", "data", "optimizer")
NODES = (*GROUPS, "activation_checkpointing", "seed", "device", "train", "checkpoint")
#: Of wrong kinds. What ``+`` puts in the place of a node that was taken away ends with a brace.
VALUES = ("null", "a_word", "[1,2]", "[]", "3", "true", "''", "{foo: 1}", "{_target_: 3}")
#: Of them, what Hydra looks for among a group's options.
OPTIONS = ("a_word", "[]", "''")
INSIDE: tuple[str, ...] = (
    "model.config",
    "model.name_or_path",
    "model.config.model_type",
    "model.config.hidden_size",
    "optimizer.name",
)
INSIDE += ("optimizer.lr", "data.path", "data.seq_len", "train.steps", "train.global_batch_size", "checkpoint.resume")
INSIDE += ("train.micro_batch_size", "train.dtype", "checkpoint.every", "checkpoint.async", "parallelism.tp_size")

#: What is right as it is: defaults, null where it is a choice, paths that are looked for when they are read.
RIGHT = {
    *("~parallelism", "~pipeline", "~moe", "~activation_checkpointing"),
    *("activation_checkpointing=true", "seed=3", "train.steps=3", "train.global_batch_size=3", "optimizer.lr=3"),
    *("data.path=null", "data.path=a_word", "data.path=''", "data.seq_len=3"),
    *("model.name_or_path=null", "model.name_or_path=a_word", "model.name_or_path=''"),
    *("model.config.model_type=a_word", "model.config.hidden_size=null"),
    *("~model.config.hidden_size", "train.micro_batch_size=null", "train.micro_batch_size=1", "checkpoint.every=3"),
    *("checkpoint.every=null", "checkpoint.resume=null", "~checkpoint.resume"),
}


@functools.cache
def _composed() -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_folder()), version_base="1.3"):
        return compose("train", return_hydra_config=True)


def _checked(words: list[str], check: Any = check_recipe) -> Exception | None:
    """What a command line of these words ends in; None where it would start. A group's options are Hydra's to find."""
    try:
        refuse_words(words)
        config = copy.deepcopy(_composed())
        parsed = OverridesParser.create().parse_overrides(words)
        choices = [one for one in parsed if one.key_or_group in GROUPS and not (one.is_add() or one.is_delete())]
        values = [one for one in parsed if one not in choices or isinstance(one.value(), dict)]
        ConfigLoaderImpl._apply_overrides_to_config(values, config)
        with open_dict(config):
            config.hydra.overrides.task = words
        check(config, 1)
    except (ConfigError, HydraException, OmegaConfBaseException) as error:
        if isinstance(error, OmegaConfBaseException) and "Could not" not in str(error):
            raise
        return error
    return None


@functools.cache
def _again(words: tuple[str, ...]) -> Exception | None:
    return _checked(list(words))


def _command_lines() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for node in (*NODES, *INSIDE):
        ours = [value for value in VALUES if node not in GROUPS or value not in OPTIONS]
        ours = [value for value in ours if node in NODES or value not in ("[]", "{_target_: 3}")]
        if node in SECTIONS and node in NODES:
            ours.remove("{_target_: 3}")  # a bookkeeping key of the typed sections, which they do not read
        found += [(f"~{node}",), *((f"{node}={value}",) for value in ours)]
        if "." not in node and node != "strategy":
            found += [(f"~{node}", f"+{node}={value}") for value in ours if value not in ("null", "true")]
    return found


@pytest.mark.parametrize("node", [*NODES, *INSIDE])
def test_a_wrong_node_is_refused_and_what_is_offered_passes(node: str) -> None:
    """By the recipe or, where a group has no such option or key, by Hydra in its own words."""
    lines = [words for words in _command_lines() if words[0].lstrip("~").partition("=")[0] == node]
    assert len(lines) >= 7
    for words in lines:
        error = _checked(list(words))
        if len(words) == 1 and words[0] in RIGHT:
            assert error is None, (words, error)
        elif isinstance(error, ConfigError):
            line = Line(1, words)
            again: Exception | None = error
            for _ in range(3):
                if isinstance(again, ConfigError) and line.ranks == 1:
                    line = next(filter(None, (typed(line, problem) for problem in again.problems)))
                    again = _again(line.words)
            assert again is None or line.ranks > 1, (words, error.problems, line, again)
        elif error is None:
            assert len(words) > 1 and words[1].lstrip("+") in RIGHT, words


@pytest.mark.parametrize("node", ["model", "model.config", "model.name_or_path", "model.config.model_type", "train"])
def test_a_plan_refuses_the_same(node: str) -> None:
    def planned(config: DictConfig, world_size: int) -> None:
        job_of(config, world_size, "cpu")

    for value in ("~", *(value for value in VALUES if node != "model" or value not in OPTIONS)):
        words = [f"~{node}"] if value == "~" else [f"{node}={value}"]
        assert isinstance(_checked(words, planned), Exception) or words[0] in RIGHT, words


def test_what_hydra_answers_with_a_traceback_is_told_before() -> None:
    for word in ("model=null", "data=3", "optimizer=[1,2]", "pipeline=true", "~strategy", "moe=1.5", "hardware=null"):
        with pytest.raises(ConfigError) as refused:
            refuse_words(["train.steps=2", word])
        assert refused.value.asked == word
        group = word.lstrip("~").partition("=")[0]
        assert refused.value.type.startswith(f"{group}=")
        refuse_words([refused.value.type])
    refuse_words(["model=a,b", "optimizer={lr: 1}", "--help", "model=[]", "data=nope", "strategy=ddp", "x=1", "~moe"])
