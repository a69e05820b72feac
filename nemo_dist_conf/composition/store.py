"""Puts the config groups into Hydra's ConfigStore, without touching what an app calls its own."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from typing import Any, Callable, Mapping

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigNode, ConfigStore
from omegaconf import DictConfig, OmegaConf

from nemo_dist_conf.composition.group_owners import claim_of_app, places_of

__all__ = [
    "BASE",
    "HOOKS",
    "LazyNode",
    "NAMESPACE",
    "NODE_CLASSES",
    "PROVIDER",
    "always_call_hooks",
    "is_ours",
    "register",
    "register_launcher",
    "register_resolver",
    "register_sweeper",
    "typed_node",
]

PROVIDER = "nemo_dist_conf"
NAMESPACE = "nemo_dist"
BASE = "nemo_dist_conf"
HOOKS = "/nemo_dist/hooks@_global_"


def typed_node(schema: type, target: str, home: str, hooks: bool = False, **changed: Any) -> Any:
    """A store node: the schema's fields, and ``_target_`` for hydra.utils.instantiate.

    hooks: selecting the node switches on the check before a job starts. changed: other defaults, by field.
    """
    fields: list[Any] = [("_target_", str, dataclasses.field(default=target))]
    if hooks:
        fields.append(("defaults", list[Any], dataclasses.field(default_factory=lambda: [HOOKS, "_self_"])))
    return _node_class(schema, tuple(fields), home)(**changed)


#: Classes of the nodes made so far, by name.
NODE_CLASSES: dict[str, type] = {}


def _node_class(schema: type, fields: tuple[Any, ...], home: str) -> type:
    """The schema with those fields: one class for each, which pickle finds by name in the module ``home``."""
    is_ours = schema.__module__.partition(".")[0] == PROVIDER
    name = schema.__name__ if is_ours else f"{schema.__module__}.{schema.__qualname__}.Conf".replace(".", "_")
    if name not in NODE_CLASSES:
        NODE_CLASSES[name] = dataclasses.make_dataclass(name, fields, bases=(schema,), namespace={"__module__": home})
    return NODE_CLASSES[name]


class LazyNode(ConfigNode):
    """A ConfigStore entry whose node is made when Hydra first asks for it.

    Every Hydra app of the environment registers our groups, few use them: making twenty typed nodes took as long
    as the rest of a plain app.
    """

    def __init__(self, name: str, group: str | None, make: Callable[[], Any]) -> None:
        self.name, self.group, self.package, self.provider = f"{name}.yaml", group, None, PROVIDER
        self._make = make

    @property
    def node(self) -> Any:
        made = self.__dict__.get("_node")
        if made is None:
            made = self._make()
            self.__dict__["_node"] = made if isinstance(made, DictConfig) else OmegaConf.structured(made)
        return self.__dict__["_node"]

    @node.setter
    def node(self, value: Any) -> None:  # ConfigStore.load puts a copy here
        self.__dict__["_node"] = value


class OpenOptions(dict):
    """The options of a group to which other packages add: theirs are looked for when Hydra asks for a name that is not
    here, or for all names, and not before: most apps ask for neither.
    """

    def __init__(self, entries: Mapping[str, Any], added: Callable[[], Mapping[str, LazyNode]]) -> None:
        """added: what there is by then, by the name of the entry."""
        super().__init__(entries)
        self.added = added

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.added()

    def __missing__(self, name: str) -> LazyNode:
        return self.added()[name]

    def keys(self) -> Any:
        return {**self.added(), **dict(self.items())}.keys()


class _SharedEntries(dict):
    """The ConfigStore's tree; a copy of it has levels of its own and shares the entries.

    Hydra copies its repository, and with it the whole store, once a composition, once a completion and several times
    a group for ``--help`` (config_repository.py, CachingConfigRepository), in order to keep its list of sources. Nodes
    of a store are copied again when one is loaded (config_store.py, load), so nothing is lost by sharing them, and
    the time of a help page does not grow with groups times nodes.
    """

    def __deepcopy__(self, memo: Any) -> _SharedEntries:
        return _SharedEntries(_levels(self))


def _levels(level: Mapping[str, Any]) -> dict[str, Any]:
    copied = {key: _levels(value) if isinstance(value, dict) else value for key, value in level.items()}
    return OpenOptions(copied, level.added) if isinstance(level, OpenOptions) else copied


def register(
    groups: Mapping[str, Mapping[str, Callable[[], Any]]],
    search_path: ConfigSearchPath,
    plain_base: Mapping[str, Any],
    beside: Mapping[str, Mapping[str, Callable[[], Any]]],
    added: Mapping[str, Callable[[], Mapping[str, Callable[[], Any]]]],
) -> None:
    """Store every entry under ``nemo_dist/``, and under the short name where the app does not own that name.

    Options that an app adds to a group stand beside ours, in its files and in the ConfigStore, and what it extends
    under the same name stands in place of it.

    groups: group -> option -> maker of its node; the first option is the default of the base config, which brings
    all groups in with one line. plain_base: what the base config holds besides its defaults list.
    beside: further groups, which stand under ``nemo_dist/`` only. added: group -> further options that other packages
    bring, asked for when Hydra wants a name that is not ours.
    Called each time that Hydra builds a search path; an app that brings its own group later gets it back.
    """
    store = ConfigStore.instance()
    if not isinstance(store.repo, _SharedEntries):
        store.repo = _SharedEntries(store.repo)
    _put(store, NAMESPACE, "hooks", _hooks_node)
    places = places_of(search_path, PROVIDER)
    stored = {
        name.removesuffix(".yaml"): entry
        for name, entry in store.repo.items()
        if getattr(entry, "provider", PROVIDER) != PROVIDER
    }
    short: list[Any] = []
    spaced: list[Any] = []
    for group, options in beside.items():
        for name, make in options.items():
            _put(store, f"{NAMESPACE}/{group}", name, make)
    for group, options in groups.items():
        first = next(iter(options))
        spaced.append({f"/{NAMESPACE}/{group}@{group}": first})
        claim = claim_of_app(group, options, NAMESPACE, stored, places, _foreign_entries(store, group))
        short.append(spaced[-1] if claim.whole else {group: first})
        _remove_ours(store, group)  # another app in this process may have claimed less
        for name, make in options.items():
            _put(store, f"{NAMESPACE}/{group}", name, make)
            if not claim.whole and name not in claim.options:
                _put(store, group, name, make)
        if group in added:
            _open(store, f"{NAMESPACE}/{group}", added[group])
            if not claim.whole:
                _open(store, group, added[group])
    _put(store, NAMESPACE, BASE, lambda: _base_node(spaced, plain_base))
    if not claim_of_app(BASE, (), NAMESPACE, stored, places, ()).whole:
        _put(store, None, BASE, lambda: _base_node(short, plain_base))


def register_launcher(make: Callable[[], Any]) -> None:
    """Store ``hydra/launcher=torchrun``, a name that Hydra's plugins share, unless another plugin has it."""
    _put(ConfigStore.instance(), "hydra/launcher", "torchrun", make)


def register_sweeper(make: Callable[[], Any]) -> None:
    """Store ``hydra/sweeper=layouts``, likewise."""
    _put(ConfigStore.instance(), "hydra/sweeper", "layouts", make)


def is_ours(group: str) -> bool:
    """Whether a group's short name is ours in this app, which else has one of its own."""
    level = _level(ConfigStore.instance(), group)
    entries = level.values() if isinstance(level, dict) else ()
    return any(getattr(entry, "provider", None) == PROVIDER for entry in entries)


def always_call_hooks() -> None:
    """Switch the callback on for every app of this process, also one that uses none of our groups.

    Ranks that a launcher started have to agree on one run, whatever the app; ``~hydra.callbacks.nemo_dist_conf`` on
    the command line leaves it out.
    """
    entry = (_level(ConfigStore.instance(), "hydra") or {}).get("config.yaml")
    if entry is not None:
        entry.node.callbacks = _hooks_node().hydra.callbacks


def _base_node(defaults: list[Any], plain: Mapping[str, Any]) -> DictConfig:
    return OmegaConf.create({"defaults": [*defaults, "_self_"], **plain})


def _hooks_node() -> DictConfig:
    # No _target_, which an app with an execution whitelist (Hydra 1.4) would have to allow.
    return OmegaConf.create({"hydra": {"callbacks": {"nemo_dist_conf": "${nemo_dist.callback:}"}}})


def _put(store: ConfigStore, group: str | None, name: str, make: Callable[[], Any]) -> None:
    level = store.repo
    for part in (group or "").split("/"):
        level = level.setdefault(part, {}) if part else level
    if name not in _foreign_entries(store, group):
        level[f"{name}.yaml"] = LazyNode(name, group, make)


def _open(store: ConfigStore, group: str, added: Callable[[], Mapping[str, Callable[[], Any]]]) -> None:
    """Let a group have options that are found later. An app's own file or entry of such a name stands before them."""
    *above, last = group.split("/")
    level = store.repo
    for part in above:
        level = level[part]

    @functools.cache
    def entries() -> dict[str, LazyNode]:
        return {f"{name}.yaml": LazyNode(name, group, make) for name, make in added().items()}

    level[last] = OpenOptions(level.get(last, {}), entries)


def _level(store: ConfigStore, group: str | None) -> Any:
    level: Any = store.repo
    for part in (group or "").split("/"):
        if part:
            level = level.get(part) if isinstance(level, dict) else None
    return level


def _foreign_entries(store: ConfigStore, group: str | None) -> set[str]:
    """Names of the entries that other providers have in a group."""
    level = _level(store, group)
    entries = level.items() if isinstance(level, dict) else ()
    return {name.removesuffix(".yaml") for name, entry in entries if getattr(entry, "provider", PROVIDER) != PROVIDER}


def _remove_ours(store: ConfigStore, group: str) -> None:
    level = _level(store, group)
    for name in [n for n, e in (level or {}).items() if getattr(e, "provider", None) == PROVIDER]:
        del level[name]
    if level == {}:
        del store.repo[group]


def register_resolver(name: str, function: Callable[..., Any], **options: Any) -> None:
    """Register or replace a resolver; OmegaConf 2.4 gives the old name of 2.3's legacy function to the new one."""
    renamed = "replace" in inspect.signature(OmegaConf.register_resolver).parameters
    register = OmegaConf.register_resolver if renamed else OmegaConf.register_new_resolver
    register(name, function, replace=True, **options)  # type: ignore[call-arg]
