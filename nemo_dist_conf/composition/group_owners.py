"""Whose a config group is: an app that has its own meaning for a name keeps it, one that only adds options does not.

Read in every Hydra app of the environment, so it must cost next to nothing: names of files, and what root configs say
in their first columns.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import sys
from pathlib import Path
from typing import Any, Collection, Iterable, Mapping, NamedTuple

from hydra.core.config_search_path import ConfigSearchPath
from omegaconf import DictConfig

from nemo_dist_conf.composition.hydra_inside import node_at

__all__ = ["Claim", "Places", "claim_of_app", "places_of"]

#: A file of this name in the folder of a group: these are all its options, ours are not wanted beside them.
_OWN_GROUP = "OWN_GROUP"
#: A primary config is a page or two; larger files of YAML are data.
_MOST_BYTES = 2**18

#: ``strategy: word``, where a value of several keys, one from elsewhere and none are not meant.
_PLAIN_KEY = re.compile(r"^(\w+):[ \t]+(?![\s#{|>&]|\${)", re.MULTILINE)
#: ``- override /strategy: ddp``, and a defaults list in one line.
_LISTED = re.compile(r"^\s*-\s*(?:(?:override|optional)\s+)?/?(\w+)", re.MULTILINE)
_LISTED_INLINE = re.compile(r"^defaults:\s*(\[.*)", re.MULTILINE)


class Claim(NamedTuple):
    """What of a group is the app's. whole: all of it; options: those of ours that it extends under their own names."""

    whole: bool
    options: frozenset[str] = frozenset()


class Places(NamedTuple):
    """Folders that Hydra looks in, and what their root configs say.

    plain_keys: names that one of them has with a plain value. listed: names that their defaults lists begin with.
    """

    folders: tuple[Path, ...]
    plain_keys: frozenset[str]
    listed: frozenset[str]


def claim_of_app(
    group: str,
    options: Collection[str],
    namespace: str,
    stored: Mapping[str, Any],
    places: Places,
    foreign: Collection[str],
    is_optional: bool = False,
) -> Claim:
    """The app's claim: the group is its own where it has an option of the same name, a root config or a plain key.

    An option of the same name that takes in ours from the namespace (``/nemo_dist/strategy@_here_: ddp``) is a preset.
    stored: root configs of other providers in the ConfigStore, by name. foreign: options that they store in the group.
    is_optional: our base config does without the group, so a plain key is the app's beside it as well.
    """
    if group in stored or not set(foreign).isdisjoint(options):
        return Claim(True)
    extended = set()
    for folder in places.folders:
        inside = _names(folder / group)
        if _OWN_GROUP in inside or (folder / f"{group}.yaml").is_file():
            return Claim(True)
        same = {name for name in options if f"{name}.yaml" in inside}
        if any(f"/{namespace}/{group}" not in _text(folder / group / f"{name}.yaml") for name in same):
            return Claim(True)
        extended |= same
    taking = {group} if is_optional else {group, "nemo_dist_conf"}
    return Claim(_is_plain_key(group, stored, places, taking), frozenset(extended))


def _is_plain_key(group: str, stored: Mapping[str, Any], places: Places, taking: Collection[str]) -> bool:
    """Whether a root config has ``strategy: word`` for itself, so that ``strategy=`` has to set that key.

    Where the group exists, Hydra takes ``strategy=other`` for a choice from it, and refuses it. taking: names in a
    defaults list by which an app takes the group from us.
    """
    if not places.listed.isdisjoint(taking):
        return False  # the app's defaults lists say what they take from us
    return group in places.plain_keys or any(_has_plain_value(entry, group) for entry in stored.values())


def _has_plain_value(entry: Any, key: str) -> bool:
    node: Any = getattr(entry, "node", None)
    child = node_at(node, key) if isinstance(node, DictConfig) and key in node else None
    return child is not None and not hasattr(child, "keys")


def places_of(search_path: ConfigSearchPath, ours: str) -> Places:
    """The folders of a search path, those of the provider ``ours`` left out.

    What is added to the search path later is read where it is written: ``--config-dir`` and ``hydra.searchpath`` on the
    command line, and ``hydra.searchpath`` in a root config.
    """
    others = ("hydra", "schema", ours)
    paths = [element.path or "" for element in search_path.get_path() if element.provider not in others]
    words = sys.argv[1:]
    for index, word in enumerate(words):
        key, _, value = word.partition("=")
        if key in ("--config-dir", "-cd"):
            paths.append(value or next(iter(words[index + 1 :]), ""))
        elif key.lstrip("+") == "hydra.searchpath":
            paths += _items(value)
    folders = [folder for path in paths for folder in _folders(path)]
    written = [file for folder in folders for file in _root_configs(folder)]
    folders += [folder for file in written for path in file.searchpath for folder in _folders(path)]
    plain_keys = frozenset().union(*(file.plain_keys for file in written))
    return Places(tuple(folders), plain_keys, frozenset().union(*(file.listed for file in written)))


def _folders(path: str) -> Iterable[Path]:
    if path.startswith("pkg://"):
        return _package_folders(path.removeprefix("pkg://"))
    path = path.removeprefix("file://")
    return [] if "://" in path or not path else [Path(path)]


def _package_folders(package: str) -> Iterable[Path]:
    try:
        spec = importlib.util.find_spec(package.replace("/", "."))
    except (ImportError, ValueError):
        return []
    return [Path(location) for location in (spec.submodule_search_locations or ())] if spec is not None else []


def _names(folder: Path) -> frozenset[str]:
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()


class _Written(NamedTuple):
    plain_keys: frozenset[str]
    listed: frozenset[str]
    searchpath: tuple[str, ...]


def _root_configs(folder: Path) -> list[_Written]:
    try:
        with os.scandir(folder) as entries:
            files = [(entry.path, entry.stat()) for entry in entries if entry.name.endswith(".yaml")]
    except OSError:
        return []
    return [_written(path, found.st_mtime_ns) for path, found in sorted(files) if found.st_size <= _MOST_BYTES]


@functools.lru_cache(maxsize=256)
def _written(path: str, changed: int) -> _Written:
    """changed: when, so that a file that was written again is read again."""
    text = _text(Path(path))
    inline = (word for line in _LISTED_INLINE.findall(text) for word in re.findall(r"\w+", line))
    listed = {*_LISTED.findall(text), *inline}
    searchpath = tuple(_searchpath(text)) if "searchpath" in text else ()
    return _Written(frozenset(_PLAIN_KEY.findall(text)), frozenset(listed), searchpath)


def _text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _searchpath(text: str) -> list[str]:
    """What stands below ``hydra: searchpath:``, in one line or in one for each."""
    lines = iter(text.splitlines())
    for line in lines:
        key, colon, rest = line.strip().partition(":")
        if key not in ("searchpath", "hydra.searchpath") or not colon:
            continue
        if rest.partition("#")[0].strip():
            return _items(rest)
        found = []
        for item in map(str.strip, lines):
            if item and not item.startswith(("-", "#")):
                break
            found += _items(item.removeprefix("-"))
        return found
    return []


def _items(text: str) -> list[str]:
    return [word.strip(" '\"") for word in text.partition("#")[0].strip("[] '\"").split(",") if word.strip(" '\"")]
