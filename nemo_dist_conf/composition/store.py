"""Puts the config groups into Hydra's ConfigStore, without touching what an app calls its own."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, Callable, Collection, Mapping

from hydra.core.config_search_path import ConfigSearchPath
from omegaconf import DictConfig, OmegaConf

from nemo_dist_conf.composition.group_owners import claim_of_app, places_of
from nemo_dist_conf.composition.hydra_inside import (
    LazyNode,
    OpenOptions,
    put_into_base_config,
    store_entries,
    store_of_shared_entries,
)

__all__ = [
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
_NAMESPACE = "nemo_dist"
_BASE = "nemo_dist_conf"
_HOOKS = "/nemo_dist/hooks@_global_"


def typed_node(schema: type, target: str, home: str, hooks: bool = False, **changed: Any) -> Any:
    """A store node: the schema's fields, and ``_target_`` for hydra.utils.instantiate.

    hooks: selecting the node switches on the check before a job starts. changed: other defaults, by field.
    """
    fields: list[Any] = [("_target_", str, dataclasses.field(default=target))]
    if hooks:
        fields.append(("defaults", list[Any], dataclasses.field(default_factory=lambda: [_HOOKS, "_self_"])))
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


def register(
    groups: Mapping[str, Mapping[str, Callable[[], Any]]],
    search_path: ConfigSearchPath,
    plain_base: Mapping[str, Any],
    beside: Mapping[str, Mapping[str, Callable[[], Any]]],
    added: Mapping[str, Callable[[], Mapping[str, Callable[[], Any]]]],
    optional: Collection[str],
) -> None:
    """Store every entry under ``nemo_dist/``, and under the short name where the app does not own that name.

    Options that an app adds to a group stand beside ours, in its files and in the ConfigStore, and what it extends
    under the same name stands in place of it.

    groups: group -> option -> maker of its node; the first option is the default of the base config, which brings
    all groups in with one line. plain_base: what the base config holds besides its defaults list.
    beside: further groups, which stand under ``nemo_dist/`` only. added: group -> further options that other packages
    bring, asked for when Hydra wants a name that is not ours. optional: groups that the base config leaves out where
    the app has something of that name.
    Called each time that Hydra builds a search path; an app that brings its own group later gets it back.
    """
    store = store_of_shared_entries()
    _put(store, _NAMESPACE, "hooks", _hooks_node)
    places = places_of(search_path, PROVIDER)
    stored = {
        name.removesuffix(".yaml"): entry
        for name, entry in store.items()
        if getattr(entry, "provider", PROVIDER) != PROVIDER
    }
    short: list[Any] = []
    spaced: list[Any] = []
    for group, options in beside.items():
        for name, make in options.items():
            _put(store, f"{_NAMESPACE}/{group}", name, make)
    for group, options in groups.items():
        first = next(iter(options))
        spaced.append({f"/{_NAMESPACE}/{group}@{group}": first})
        is_optional = group in optional
        claim = claim_of_app(group, options, _NAMESPACE, stored, places, _foreign_entries(store, group), is_optional)
        if not (claim.whole and is_optional):
            short.append(spaced[-1] if claim.whole else {group: first})
        _remove_ours(store, group)  # another app in this process may have claimed less
        for name, make in options.items():
            _put(store, f"{_NAMESPACE}/{group}", name, make)
            if not claim.whole and name not in claim.options:
                _put(store, group, name, make)
        if group in added:
            _open(store, f"{_NAMESPACE}/{group}", added[group])
            if not claim.whole:
                _open(store, group, added[group])
    _put(store, _NAMESPACE, _BASE, lambda: _base_node(spaced, plain_base))
    if not claim_of_app(_BASE, (), _NAMESPACE, stored, places, ()).whole:
        _put(store, None, _BASE, lambda: _base_node(short, plain_base))


def register_launcher(make: Callable[[], Any]) -> None:
    """Store ``hydra/launcher=torchrun``, a name that Hydra's plugins share, unless another plugin has it."""
    _put(store_entries(), "hydra/launcher", "torchrun", make)


def register_sweeper(make: Callable[[], Any]) -> None:
    """Store ``hydra/sweeper=layouts``, likewise."""
    _put(store_entries(), "hydra/sweeper", "layouts", make)


def is_ours(group: str) -> bool:
    """Whether a group's short name is ours in this app, which else has one of its own."""
    level = _level(store_entries(), group)
    entries = level.values() if isinstance(level, dict) else ()
    return any(getattr(entry, "provider", None) == PROVIDER for entry in entries)


def always_call_hooks() -> None:
    """Switch the callback on for every app of this process, also one that uses none of our groups.

    Ranks that a launcher started have to agree on one run, whatever the app; ``~hydra.callbacks.nemo_dist_conf`` on
    the command line leaves it out.
    """
    put_into_base_config("callbacks", _hooks_node().hydra.callbacks)


def _base_node(defaults: list[Any], plain: Mapping[str, Any]) -> DictConfig:
    return OmegaConf.create({"defaults": [*defaults, "_self_"], **plain})


def _hooks_node() -> DictConfig:
    # No _target_, which an app with an execution whitelist (Hydra 1.4) would have to allow.
    return OmegaConf.create({"hydra": {"callbacks": {"nemo_dist_conf": "${nemo_dist.callback:}"}}})


def _put(store: dict[str, Any], group: str | None, name: str, make: Callable[[], Any]) -> None:
    level = store
    for part in (group or "").split("/"):
        level = level.setdefault(part, {}) if part else level
    if name not in _foreign_entries(store, group):
        level[f"{name}.yaml"] = LazyNode(name, group, PROVIDER, make)


class _Added:
    """The further options of a group as entries of the store, made at the first question; goes through pickle."""

    def __init__(self, group: str, makers: Callable[[], Mapping[str, Callable[[], Any]]]) -> None:
        self.group, self.makers = group, makers
        self.entries: dict[str, LazyNode] | None = None

    def __call__(self) -> dict[str, LazyNode]:
        if self.entries is None:
            made = self.makers().items()
            self.entries = {f"{name}.yaml": LazyNode(name, self.group, PROVIDER, make) for name, make in made}
        return self.entries


def _open(store: dict[str, Any], group: str, added: Callable[[], Mapping[str, Callable[[], Any]]]) -> None:
    """Let a group have options that are found later. An app's own file or entry of such a name stands before them."""
    *above, last = group.split("/")
    level = store
    for part in above:
        level = level[part]
    level[last] = OpenOptions(level.get(last, {}), _Added(group, added))


def _level(store: dict[str, Any], group: str | None) -> Any:
    level: Any = store
    for part in (group or "").split("/"):
        if part:
            level = level.get(part) if isinstance(level, dict) else None
    return level


def _foreign_entries(store: dict[str, Any], group: str | None) -> set[str]:
    """Names of the entries that other providers have in a group."""
    level = _level(store, group)
    entries = level.items() if isinstance(level, dict) else ()
    return {name.removesuffix(".yaml") for name, entry in entries if getattr(entry, "provider", PROVIDER) != PROVIDER}


def _remove_ours(store: dict[str, Any], group: str) -> None:
    level = _level(store, group)
    for name in [n for n, e in (level or {}).items() if getattr(e, "provider", None) == PROVIDER]:
        del level[name]
    if level == {}:
        del store[group]


def register_resolver(name: str, function: Callable[..., Any], **options: Any) -> None:
    """Register or replace a resolver; OmegaConf 2.4 gives the old name of 2.3's legacy function to the new one."""
    renamed = "replace" in inspect.signature(OmegaConf.register_resolver).parameters
    register = OmegaConf.register_resolver if renamed else OmegaConf.register_new_resolver
    register(name, function, replace=True, **options)  # type: ignore[call-arg]
