"""Words for the recipe's groups that Hydra answers with a traceback: told before it reads them. No torch."""

from __future__ import annotations

from typing import Any, Iterable

from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.names import OWN_GROUPS
from nemo_dist_conf.strategies import default_strategy

__all__ = ["refuse_words"]

#: Group -> the option that is offered.
_OFFERED = {
    "strategy": default_strategy(),
    "parallelism": "default",
    "pipeline": "1f1b",
    "moe": "default",
    **{group: next(iter(options)) for group, options in OWN_GROUPS.items()},
    "model": "llama_tiny",
    "data": "text",
    "optimizer": "adamw",
    "hardware": "h100",
}


def refuse_words(words: Iterable[str]) -> None:
    """Raise ConfigError for words that choose no option of a group: a number, null, nothing."""
    problems = []
    for word in words:
        group, _, written = word.partition("=")
        deletes = word == "~strategy" or word.startswith("~strategy=")
        if not deletes and (group not in _OFFERED or _is_choice(word)):
            continue
        group = group.removeprefix("~")
        what = f"{group} is chosen by the name of an option"
        if deletes or written in ("null", "None"):
            what = f"{group} cannot be left out"
        allowed = f"an option of the group {group}, such as {_OFFERED[group]}"
        problems.append(Problem(what=what, asked=word, allowed=allowed, instead=f"{group}={_OFFERED[group]}"))
    ConfigError.raise_if(problems)


def _is_choice(word: str) -> bool:
    """Whether a word is one that Hydra takes for a group, or tells what is wrong with in its own words."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import OverrideParseException

    try:
        override = OverridesParser.create().parse_override(word)
    except OverrideParseException:
        return True
    if override.is_sweep_override():
        return True
    value: Any = override.value()
    if isinstance(value, list):
        return all(_is_text(item) for item in value)
    return _is_text(value) or isinstance(value, dict)


def _is_text(value: Any) -> bool:
    from hydra.core.override_parser.types import QuotedString

    return isinstance(value, (str, QuotedString))
