"""What runs in each rank's process: the surroundings of a Hydra job are put up, then the task function is called."""

from __future__ import annotations

import faulthandler
import logging
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from contextlib import nullcontext
from typing import Any, Callable

from omegaconf import DictConfig

from nemo_dist_conf.composition.agreement.drawn_values import Drawn
from nemo_dist_conf.errors import NemoDistConfError
from nemo_dist_conf.launch.task import Payload
from nemo_dist_conf.topology.launched_ranks import set_by_elastic

__all__ = ["RankExit", "run_rank"]

log = logging.getLogger(__name__)


class RankExit(Exception):
    """The task function ended its process with a status that is not 0."""


def run_rank(blob: bytes, task: Callable[..., Any] | None = None) -> bytes | None:
    """Call the task function of the payload; rank 0 returns its value, pickled.

    Torch elastic has set the rank's variables and put stdout and stderr where they belong.
    """
    threading.Thread(target=_end_with_launcher, args=(os.getppid(),), daemon=True).start()
    signal.signal(signal.SIGINT, _interrupted_once)
    payload: Payload = pickle.loads(blob)
    rank = int(os.environ["RANK"])
    _surroundings(payload)
    named, config, hydra, drawn = payload.open()
    function = task or named
    if function is None:
        raise AssertionError("no task function came with the payload")
    try:
        with _allowed_to_execute(payload.allowed):
            _hydra(payload, config, hydra, drawn, rank)
            value = function(config)
    except SystemExit as end:
        if isinstance(end.__context__, NemoDistConfError):
            raise end.__context__  # told to the user before the exit; the sweep's report tells it too
        if end.code not in (0, None):
            raise RankExit(f"exited with status {end.code}") from None
        value = None
    finally:
        _flush()
    return _packed(value) if rank == 0 else None


def _allowed_to_execute(whitelist: Any) -> Any:
    """What the app lets ``hydra.utils.instantiate`` call; since Hydra 1.4, where ``@hydra.main`` puts it up."""
    from hydra import utils

    allow = getattr(utils, "execution_whitelist", None)
    return nullcontext() if allow is None else allow(whitelist, reset=True)


def _end_with_launcher(parent: int) -> None:
    """End this process when the launcher is gone, also after a SIGKILL that let it tell nobody.

    The launcher holds the other end of a pipe, which a sibling that was forked later may hold too: so the process
    that started this one is watched as well.
    """
    launcher = multiprocessing.parent_process()
    if launcher is None:
        raise AssertionError("a rank runs in a process of its own")
    while True:
        launcher.join(timeout=1.0)
        if not launcher.is_alive() or os.getppid() != parent:
            os._exit(1)


def _interrupted_once(number: int, frame: Any) -> None:
    """Ctrl-C comes twice, from the terminal and from the launcher; the second one would meet the rank as it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt


def _surroundings(payload: Payload) -> None:
    """Environment, folder, arguments and threads as they are in the launcher now; a forkserver keeps old ones."""
    for name in [name for name in os.environ if name not in payload.environment and not set_by_elastic(name)]:
        del os.environ[name]
    os.environ.update(payload.environment)
    os.environ["OMP_NUM_THREADS"] = str(payload.threads)
    os.chdir(payload.folder)
    sys.argv = list(payload.argv)
    torch = sys.modules.get("torch")
    if torch is not None:  # preloaded: it has read OMP_NUM_THREADS already
        torch.set_num_threads(payload.threads)


def _hydra(payload: Payload, config: DictConfig, hydra: DictConfig, drawn: Drawn, rank: int) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.utils import JobRuntime, configure_log, setup_globals

    from nemo_dist_conf.composition.agreement.config_tree import same_now
    from nemo_dist_conf.composition.agreement.drawn_values import put_missing
    from nemo_dist_conf.composition.agreement.rank_logs import keep_apart
    from nemo_dist_conf.composition.groups import register_resolvers

    setup_globals()
    register_resolvers()
    same_now(payload.now)
    for tree in (config, hydra):
        put_missing(tree, drawn)
    JobRuntime.instance().set("name", payload.job_name)
    keep_apart(hydra, rank)
    HydraConfig.instance().set_config(hydra)
    configure_log(hydra.hydra.job_logging, hydra.hydra.verbose)
    _log_as_main()
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if attempt and rank == 0:
        allowed = os.environ.get("TORCHELASTIC_MAX_RESTARTS")
        log.warning("a rank failed; the ranks are started again (%d of %s)", attempt, allowed)
    # Where it was when it was stopped: a rank that hangs shows its stacks at the end of its log.
    for handler in logging.getLogger().handlers:
        if isinstance(handler, logging.FileHandler) and handler.stream is not None:
            faulthandler.register(signal.SIGTERM, file=handler.stream, all_threads=True, chain=True)


def _log_as_main() -> None:
    """multiprocessing imports the program under another name, which its log lines should not show."""
    make = logging.getLogRecordFactory()

    def renamed(name: str, *args: Any, **kwargs: Any) -> logging.LogRecord:
        return make("__main__" if name == "__mp_main__" else name, *args, **kwargs)

    logging.setLogRecordFactory(renamed)


def _packed(value: Any) -> bytes | None:
    try:
        return pickle.dumps(value)
    except Exception as error:
        log.warning("the job's value, a %s, cannot be sent to the sweeper: %s", type(value).__name__, error)
        return None


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    for handler in logging.getLogger().handlers:
        handler.flush()
