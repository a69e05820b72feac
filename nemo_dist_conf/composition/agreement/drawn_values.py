"""What is random or a time in a config is drawn once for all ranks; everything else stays as lazy as Hydra leaves it.

A resolver that the app registered is asked twice by one process. One that answers differently, or looks at the clock,
draws, and its answer takes the place of the interpolation in every rank; what refers to that place follows by itself.
What reads a rank's own variables is left to the rank.
"""

from __future__ import annotations

import copy
import os
import random
import re
import sys
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import PurePath
from typing import Any, Iterable, Iterator

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, flag_override
from omegaconf.errors import OmegaConfBaseException

from nemo_dist_conf.composition.agreement.value_sources import observed
from nemo_dist_conf.composition.hydra_inside import (
    has_values,
    is_missing,
    is_null,
    node_at,
    path_of,
    place_of,
    read_in_place,
    resolver_calls,
    resolvers_asked_through,
    written,
)
from nemo_dist_conf.topology.launched_ranks import is_rank_variable

__all__ = [
    "Drawn",
    "can_be_sent",
    "find_drawn",
    "folder_of_run",
    "put_constants",
    "put_drawn",
    "put_missing",
    "rank_variables_open",
]

_Path = tuple[Any, ...]

#: Resolvers of Hydra: they draw nothing but the time, which ``same_now`` gives to all ranks.
_OF_HYDRA = frozenset("now hydra python_version hydra_override_dirname hydra_deprecated_override_dirname".split())
#: Text that stays text beside an interpolation and inside the quotes of another one.
_PLAIN_TEXT = re.compile(r"[^\\'\"${}\n\r]*")
#: Parts of a text that no rank's number makes: a UUID, a long random number or hash, a date, a time of day.
_LOOKS_DRAWN = re.compile(
    r"[a-f\d]{8}(?:-[a-f\d]{4}){3}-[a-f\d]{12}"
    r"|20\d\d[-_./]?[01]\d[-_./]?[0-3]\d(?:[-_ T/]?[0-2]\d[-_:h]?[0-5]\d[-_:m]?[0-5]\d(?:[-_.,]?\d+)?)?"
    r"|[0-2]\d:[0-5]\d:[0-5]\d(?:[.,]\d+)?"
    r"|(?=[a-f]*\d)(?=\d*[a-f])[a-f\d]{8,}|[1-9]\d{8,}",
    re.IGNORECASE,
)
_CANNOT_SAY = (OmegaConfBaseException, LookupError, ValueError, TypeError, AttributeError)


@dataclass
class Drawn:
    """What ranks have to read alike.

    values: path -> (as it is written, what stands there in every rank). answers: (path, interpolation, value) of the
    app's other resolvers, as the process that looked reads them.
    """

    values: dict[_Path, tuple[str, Any]] = field(default_factory=dict)
    answers: list[tuple[_Path, str, Any]] = field(default_factory=list)


def find_drawn(config: DictConfig) -> Drawn:
    """What is drawn in ``config``, which is left as it is.

    With Hydra's node in it, everything is asked as it will be in the job: ``${hydra:...}`` and env_set hold. Before
    Hydra has set the output folder of a single run, ``hydra.run.dir`` says it.
    """
    root = copy.deepcopy(config)
    finder = _Finder(root)
    with warnings.catch_warnings(), _random_numbers_left(), _as_in_the_job(root):
        warnings.simplefilter("ignore")  # a resolver that warns does so when the app asks it
        with resolvers_asked_through(finder.ask):
            if _before_the_folder(root):
                finder.look_at(root.hydra.run, "dir")
                _set_folder(root)
            finder.walk(root)
    return finder.drawn


def folder_of_run(config: DictConfig) -> str | None:
    """The output folder that Hydra will make for this single run; None where it cannot be said."""
    root = copy.deepcopy(config)
    with warnings.catch_warnings(), _as_in_the_job(root):
        warnings.simplefilter("ignore")
        try:
            return os.path.abspath(str(OmegaConf.select(root, "hydra.run.dir")))
        except _CANNOT_SAY:
            return None


def put_drawn(config: DictConfig, drawn: Drawn) -> None:
    """Put what was drawn where ``config`` has the same written."""
    for path, (text, value) in drawn.values.items():
        found = _at(config, path)
        if found is not None and found[2] == text:
            _put(found[0], found[1], value)


def put_constants(config: DictConfig, drawn: Drawn) -> None:
    """Take over constants that were drawn when a module was imported: another text here, and one that looks drawn."""
    looks_drawn = [answer for answer in drawn.answers if isinstance(answer[2], str) and _LOOKS_DRAWN.search(answer[2])]
    if not looks_drawn:
        return
    root = copy.deepcopy(config)
    with warnings.catch_warnings(), _random_numbers_left(), _as_in_the_job(root):
        warnings.simplefilter("ignore")
        if _before_the_folder(root):
            _set_folder(root)
        for path, call, value in looks_drawn:
            found = _at(root, path)
            if found is None or call not in found[2]:
                continue
            try:
                mine, _ = read_in_place(call, found[0], found[1])
            except _CANNOT_SAY:
                continue
            if isinstance(mine, str) and mine != value and _LOOKS_DRAWN.sub("", mine) == _LOOKS_DRAWN.sub("", value):
                _replace_everywhere(config, path, call, value)
                _replace_everywhere(root, path, call, value)


def put_missing(config: DictConfig, drawn: Drawn) -> None:
    """Put the answers of resolvers that this process does not have: registered below ``if __name__ == "__main__":``."""
    longest_first = sorted(drawn.answers, key=lambda answer: -len(answer[1]))
    for asked in (slice(-1, None), slice(None)):  # by itself; around one whose answer cannot be written inside another
        for path, call, value in longest_first:
            if not all(OmegaConf.has_resolver(name) for _, _, name in resolver_calls(call)[asked]):
                _replace_everywhere(config, path, call, value)


class _Finder:
    """Walks a copy of a tree; ``ask`` stands before every resolver meanwhile."""

    def __init__(self, root: DictConfig) -> None:
        self.root = root
        self.drawn = Drawn()
        self._done: set[_Path] = set()
        self._drawing: list[Any] = []

    def walk(self, container: Any) -> None:
        for key in _keys(container):
            child = node_at(container, key)
            if isinstance(_text_of(child), str):
                self.look_at(container, key)
            elif OmegaConf.is_config(child) and not (is_null(child) or is_missing(child)):
                self.walk(child)

    def look_at(self, container: Any, key: Any) -> None:
        """Draw what this node draws: each resolver in its text, inner ones first."""
        path = path_of(container, key)
        before = text = _text_of(node_at(container, key))
        if path in self._done or not isinstance(before, str):
            return
        self._done.add(path)
        index, answers = 0, []
        while index < len(calls := resolver_calls(text)):
            start, end, name = calls[index]
            call = text[start:end]
            index += 1
            if name in _OF_HYDRA or name.startswith(("oc.", "nemo_dist.")):
                continue
            found = self._read(container, key, call)
            if found is None:
                continue
            value, is_drawn = found
            if not is_drawn:
                answers.append((path, call, value))
            elif call == text:
                text = _whole(value)
                break
            elif (literal := _literal(text, start, end, value)) is not None:
                text = text[:start] + literal + text[end:]
                index -= literal[:2] != "${"  # one call less
        if text != before or not isinstance(text, str):
            try:
                _put(container, key, text)
            except _CANNOT_SAY:
                return  # of another type than this node: Hydra's own error, when the app asks
            self.drawn.values[path] = (before, text)
        if isinstance(text, str):
            self.drawn.answers += [answer for answer in answers if answer[1] in text]

    def _read(self, container: Any, key: Any, call: str) -> tuple[Any, bool] | None:
        """(what the call answers, whether it draws); None where it cannot be said here, or is the rank's to say."""
        while True:
            self._drawing.clear()
            try:
                value, place = read_in_place(call, container, key)
            except _CANNOT_SAY:
                return None
            others = [node for node in self._drawing if node is not place]
            first = [place for place in map(place_of, others) if path_of(*place) not in self._done]
            if not first:
                break
            for holder, name in first:
                self.look_at(holder, name)
        if not can_be_sent(value):
            return None
        return value, any(node is place for node in self._drawing)

    def ask(self, name: str, resolver: Any, root: Any, parent: Any, node: Any, args: Any, args_str: Any) -> Any:
        if name == "oc.env" and is_rank_variable(str(args[0])):
            raise _OnlyInARank(args[0])
        if name in _OF_HYDRA or name.startswith(("oc.", "nemo_dist.")):
            return resolver(root, parent, node, args, args_str)
        answer, sources = observed(resolver, root, parent, node, args, args_str)
        if sources.rank:
            raise _OnlyInARank(name)
        if sources.clock or self._answers_otherwise(answer, name, resolver, root, parent, node, args, args_str):
            self._drawing.append(node)
        return answer

    def _answers_otherwise(self, answer: Any, name: str, resolver: Any, root: Any, *call: Any) -> bool:
        """Whether the resolver gives another answer when it is asked again, past its cache."""
        cache = OmegaConf.get_cache(root)[name]
        kept = dict(cache)
        cache.clear()
        try:
            return _plain(resolver(root, *call)) != _plain(answer)
        except Exception:  # whatever the app's resolver raises
            return False
        finally:
            cache.clear()
            cache.update(kept)


class _OnlyInARank(ValueError):
    """A variable was asked for that differs by rank."""


@contextmanager
def rank_variables_open() -> Iterator[None]:
    """Inside, ``${oc.env:...}`` of a variable that differs by rank cannot be resolved."""

    def ask(name: str, resolver: Any, root: Any, parent: Any, node: Any, args: Any, args_str: Any) -> Any:
        if name == "oc.env" and is_rank_variable(str(args[0])):
            raise _OnlyInARank(args[0])
        return resolver(root, parent, node, args, args_str)

    with resolvers_asked_through(ask):
        yield


def _keys(container: Any) -> Iterable[Any]:
    return list(container) if isinstance(container, DictConfig) else range(len(container))


def _text_of(node: Any) -> Any:
    """The text of an interpolation; None for anything else."""
    return written(node) if node is not None and OmegaConf.is_interpolation(node) else None


def _at(config: DictConfig, path: _Path) -> tuple[Any, Any, str] | None:
    """(container, key, text) of an interpolation; None where there is none."""
    container: Any = config
    for key in path[:-1]:
        if not OmegaConf.is_config(container) or not has_values(container) or not _has(container, key):
            return None
        container = node_at(container, key)
    if not OmegaConf.is_config(container) or not has_values(container):
        return None
    text = _text_of(node_at(container, path[-1])) if _has(container, path[-1]) else None
    return None if text is None else (container, path[-1], text)


def _has(container: Any, key: Any) -> bool:
    if isinstance(container, DictConfig):
        return key in container.keys()
    return isinstance(key, int) and key < len(container)


def _put(container: Any, key: Any, value: Any) -> None:
    """Set a key whatever flags stand there or above; a typed node converts, as it does what its resolver answers."""
    node = node_at(container, key)
    with warnings.catch_warnings(), flag_override(container, ["readonly", "struct"], False):
        warnings.simplefilter("ignore", FutureWarning)  # OmegaConf 2.4, of conversions when a value is set
        with flag_override(node, "readonly", False):
            container[key] = copy.deepcopy(value)


def _replace_everywhere(config: DictConfig, path: _Path, call: str, value: Any) -> None:
    found = _at(config, path)
    if found is None or call not in found[2]:
        return
    container, key, text = found
    if text == call:
        _put(container, key, _whole(value))
    elif (literal := _quoted(value)) is not None:
        _put(container, key, text.replace(call, literal))


def _whole(value: Any) -> Any:
    """A value as it is set: text that would be read as an interpolation is escaped."""
    if isinstance(value, str) and "${" in value:
        return re.sub(r"(\\*)\$\{", lambda found: f"{2 * found[1]}\\${{", value)
    return value


def _literal(text: str, start: int, end: int, value: Any) -> str | None:
    """What takes the place of text[start:end]; None where nothing written reads as this value."""
    inside = any(opened < start and end < closed for opened, closed, _ in resolver_calls(text))
    escaped = text[:start].endswith("\\")  # what the backslashes mean depends on the interpolation after them
    plain = value is None or isinstance(value, (bool, int, float, str))
    if plain and not inside and not escaped and _PLAIN_TEXT.fullmatch(str(value)):
        return str(value)
    return _quoted(value)


def _quoted(value: Any) -> str | None:
    """An interpolation that reads as this value wherever it stands."""
    if isinstance(value, bool) or value is None:
        return f"${{oc.decode:'{ {True: 'true', False: 'false', None: 'null'}[value] }'}}"
    if isinstance(value, (int, float)):
        return f"${{oc.decode:'{value!r}'}}"
    if isinstance(value, str) and _PLAIN_TEXT.fullmatch(value):
        return f"""${{oc.decode:"'{value}'"}}"""
    return None


def can_be_sent(value: Any) -> bool:
    """Whether it can stand in a config and go to another process."""
    if OmegaConf.is_config(value):
        return True
    if isinstance(value, (list, tuple, dict)):
        return all(can_be_sent(item) for item in (value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, (bool, int, float, str, bytes, PurePath, Enum))


def _plain(value: Any) -> str:
    """Two answers are the same if this is; nan is like itself, and an object that is made anew each time too."""
    if not can_be_sent(value):
        return ""
    return repr(OmegaConf.to_container(value, resolve=False) if OmegaConf.is_config(value) else value)


@contextmanager
def _random_numbers_left() -> Iterator[None]:
    """The app draws what it would have drawn, also where a resolver draws from the same generators."""
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    states = [(random.setstate, random.getstate())]
    if hasattr(numpy, "random"):
        states.append((numpy.random.set_state, numpy.random.get_state()))  # type: ignore[union-attr]
    if hasattr(torch, "get_rng_state"):
        states.append((torch.set_rng_state, torch.get_rng_state()))  # type: ignore[union-attr]
    try:
        yield
    finally:
        for restore, state in states:
            restore(state)


def _before_the_folder(root: DictConfig) -> bool:
    """Whether Hydra has still to set the output folder of a single run."""
    return "hydra" in root and OmegaConf.select(root, "hydra.runtime.output_dir", throw_on_missing=False) is None


def _set_folder(root: DictConfig) -> None:
    try:
        folder = os.path.abspath(str(OmegaConf.select(root, "hydra.run.dir")))
    except _CANNOT_SAY:
        return
    with flag_override(root.hydra.runtime, ["readonly", "struct"], False):
        root.hydra.runtime.output_dir = folder


@contextmanager
def _as_in_the_job(root: DictConfig) -> Iterator[None]:
    """Inside, a tree with Hydra's node answers ``${hydra:...}``, and its ``hydra.job.env_set`` is set."""
    if "hydra" not in root:
        yield
        return
    hydra = HydraConfig.instance()
    before, variables = hydra.cfg, dict[str, "str | None"]()
    hydra.set_config(root)
    try:
        for name, value in _env_set(root).items():
            variables[name] = os.environ.get(name)
            os.environ[name] = value
        yield
    finally:
        hydra.cfg = before
        for name, value_before in variables.items():
            if value_before is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value_before


def _env_set(root: DictConfig) -> dict[str, str]:
    """Variables of ``hydra.job.env_set`` that can be said here."""
    found: dict[str, str] = {}
    node = OmegaConf.select(root, "hydra.job.env_set", throw_on_missing=False)
    for name in node or ():
        try:
            found[str(name)] = str(node[name])
        except _CANNOT_SAY:
            continue
    return found
