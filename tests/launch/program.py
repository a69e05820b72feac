"""An app whose ranks do what ``do`` says, started as a user starts it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from tests import warm

APP = """
    import logging, os, random, signal, sys, threading, time
    from pathlib import Path

    import hydra
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("random", lambda: random.SystemRandom().getrandbits(64), replace=True)
    HERE = Path(__file__).parent

    @hydra.main(version_base="1.3", config_path=".", config_name="config")
    def main(cfg):
        rank, out = int(os.environ["RANK"]), Path(HydraConfig.get().runtime.output_dir)
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        print("printed by rank", rank)
        logging.getLogger(__name__).info("logged by rank %s", rank)
        (out / f"pid.{rank}.{attempt}").write_text(str(os.getpid()))
        if cfg.do == "wait" and (HERE / "wait").exists():
            time.sleep(300)
        if cfg.do == "hang":
            a_place_to_hang()
        if cfg.do == "raise" and rank == 1:
            raise ValueError("not on rank 1")
        if cfg.do == "break" and (HERE / "broken").exists() and cfg.parallelism.tp_size == 1 and cfg.n == 2:
            raise ValueError("broken")
        if cfg.do in ("kill", "kill_once") and rank == 1 and (attempt == 0 or cfg.do == "kill"):
            while not (out / f"pid.0.{attempt}").exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)
        if cfg.do == "kill_once" and attempt == 0:
            time.sleep(300)
        if cfg.do.startswith("exit"):
            sys.exit(int(cfg.do[4:]))
        if cfg.do in ("no_number", "infinite"):
            return (1.0, float("nan" if cfg.do == "no_number" else "-inf"))
        if cfg.do == "lock":
            return threading.Lock()
        (out / f"written.{rank}").write_text(OmegaConf.to_yaml(cfg))
        (out / f"read.{rank}").write_text(OmegaConf.to_yaml(cfg, resolve=True))
        (out / f"hydra.{rank}").write_text(OmegaConf.to_yaml(HydraConfig.get()))
        return cfg.n + rank

    def a_place_to_hang():
        time.sleep(300)

    if __name__ == "__main__":
        main()
"""

CONFIG = """
    defaults: [nemo_dist_conf, _self_]
    do: write
    n: 0
    seed: ${random:}
    name: run-${random:}-${now:%H-%M-%S-%f}
    mine: gpu${oc.env:LOCAL_RANK,none}
    late: {size: null}
    follows: {size: "${late.size}", folder: "${hydra:runtime.output_dir}/x", set: "${oc.env:SET,unset}"}
    hydra:
      callbacks:
        noting: {_target_: noting.Noting}
"""

CALLBACK = """
    import os
    from pathlib import Path

    class Noting:
        def __getattr__(self, event):
            if not event.startswith("on_"):
                raise AttributeError(event)

            def note(**kwargs):
                with (Path(__file__).parent / "events.txt").open("a") as file:
                    file.write(f"{event} {os.getpid()}\\n")

            return note
"""

TORCHRUN = ["hydra/launcher=torchrun", "hydra.launcher.nproc_per_node=2"]


class Program:
    """The app in a folder of its own."""

    def __init__(self, folder: Path, app: str = APP) -> None:
        self.folder = folder
        for name, text in (("app.py", app), ("config.yaml", CONFIG), ("noting.py", CALLBACK)):
            (folder / name).write_text(textwrap.dedent(text))

    def start(self, *words: str, launcher: tuple[str, ...] = (), **env: str) -> subprocess.Popen:
        command = [sys.executable, *launcher, "app.py", *words]
        return subprocess.Popen(
            command,
            cwd=self.folder,
            env={**os.environ, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *words: str, **more) -> subprocess.CompletedProcess:
        process = self.start(*words, **more)
        try:
            out, err = process.communicate(timeout=120)
        finally:
            process.kill()
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def sweep(self, *words: str, fresh: bool = False, **env: str) -> subprocess.CompletedProcess:
        """On 2 ranks, into the folder ``sweep`` where no other is asked for. fresh: by an interpreter of its own."""
        says = any(word.startswith(("hydra.sweep.dir", "hydra.launcher.resume")) for word in words)
        command = ["-m", *TORCHRUN, *([] if says else ["hydra.sweep.dir=sweep"]), *words]
        if fresh:
            return self.run(*command, **env)
        return warm.run(["python", "app.py", *command], cwd=self.folder, env=env)

    def records(self, folder: str = "sweep") -> dict[int, dict]:
        """The last of each job."""
        lines = (self.folder / folder / "sweep.jsonl").read_text().splitlines()
        return {record["job"]: record for record in map(json.loads, lines)}

    def read(self, pattern: str) -> dict[str, str]:
        """Path within the folder -> contents."""
        found = sorted(path for path in self.folder.glob(pattern) if path.is_file())
        return {str(path.relative_to(self.folder)): path.read_text() for path in found}


def wait_for(what, seconds: float = 60.0):
    """What ``what`` gives, once it gives something."""
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, f"nothing within {seconds} s"
        time.sleep(0.05)
    return found


def is_running(pid: int) -> bool:
    return _stat(pid)[:1] not in ([], ["Z"])


def started_by(process: subprocess.Popen) -> list[int]:
    """Whatever still runs of the session that the process began: ranks, a forkserver, a resource tracker."""
    numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    session = [pid for pid in numbers if _stat(pid)[3:4] == [str(process.pid)]]
    return [pid for pid in session if pid != process.pid and is_running(pid)]


def _stat(pid: int) -> list[str]:
    """State, parent, group, session and more; nothing for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (ProcessLookupError, FileNotFoundError):
        return []


def end(process: subprocess.Popen, number: int = signal.SIGKILL) -> tuple[str, str]:
    """Send the signal and wait; SIGINT goes to the ranks too, as a terminal sends it."""
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    return process.communicate(timeout=60)
