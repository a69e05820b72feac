"""Programs in processes of their own that need not import torch and transformers, which takes most of a short run.

    done = warm.run(["torchrun", "--nproc-per-node", "2", "-m", "nemo_dist_conf.train"], cwd=folder)

Such a process is forked from the server that the ranks of ``tests.dist.pool`` come from, and then does what ``python``
does for a file or a module. ``torchrun`` there is torch's own, with one change: it forks its ranks, which are
otherwise started as it starts them, instead of executing Python again. So does a program with the fork server that it
starts itself, which ``hydra/launcher=torchrun`` does. Only for what does not depend on a fresh interpreter;
``subprocess`` is for the rest.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver, util
from pathlib import Path
from typing import Any

from tests.dist.pool import PRELOAD

__all__ = ["run"]


def run(
    words: list[str], *, cwd: Path, env: dict[str, str] | None = None, timeout: float = 240.0
) -> subprocess.CompletedProcess[str]:
    """The outcome of ``python FILE ...``, ``python -m MODULE ...`` or ``torchrun ...``, as subprocess.run gives it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    environ = {**os.environ, **(env or {})}
    with tempfile.TemporaryDirectory(prefix="warm-") as folder:
        files = [Path(folder) / name for name in ("stdout", "stderr")]
        process = context.Process(target=_program, args=(words, str(cwd), environ, [str(file) for file in files]))
        process.start()
        try:
            process.join(timeout)
            texts = [file.read_text() if file.exists() else "" for file in files]
            if process.is_alive():
                raise subprocess.TimeoutExpired(words, timeout, *texts)
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                if process.pid is not None:
                    os.killpg(process.pid, signal.SIGKILL)  # ranks too
            process.kill()
            process.join(10)
        return subprocess.CompletedProcess(words, process.exitcode, *texts)


def _program(words: list[str], cwd: str, environ: dict[str, str], files: list[str]) -> None:
    os.setsid()
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have children
    for number, file in zip((1, 2), files):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    _fork_forkservers()
    try:
        if words[0] == "torchrun":
            _torchrun(words[1:])
        else:
            _as_main(*words[1:])
    finally:
        atexit._run_exitfuncs()


def _fork_forkservers() -> None:
    """A fork server of this process is forked from it, and finds imported what it is to import."""
    execute = util.spawnv_passfds

    def start(path: bytes, args: list[Any], passed: list[int]) -> int:
        code = str(args[-1])
        if not code.startswith("from multiprocessing.forkserver import main"):
            return execute(path, args, passed)
        pid = os.fork()
        if pid:
            return pid
        try:
            forkserver._forkserver.__init__()  # type: ignore[misc]  # it is locked while it starts this process
            exec(code)
        finally:
            os._exit(1)

    util.spawnv_passfds = start  # type: ignore[assignment]


def _torchrun(words: list[str]) -> None:
    from torch.distributed import run as torchrun

    config_from_args = torchrun.config_from_args

    def forking(args: Any) -> Any:
        config, _, command = config_from_args(args)
        assert command[0] == "-u"
        config.start_method = "fork"
        return config, _as_main, command[1:]

    torchrun.config_from_args = forking
    sys.argv = ["torchrun", *words]
    torchrun.main(["--standalone", *words])


def _as_main(*words: str) -> None:
    """``python`` with these words, in this process."""
    import torch

    if "OMP_NUM_THREADS" in os.environ:  # which torch reads when it is imported
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    if words[0] == "-m":
        sys.argv = ["-m", *words[2:]]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(words)
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
