"""Whose a config group is: an app that has its own meaning for a name keeps it, one that only adds options does not."""

from __future__ import annotations

import functools
import importlib.util
import re
import sys
from pathlib import Path
from typing import Any, Collection, Iterable, Mapping, NamedTuple

from hydra.core.config_search_path import ConfigSearchPath

__all__ = ["Claim", "OWN_GROUP", "claim_of_app", "folders_of"]

#: A file of this name in the folder of a group: these are all its options, ours are not wanted beside them.
OWN_GROUP = "OWN_GROUP"
#: A primary config is a page or two; larger files of YAML are data.
_MOST_BYTES = 2**18


class Claim(NamedTuple):
    """What of a group is the app's. whole: all of it; options: those of ours that it extends under their own names."""

    whole: bool
    options: frozenset[str] = frozenset()


def claim_of_app(
    group: str,
    options: Collection[str],
    namespace: str,
    stored: Mapping[str, Any],
    folders: Collection[Path],
    foreign: Collection[str],
) -> Claim:
    """The app's claim: the group is its own where it has an option of the same name, a root config or a plain key.

    An option of the same name that takes in ours from the namespace (``/nemo_dist/strategy@_here_: ddp``) is a preset.
    stored: root configs of other providers in the ConfigStore, by name. foreign: options that they store in the group.
    folders: where Hydra looks for files (``folders_of``).
    """
    if group in stored or not set(foreign).isdisjoint(options):
        return Claim(True)
    extended = set()
    for folder in folders:
        if (folder / f"{group}.yaml").is_file() or (folder / group / OWN_GROUP).is_file():
            return Claim(True)
        for name in options:
            text = _text_of(folder / group / f"{name}.yaml")
            if text is not None and f"/{namespace}/{group}" not in text:
                return Claim(True)
            extended |= {name} if text is not None else set()
    return Claim(_is_plain_key(group, stored, folders), frozenset(extended))


def _is_plain_key(group: str, stored: Mapping[str, Any], folders: Collection[Path]) -> bool:
    """Whether a root config has ``strategy: word`` for itself, so that ``strategy=`` has to set that key.

    Where the group exists, Hydra takes ``strategy=other`` for a choice from it, and refuses it.
    """
    texts = [text for folder in folders for text in _root_texts(folder)]
    listed = rf"^\s*-\s*((override|optional)\s+)?/?({group}|nemo_dist_conf)\b|^defaults:.*\b({group}|nemo_dist_conf)\b"
    if any(re.search(listed, text, re.MULTILINE) for text in texts):
        return False  # its defaults lists name what they take from us
    if any(re.search(rf"^{group}:[ \t]+(?![\s#{{|>&]|\${{)", text, re.MULTILINE) for text in texts):
        return True
    return any(_has_plain_value(entry, group) for entry in stored.values())


def _has_plain_value(entry: Any, key: str) -> bool:
    node: Any = getattr(entry, "node", None)
    child = node._get_node(key) if hasattr(node, "_get_node") and key in node else None
    return child is not None and not hasattr(child, "keys")


def folders_of(search_path: ConfigSearchPath, ours: str) -> list[Path]:
    """Folders that Hydra will look in, those of the provider ``ours`` left out.

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
            paths += _listed(value)
    found = [folder for path in paths for folder in _folders(path)]
    texts = [text for folder in found for text in _root_texts(folder)]
    added = [path for text in texts if "searchpath" in text for path in _searchpath(text)]
    return found + [folder for path in added for folder in _folders(path)]


def _searchpath(text: str) -> list[str]:
    """What stands below ``hydra: searchpath:``, in one line or in one for each."""
    lines = iter(text.splitlines())
    for line in lines:
        key, colon, rest = line.strip().partition(":")
        if key not in ("searchpath", "hydra.searchpath") or not colon:
            continue
        if rest.partition("#")[0].strip():
            return _listed(rest)
        found = []
        for item in map(str.strip, lines):
            if item and not item.startswith(("-", "#")):
                break
            found += _listed(item.removeprefix("-"))
        return found
    return []


def _listed(text: str) -> list[str]:
    return [word.strip(" '\"") for word in text.partition("#")[0].strip("[] '\"").split(",") if word.strip(" '\"")]


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


def _root_texts(folder: Path) -> Iterable[str]:
    try:
        files = sorted(folder.glob("*.yaml"))
    except OSError:
        return []
    return [text for text in map(_text_of, files) if text is not None]


def _text_of(file: Path) -> str | None:
    """What stands in a file; nothing in one that is no page or two; None where there is none."""
    try:
        found = file.stat()
    except OSError:
        return None
    return _text(file, found.st_mtime_ns) if found.st_size <= _MOST_BYTES else ""


@functools.lru_cache(maxsize=256)
def _text(file: Path, changed: int) -> str:
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
