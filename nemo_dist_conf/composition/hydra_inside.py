"""The only module that touches what Hydra and OmegaConf do not publish: what, in which versions, why, and which test
breaks when it changes.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from typing import Any, Callable, Iterator

from hydra.core.utils import JobReturn, JobStatus
from omegaconf import AnyNode, DictConfig
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import OmegaConfBaseException
from omegaconf.grammar_parser import OmegaConfGrammarParser, parse

__all__ = [
    "asked_by_callbacks",
    "config_of_the_running_job",
    "error_of_job",
    "read_in_place",
    "resolver_calls",
    "resolvers_asked_through",
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


def _collect(context: Any, found: list[tuple[int, int, str]]) -> None:
    for child in getattr(context, "children", None) or ():
        _collect(child, found)
    if isinstance(context, OmegaConfGrammarParser.InterpolationResolverContext):
        found.append((context.start.start, context.stop.stop + 1, context.resolverName().getText()))


def read_in_place(text: str, container: Any, key: Any) -> tuple[Any, Any]:
    """(what the text would read as if it stood at this key, the node that resolvers are told it stands in).

    A node with a parent that does not hold it: OmegaConf 2.1 to 2.4 resolve texts of nodes only, and putting the text
    there would be refused by a typed node. Raises what OmegaConf raises.
    Test: tests/composition/agreement/test_drawn_values.py
    """
    node = AnyNode(text, key=key, parent=container)
    read: Any = node._dereference_node()
    return (read if isinstance(read, BaseContainer) else read._value()), node


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
