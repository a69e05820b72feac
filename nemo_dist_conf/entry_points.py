"""Rows that other installed packages add to a registry of ours, by an entry point. Standard library only."""

from __future__ import annotations

import sys
from collections import Counter
from typing import TYPE_CHECKING, Collection, Generic, Protocol, TypeVar

from nemo_dist_conf.errors import ConfigError, Problem

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["AddedRows"]


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
        self._read: tuple[list[str], dict[str, EntryPoint]] | None = None

    def names(self) -> tuple[str, ...]:
        """The names that packages add, sorted; no package is imported.

        Raises ConfigError where one takes a name of ours, or two take the same.
        """
        return tuple(self._found())

    def find(self, name: str) -> _Row | None:
        """The row that a package adds by this name; None where none does.

        Raises ConfigError, by the name of the package, for a row that cannot be loaded or is none, and as ``names``.
        """
        entry = self._found().get(name)
        if entry is None:
            return None
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

    def _found(self) -> dict[str, EntryPoint]:
        if self._read is None or self._read[0] != sys.path:
            self._read = list(sys.path), self._entries()
        return self._read[1]

    def _entries(self) -> dict[str, EntryPoint]:
        from importlib.metadata import entry_points  # 0.1 s, which composing does without

        found = sorted(entry_points(group=self._group), key=lambda entry: entry.name)
        counts = Counter(entry.name for entry in found)
        taken = [entry for entry in found if entry.name in self._ours]
        twice = [entry for entry in found if counts[entry.name] > 1 and entry.name not in self._ours]
        free = f"a name that is not in use; nemo_dist_conf has {', '.join(self._ours)}"
        ConfigError.raise_if(
            [self._problem(entry, "has the name of one that nemo_dist_conf has", free) for entry in taken]
            + [self._problem(entry, "has the name of another package's", free) for entry in twice]
        )
        return {entry.name: entry for entry in found}

    def _problem(self, entry: EntryPoint, reason: str, allowed: str) -> Problem:
        package = entry.dist.name if entry.dist is not None else entry.value.partition(":")[0]
        return Problem(
            what=f"the {self._title} {entry.name} that the package {package} adds {reason}",
            asked=f"entry point {entry.name} = {entry.value} in the group {self._group}",
            allowed=allowed,
            instead=f"pip uninstall {package}",
        )
