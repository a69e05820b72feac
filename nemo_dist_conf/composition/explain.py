"""Help texts of every option: ``python -m nemo_dist_conf.explain strategy=ddp parallelism hydra/launcher=torchrun``."""

from __future__ import annotations

import sys
import textwrap
from typing import Any, Mapping, Sequence

from nemo_dist_conf.composition.printed import show
from nemo_dist_conf.composition.sections import SECTIONS, section_of
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.schema import SwitchesConf, documented
from nemo_dist_conf.schema.launcher import TorchrunConf
from nemo_dist_conf.schema.sweeper import LayoutsConf
from nemo_dist_conf.strategies import STRATEGIES, default_strategy, find_strategy, strategy_names
from nemo_dist_conf.wording import typed, unknown_name

__all__ = ["explain", "main"]

_LAUNCHER, _SWEEPER = "hydra/launcher=torchrun", "hydra/sweeper=layouts"
_SWITCHES = tuple(row.name for row in documented(SwitchesConf))


def explain(*words: str, values: Mapping[str, Any] | None = None) -> str:
    """The options of what is named (``strategy=ddp``, ``moe``, ``batch_statistics``), of all without a name.

    values: what a composed tree has by dotted key, which is shown in place of the defaults.
    Raises ConfigError for an unknown name.
    """
    chosen = words or (*(f"strategy={each.name}" for each in STRATEGIES), *SECTIONS, _SWITCHES[0], _LAUNCHER, _SWEEPER)
    return "\n\n".join(_section(word, values or {}) for word in chosen)


def _section(word: str, values: Mapping[str, Any]) -> str:
    section, _, option = word.partition("=")
    if section == "strategy":
        strategy = find_strategy(option or default_strategy())
        schema, title = strategy.schema, f"strategy={' | '.join(strategy.names)}"
    elif section in SECTIONS:
        schema, title = SECTIONS[section], section
    elif section in _SWITCHES:
        schema, title, section = SwitchesConf, ", ".join(_SWITCHES), ""
    elif section == "hydra/launcher" and option in ("", "torchrun"):
        schema, title, section = TorchrunConf, _LAUNCHER, "hydra.launcher"
    elif section == "hydra/sweeper" and option in ("", "layouts"):
        schema, title, section = LayoutsConf, _SWEEPER, "hydra.sweeper"
    else:
        known = ["strategy", *SECTIONS, *_SWITCHES, _LAUNCHER, _SWEEPER]
        owner = _owner(section, known)
        raise ConfigError(
            unknown_name(
                section,
                known,
                what=f"there is no section {section!r}",
                asked=word,
                allowed=", ".join(known),
                offer=lambda meant: owner or meant,
                otherwise=owner,
            )
        )
    rows = [
        row._replace(default=typed(values[row.name])) if row.name in values else row
        for row in documented(schema, f"{section}." if section else "")
    ]
    width = max(len(row.name) + len(row.default) + 1 for row in rows)
    lines = [f"== {title} ==", *_wrap(next(iter((schema.__doc__ or "").splitlines()), ""), "")]
    for row in rows:
        shown = f"{row.name}={row.default}" if row.default else row.name
        lines += _wrap(row.help, f"  {shown:<{min(width, 58)}}  ")
    return "\n".join(lines)


def _owner(word: str, known: Sequence[str]) -> str | None:
    """The section that a word belongs to: a strategy's name, an option; None where it is neither."""
    if word in strategy_names():
        return f"strategy={word}"
    holder = word.partition(".")[0] if "." in word else section_of(word)
    return holder if holder in known else None


def _wrap(text: str, indent: str) -> list[str]:
    later = " " * min(len(indent), 62)
    return textwrap.wrap(text, width=132, initial_indent=indent, subsequent_indent=later) or [indent]


def main(words: Sequence[str] | None = None) -> int:
    """Print what the words on the command line name; 1 with the way out for an unknown one."""
    words = sys.argv[1:] if words is None else words
    if {"-h", "--help"} & set(words):
        show(__doc__ or "")
        return 0
    try:
        show(explain(*words))
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    return 0
