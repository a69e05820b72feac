"""Rows that other installed packages add to a registry of ours, by an entry point. Standard library only."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Collection, Generic, Protocol, TypeVar

from nemo_dist_conf.errors import ConfigError, Problem

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["AddedRows"]

log = logging.getLogger(__name__)


class _Named(Protocol):
    @property
    def name(self) -> str: ...


_Row = TypeVar("_Row", bound=_Named)


class AddedRows(Generic[_Row]):
    """What packages add to one registry, by name. Nothing is read before the first question.

    Reading the metadata of all installed packages takes milliseconds to tenths of a second, so a registry asks only for
    a name that is not its own. It is read again only after sys.path has changed, and a package is imported when its row
    is asked for.
    """

    def __init__(self, group: str, kind: type[_Row], title: str, ours: Collection[str]) -> None:
        """group: of entry points, each ``name = module:ROW``, where ROW is a ``kind`` whose ``name`` is that name.

        title: what a row is called in messages ("family"). ours: names that a package cannot take.
        """
        self._group, self._kind, self._title, self._ours = group, kind, title, ours
        self._read: tuple[list[str], dict[str, list[EntryPoint]]] | None = None
        self._usable: list[_Row] | None = None

    def names(self) -> tuple[str, ...]:
        """The names that packages add, sorted; no package is imported."""
        return tuple(self._found())

    def all(self) -> list[_Row]:
        """Every row that can be used; what a package adds wrongly is left out, with one warning that names it."""
        names = self.names()  # first: it notices a change of sys.path
        if self._usable is None:
            self._usable = []
            for name in names:
                try:
                    row = self.find(name)
                except ConfigError as error:
                    log.warning("left out: %s", error.what)
                else:
                    self._usable += [row] if row is not None else []
        return self._usable

    def find(self, name: str) -> _Row | None:
        """The row that a package adds by this name; None where none does.

        Raises ConfigError, by the name of the package, for a row that cannot be loaded, is none, or has the name of
        another package's.
        """
        entries = self._found().get(name)
        if not entries:
            return None
        if len(entries) > 1:
            free = "a name of its own"
            ConfigError.raise_if(self._problem(e, "has the name of another package's", free) for e in entries)
        entry = entries[0]
        try:
            row = entry.load()
        except Exception as error:  # whatever a package's own code raises while it is imported
            reason = f"cannot be loaded: {type(error).__name__}: {error}"
            raise ConfigError(self._problem(entry, reason, "a package that can be imported")) from error
        if not isinstance(row, self._kind):
            reason = f"is {type(row).__name__}, no {self._kind.__name__}"
            kind = f"{self._kind.__module__}.{self._kind.__name__}"
            raise ConfigError(self._problem(entry, reason, f"the path of a {kind}"))
        if row.name != name:
            reason = f"calls itself {row.name}"
            raise ConfigError(self._problem(entry, reason, f"one name in both: {row.name} = {entry.value}"))
        return row

    def _found(self) -> dict[str, list[EntryPoint]]:
        if self._read is None or self._read[0] != sys.path:
            self._read, self._usable = (list(sys.path), self._entries()), None
        return self._read[1]

    def _entries(self) -> dict[str, list[EntryPoint]]:
        """Entry points by name, of which there should be one each. A package that takes a name of ours gets nothing."""
        if not _mentioned(self._group):
            return {}
        from importlib.metadata import entry_points  # 0.1 s, which composing does without

        found: dict[str, list[EntryPoint]] = {}
        for entry in sorted(entry_points(group=self._group), key=lambda entry: entry.name):
            if entry.name in self._ours:
                free = f"a name that is not in use; nemo_dist_conf has {', '.join(self._ours)}"
                log.warning("left out: %s", self._problem(entry, "has the name of one that nemo_dist_conf has", free))
            else:
                found.setdefault(entry.name, []).append(entry)
        return found

    def _problem(self, entry: EntryPoint, reason: str, allowed: str) -> Problem:
        package = entry.dist.name if entry.dist is not None else entry.value.partition(":")[0]
        return Problem(
            what=f"the {self._title} {entry.name} that the package {package} adds {reason}",
            asked=f"entry point {entry.name} = {entry.value} in the group {self._group}",
            allowed=allowed,
            instead=f"pip uninstall {package}",
        )


def _mentioned(group: str) -> bool:
    """Whether any package may add to a group of entry points: a millisecond, where importlib.metadata takes 100.

    Looks for the group's name in the metadata that lies in folders, as pip installs it; what else is on sys.path (an
    archive) may mention it.
    """
    word = group.encode()
    for place in sys.path:
        try:
            with os.scandir(place or ".") as entries:
                found = [entry.path for entry in entries if entry.name.endswith((".dist-info", ".egg-info"))]
        except FileNotFoundError:
            continue
        except OSError:
            return True
        for folder in found:
            try:
                if word in Path(folder, "entry_points.txt").read_bytes():
                    return True
            except OSError:  # it adds nothing
                continue
    return False
