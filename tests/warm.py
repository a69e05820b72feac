"""Programs in processes of their own that need not import torch and transformers, which takes most of a short run.

    done = warm.run(["torchrun", "--nproc-per-node", "2", "-m", "nemo_dist_conf.train"], cwd=folder)

Such a process is forked from the server that the ranks of ``tests.dist.pool`` come from, and then does what ``python``
does for a file or a module. ``torchrun`` there is torch's own, with one change: it forks its ranks, which are
otherwise started as it starts them, instead of executing Python again. So does a program with the fork server that it
starts itself, which ``hydra/launcher=torchrun`` does, and a Python that it starts by subprocess with files for what is
printed, which the benchmarks do. Only for what does not depend on a fresh interpreter;
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
import time
import traceback
from multiprocessing import forkserver, util
from pathlib import Path
from typing import Any, Mapping

from tests.dist.pool import PRELOAD

__all__ = ["Program", "run"]


class Program:
    """``python FILE ...``, ``python -m MODULE ...`` or ``torchrun ...`` as it runs; its methods are those of Popen.

    env: beside this process's variables; None: not set. The program has a session of its own; what is left of it is
    killed when ``communicate`` ends, whichever way.
    """

    def __init__(self, words: list[str], *, cwd: Path, env: Mapping[str, str | None] | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        environ = {name: value for name, value in {**os.environ, **(env or {})}.items() if value is not None}
        self.words = words
        self._folder = tempfile.TemporaryDirectory(prefix="warm-")
        self._files = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        arguments = (words, str(cwd), environ, [str(file) for file in self._files])
        self._process = context.Process(target=_program, args=arguments)
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float) -> int:
        """The status that it ends with. Raises subprocess.TimeoutExpired, and lets it go on."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.words, timeout, *self._texts())
        return self.returncode

    def communicate(self, timeout: float = 240.0) -> tuple[str, str]:
        """What it printed, once it has ended. Raises subprocess.TimeoutExpired."""
        try:
            self.wait(timeout)
            return self._texts()
        finally:
            self.kill()

    def kill(self) -> None:
        """With all its ranks."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join(10)

    def _texts(self) -> tuple[str, str]:
        out, err = (file.read_text() if file.exists() else "" for file in self._files)
        return out, err


def run(
    words: list[str], *, cwd: Path, env: Mapping[str, str | None] | None = None, timeout: float = 240.0
) -> subprocess.CompletedProcess[str]:
    """The program's outcome, as subprocess.run gives it."""
    program = Program(words, cwd=cwd, env=env)
    texts = program.communicate(timeout)
    assert program.returncode is not None
    return subprocess.CompletedProcess(words, program.returncode, *texts)


def _program(words: list[str], cwd: str, environ: dict[str, str], files: list[str]) -> None:
    os.setsid()
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # may have children
    for number, file in zip((1, 2), files):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(cwd)
    multiprocessing.process.ORIGINAL_DIR = cwd  # type: ignore[attr-defined]  # where its children look for its files
    _fork_forkservers()
    _fork_pythons()
    try:
        if words[0] == "torchrun":
            _torchrun(words[1:])
        else:
            _as_main(*words[1:])
    finally:
        atexit._run_exitfuncs()


class _Forked:
    """What stands for subprocess.Popen where a Python program is forked."""

    def __init__(self, words: list[str], cwd: Any, env: Mapping[str, str], printed: list[Any]) -> None:
        self.args = words
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid:
            return
        status = 1
        try:
            for number, file in zip((1, 2), printed):
                if file is not None:
                    os.dup2(file.fileno(), number)
            os.environ.clear()
            os.environ.update(env)
            os.chdir(cwd or ".")
            _torchrun(words[2:]) if words[:2] == ["-m", "torch.distributed.run"] else _as_main(*words)
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (timeout or 1e9)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            time.sleep(0.02)
        assert self.returncode is not None
        return self.returncode


def _fork_pythons() -> None:
    popen = subprocess.Popen

    def start(args: Any, **options: Any) -> Any:
        printed = [options.get("stdout"), options.get("stderr")]
        is_program = not isinstance(args, str) and args[0] == sys.executable and args[1] not in ("-c", "-X")
        is_plain = options.keys() <= {"cwd", "env", "stdout", "stderr"}
        if not is_program or not is_plain or any(file is not None and not hasattr(file, "fileno") for file in printed):
            return popen(args, **options)
        env = options.get("env")
        return _Forked(list(map(str, args[1:])), options.get("cwd"), dict(os.environ) if env is None else env, printed)

    subprocess.Popen = start  # type: ignore[assignment,misc]


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
        return config, _as_rank, command[1:]

    torchrun.config_from_args = forking
    sys.argv = ["torchrun", *words]
    torchrun.main([*(["--standalone"] if "--rdzv-backend" not in words else []), *words])


def _as_rank(*words: str) -> None:
    """Without the handlers of torchrun's own process, which executing Python leaves behind, too."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    _as_main(*words)


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
        path = os.path.abspath(words[0])
        sys.path.insert(0, os.path.dirname(path))
        runpy.run_path(path, run_name="__main__")
