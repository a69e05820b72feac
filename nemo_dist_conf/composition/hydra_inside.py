"""The only module that touches what Hydra and OmegaConf do not publish: what, in which versions, why, and which test
breaks when it changes.
"""

from __future__ import annotations

import dataclasses
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Callable, Iterator, Mapping

from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.utils import JobReturn, JobStatus
from hydra.types import HydraContext
from omegaconf import AnyNode, DictConfig, OmegaConf
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import OmegaConfGrammarParser, parse

if TYPE_CHECKING:
    from hydra.experimental.callback import Callback

__all__ = [
    "LazyNode",
    "OpenOptions",
    "asked_by_callbacks",
    "call_last_at_the_end",
    "config_of_the_running_job",
    "error_of_job",
    "failed_job",
    "flag_of",
    "full_key",
    "grid_of_basic_sweeper",
    "has_values",
    "is_missing",
    "is_null",
    "node_at",
    "path_of",
    "place_of",
    "put_into_base_config",
    "read_in_place",
    "resolver_calls",
    "resolvers_asked_through",
    "root_of",
    "store_entries",
    "store_of_shared_entries",
    "without_callbacks",
    "written",
    "written_at",
]


def resolver_calls(text: str) -> list[tuple[int, int, str]]:
    """(start, end, name) of each ``${name:...}`` in a text, inner ones before the one around them; [] where it is not
    valid.

    OmegaConf 2.1 to 2.4 parse a text and resolve it in one; nothing published takes it apart.
    Test: tests/composition/agreement/test_drawn_values.py
    """
    try:
        tree = parse(text)
    except OmegaConfBaseException:
        return []
    found: list[tuple[int, int, str]] = []
    _collect(tree, found)
    return found


def _collect(tree: Any, found: list[tuple[int, int, str]]) -> None:
    for child in getattr(tree, "children", None) or ():
        _collect(child, found)
    if isinstance(tree, OmegaConfGrammarParser.InterpolationResolverContext):
        found.append((tree.start.start, tree.stop.stop + 1, tree.resolverName().getText()))


def read_in_place(text: str, container: Any, key: Any) -> tuple[Any, Any]:
    """(what the text would read as if it stood at this key, the node that resolvers are told it stands in).

    A node with a parent that does not hold it: OmegaConf 2.1 to 2.4 resolve texts of nodes only, and putting the text
    there would be refused by a typed node. Raises what OmegaConf raises.
    Test: tests/composition/agreement/test_drawn_values.py
    """
    node = AnyNode(text, key=key, parent=container)
    read: Any = node._dereference_node()
    return (read if isinstance(read, BaseContainer) else read._value()), node


def node_at(container: Any, key: Any) -> Any:
    """The node at a key of a container, not resolved, also where it is ``???`` or null; None where there is none.

    OmegaConf 2.3 and 2.4: ``container[key]`` resolves, ``OmegaConf.to_container`` copies the whole tree.
    Test: tests/composition/test_check.py
    """
    return container._get_node(key)


def written(node: Any) -> Any:
    """What is written in a node: an interpolation as its text, ``???``, None, or the value.

    OmegaConf 2.3 and 2.4 give what a node reads as, and nothing published of a node by itself.
    Test: tests/composition/agreement/test_drawn_values.py
    """
    return node._value()


def written_at(container: Any, key: Any) -> Any:
    """What is written at a key that is there, as ``written`` says.

    OmegaConf 2.3 and 2.4: as there. Test: tests/composition/test_text_values.py
    """
    return container._get_node(key)._value()


def is_null(node: Any) -> bool:
    """Whether a node, also one of options, is written as null.

    OmegaConf 2.3 and 2.4: a container that is null is no None, and reading it raises. The published ``is_missing`` and
    ``is_interpolation`` have had no sibling for null since 2.1. Test: tests/composition/test_check.py
    """
    return node._is_none()


def is_missing(node: Any) -> bool:
    """Whether a node is written as ``???``.

    OmegaConf 2.3 and 2.4: the published ``OmegaConf.is_missing`` asks for a key of a container, which a root has not,
    and resolves. Test: tests/composition/test_check.py
    """
    return node._is_missing()


def has_values(container: Any) -> bool:
    """Whether a container holds keys of its own: it is neither null, nor ``???``, nor an interpolation.

    OmegaConf 2.3 and 2.4: as ``is_null`` and ``is_missing``. Test: tests/composition/test_check.py
    """
    return not (container._is_none() or container._is_missing() or container._is_interpolation())


def full_key(container: Any, key: Any) -> str:
    """A key as it is spelt from the root of the tree, ``dist.strategy``; of the container itself where key is None.

    OmegaConf 2.3 and 2.4 publish it in the text of their errors only. Test: tests/composition/test_text_values.py
    """
    return str(container._get_full_key(key) or "")


def root_of(container: DictConfig) -> Any:
    """The root of the tree that a container is part of.

    OmegaConf 2.3 and 2.4: nothing published leads upwards. Test: tests/composition/test_text_values.py
    """
    return container._get_root()


def path_of(container: Any, key: Any) -> tuple[Any, ...]:
    """The keys that lead to a key of a container from the root of its tree.

    OmegaConf 2.3 and 2.4: nothing published leads upwards, and a dotted text does not tell numbers from names.
    Test: tests/composition/agreement/test_drawn_values.py
    """
    keys = [key]
    while container is not None and container._key() is not None:
        keys.append(container._key())
        container = container._get_parent()
    return tuple(reversed(keys))


def place_of(node: Any) -> tuple[Any, Any]:
    """(container, key) of a node, as a resolver is given the node that it stands in.

    OmegaConf 2.3 and 2.4: as ``path_of``. Test: tests/composition/agreement/test_drawn_values.py
    """
    return node._get_parent_container(), node._key()


def flag_of(node: Any, flag: str) -> bool | None:
    """A flag of a node, by itself or from those above; None where nobody set it.

    OmegaConf 2.3 and 2.4 publish readonly and struct, and not allow_objects. Test: tests/test_typed_answers.py
    """
    return node._get_flag(flag)


@contextmanager
def resolvers_asked_through(ask: Callable[..., Any]) -> Iterator[None]:
    """Inside, each resolver is asked by ``ask(name, resolver, root, parent, node, args, args_str)``.

    OmegaConf 2.1 to 2.4 keep resolvers in a class attribute, and publish neither a list of them nor the functions.
    tests/composition/agreement/test_drawn_values.py
    """
    resolvers = BaseContainer._resolvers
    originals = dict(resolvers)

    def through(name: str, resolver: Any) -> Any:
        return lambda *args: ask(name, resolver, *args)

    replaced = {name: through(name, resolver) for name, resolver in originals.items()}
    resolvers.update(replaced)
    try:
        yield
    finally:
        for name, stand_in in replaced.items():
            if BaseContainer._resolvers.get(name) is stand_in:
                BaseContainer._resolvers[name] = originals[name]


def asked_by_callbacks() -> bool:
    """Whether Hydra asks, which is making the callbacks of an app.

    Hydra 1.3 and 1.4 make them from ``hydra.callbacks`` alone. A node with ``_target_`` there is refused by 1.4 where
    the app has an execution whitelist, and warned of where it has none, with no way for a plugin to be allowed; a
    structured config that becomes an object needs none. It must be one for Hydra's callbacks only: wherever else the
    value is read (``--cfg hydra --resolve``, an app's own entry that replaces it, also where a callback composes) it is
    to be a word. So the first function of Hydra's on the stack is looked at. tests/composition/test_callback.py
    """
    frame: Any = sys._getframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.startswith("hydra."):
            return module == "hydra._internal.callbacks" and frame.f_code.co_name == "__init__"
        frame = frame.f_back
    return False


def config_of_the_running_job() -> DictConfig:
    """The tree that Hydra's run_job hands to the task function after its callbacks.

    Hydra 1.3 and 1.4: a callback is given the config that this one was copied from, and nothing else leads to the copy.
    tests/launch/test_submitit.py
    """
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name in ("run_job", "_run_job") and isinstance(frame.f_locals.get("task_cfg"), DictConfig):
            return frame.f_locals["task_cfg"]
        frame = frame.f_back
    raise AssertionError("not called from a callback of hydra.core.utils.run_job")


def error_of_job(job_return: JobReturn) -> BaseException | None:
    """What the task function of a job raised, if it did.

    Hydra 1.3 and 1.4: the published ``return_value`` prints and raises it. tests/composition/test_callback.py
    """
    return job_return._return_value if job_return.status is JobStatus.FAILED else None


class _Tolerated(JobReturn):
    """A job without a result in a sweep that goes on."""

    @property
    def return_value(self) -> Any:
        return None

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def failed_job(like: JobReturn, error: BaseException, *, raises: bool) -> JobReturn:
    """What a job gives that failed with this error. raises: asking for its value raises it, as Hydra's own do.

    Hydra 1.3 and 1.4: a failed job keeps the error in the place of the value, and the basic sweeper, which reads no
    values, asks for them all the same. tests/launch/test_sweep.py
    """
    kind = JobReturn if raises else _Tolerated
    failed = kind(like.overrides, like.cfg, like.hydra_cfg, like.working_dir, like.task_name)
    failed.status = JobStatus.FAILED
    failed._return_value = error
    return failed


def call_last_at_the_end(context: HydraContext, callback: Callback) -> None:
    """Let a callback be asked before the app's own when something starts, and after them when it ends.

    Hydra 1.3 and 1.4 make their list from the config alone, and ask in the reverse order at the end.
    tests/launch/test_sweep.py
    """
    context.callbacks.callbacks.insert(0, callback)


def without_callbacks(context: HydraContext) -> HydraContext:
    """The context for a job whose callbacks another process asks.

    Hydra 1.3 and 1.4: run_job asks the callbacks of its context, whose class is not published.
    tests/launch/test_nodes.py
    """
    from hydra._internal.callbacks import Callbacks

    return dataclasses.replace(context, callbacks=Callbacks())


def grid_of_basic_sweeper(overrides: list[Any]) -> list[list[str]]:
    """The overrides of each job that Hydra's own sweeper makes of parsed ones.

    Hydra 1.3 and 1.4: a sweeper is asked for its jobs by running them. tests/composition/test_sweep_check.py
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    return [job for batch in BasicSweeper.split_arguments(overrides, None) for job in batch]


class LazyNode(ConfigNode):
    """A ConfigStore entry whose node is made when Hydra first asks for it.

    Every Hydra app of the environment registers our groups, few use them: making twenty typed nodes took as long
    as the rest of a plain app.

    Hydra 1.3 and 1.4: the published ``ConfigStore.store`` takes a node that is made, and keeps what has these
    attributes. tests/composition/test_store.py
    """

    def __init__(self, name: str, group: str | None, provider: str, make: Callable[[], Any]) -> None:
        self.name, self.group, self.package, self.provider = f"{name}.yaml", group, None, provider
        self._make = make
        self._made: DictConfig | None = None

    @property
    def node(self) -> Any:
        if self._made is None:
            made = self._make()
            self._made = made if isinstance(made, DictConfig) else OmegaConf.structured(made)
        return self._made

    @node.setter
    def node(self, value: Any) -> None:  # ConfigStore.load puts a copy here
        self._made = value


def store_entries() -> dict[str, Any]:
    """The entries of the ConfigStore: groups as nested dictionaries, entries by ``name.yaml``, to read and to change.

    Hydra 1.3 and 1.4: the published ``list`` raises where there is no group, ``load`` copies a node, and nothing takes
    an entry out. tests/composition/test_store.py
    """
    return ConfigStore.instance().repo


def store_of_shared_entries() -> dict[str, Any]:
    """The same; from now on, a copy of the store has levels of its own and shares the entries.

    Hydra 1.3 and 1.4 copy their repository, and with it the whole store, once a composition, once a completion and
    several times a group for ``--help`` (config_repository.py, CachingConfigRepository), in order to keep its list of
    sources. Nodes of a store are copied again when one is loaded (config_store.py, load), so nothing is lost by sharing
    them, and the time of a help page does not grow with groups times nodes. tests/composition/test_store.py
    """
    store = ConfigStore.instance()
    if not isinstance(store.repo, _SharedEntries):
        store.repo = _SharedEntries(store.repo)
    return store.repo


class _SharedEntries(dict):
    def __deepcopy__(self, memo: Any) -> _SharedEntries:
        return _SharedEntries(_levels(self))


def _levels(level: Mapping[str, Any]) -> dict[str, Any]:
    copied = {key: _levels(value) if isinstance(value, dict) else value for key, value in level.items()}
    return OpenOptions(copied, level.added) if isinstance(level, OpenOptions) else copied


class OpenOptions(dict[str, Any]):
    """The options of a group of the store, to which other packages add.

    Theirs are looked for when Hydra asks for a name that is not here, or for all names, and not before: most apps ask
    for neither. Hydra 1.3.8 to 1.4.0rc3 ask a level of the store by ``in``, ``[]`` and ``keys()`` (config_store.py),
    and publish nothing that is asked for names. Test: tests/third_party/test_strategy.py,
    test_it_is_an_option_of_the_group_with_help_and_only_where_it_is_installed.
    """

    def __init__(self, entries: Mapping[str, Any], added: Callable[[], Mapping[str, Any]]) -> None:
        """added: what there is by then, by the name of the entry."""
        super().__init__(entries)
        self.added = added

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.added()

    def __missing__(self, name: str) -> Any:
        return self.added()[name]

    def keys(self) -> Any:
        return {**self.added(), **dict(self.items())}.keys()


def put_into_base_config(key: str, value: Any) -> None:
    """Set a key of Hydra's own node for every app of this process.

    Hydra 1.3 and 1.4 keep the defaults of ``hydra:`` in the ConfigStore as ``hydra/config``; a plugin has no other way
    to add a callback to an app that uses none of its groups. tests/composition/test_callback.py
    """
    entry = store_entries().get("hydra", {}).get("config.yaml")
    if entry is not None:
        entry.node[key] = value
