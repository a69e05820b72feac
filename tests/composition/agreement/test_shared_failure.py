"""What ends all ranks is told once, without tracebacks: by rank 0, or by the only rank that it happened to."""

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap

import pytest

from nemo_dist_conf.composition.agreement import shared_failure as telling
from nemo_dist_conf.composition.agreement.rendezvous import rank_store
from nemo_dist_conf.composition.agreement.shared_failure import another_rank_told, end, tell
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.topology.launched_ranks import Launched
from tests import warm

ERROR = ConfigError(Problem(what="cannot work", asked="this", allowed="that", instead="other"))
TEXT = f"{ERROR}\n"


@pytest.fixture
def rank(monkeypatch):
    """Makes this process one of two ranks that share a store, or have none."""
    monkeypatch.setattr(telling, "_PATIENCE_S", 0.3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])

    def become(number, with_store=True):
        place = {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": str(number)}
        for name, value in {**place, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
            monkeypatch.setenv(name, value)
        store = rank_store(Launched(number, 2, number, "torchrun")) if with_store else None
        monkeypatch.setattr(telling, "open_store", lambda: store)

    return become


def told(capsys, number, rank, **more):
    rank(number, **more)
    with pytest.raises(SystemExit) as ended:
        end(ERROR)
    assert ended.value.code == 1
    return capsys.readouterr().err


def test_what_all_ranks_refuse_is_told_by_rank_0(rank, capsys):
    rank(0)
    assert not another_rank_told()
    assert told(capsys, 0, rank) == TEXT
    assert told(capsys, 1, rank) == ""
    assert another_rank_told()


def test_what_one_rank_refuses_is_told_by_that_rank(rank, capsys):
    rank(0)
    assert told(capsys, 1, rank) == TEXT


def test_another_message_than_rank_0s_is_told_too(rank, capsys):
    told(capsys, 0, rank)
    rank(1)
    tell(ConfigError(Problem(what="something else", asked="a", allowed="b", instead="c")))
    assert capsys.readouterr().err.startswith("something else\n")


def test_ranks_that_have_not_met_yet_rely_on_their_launcher(rank, capsys):
    """It ends them while they wait for rank 0."""
    assert told(capsys, 0, rank, with_store=False) == TEXT
    assert told(capsys, 1, rank, with_store=False) == TEXT and not another_rank_told()


def test_a_rank_that_its_launcher_ends_while_it_waits_tells_nothing(rank, capsys, monkeypatch):
    """A handler of the launcher or the app may make an exception of SIGTERM, anywhere."""

    class Terminated(Exception):
        pass

    class Asked:
        def check(self, keys):
            os.kill(os.getpid(), signal.SIGTERM)

    def handler(number, frame):
        raise Terminated

    rank(1, with_store=False)
    monkeypatch.setattr(telling, "open_store", Asked)
    before = signal.signal(signal.SIGTERM, handler)
    try:
        with pytest.raises(Terminated):
            end(ERROR)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err == ""


def test_ranks_that_are_started_again_tell_anew(rank, capsys, monkeypatch):
    told(capsys, 0, rank)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert told(capsys, 1, rank) == TEXT


APP = textwrap.dedent(
    """
    import hydra
    import nemo_dist_conf
    from torch import nn

    def run(cfg):
        model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        nemo_dist_conf.instantiate(cfg, model=model, blocks="no.such.path")

    @hydra.main(version_base="1.3", config_path=None, config_name="nemo_dist_conf")
    def main(cfg):
        run(cfg)

    def script():
        with hydra.initialize(version_base="1.3", config_path=None):
            run(hydra.compose("nemo_dist_conf"))

    if __name__ == "__main__":
        CALL()
    """
)
REFUSAL = "blocks: no module of Sequential is named no.such.path\n"


@pytest.mark.dist
@pytest.mark.slow
def test_a_refusal_in_every_rank_of_an_own_app_is_shown_once_by_torchrun(tmp_path):
    """What torchrun itself prints below it, a rank cannot prevent."""
    (tmp_path / "app.py").write_text(APP.replace("CALL", "main"))
    done = warm.run(["torchrun", "--nproc-per-node", "2", "app.py"], cwd=tmp_path)
    assert done.returncode == 1
    of_ranks = re.split(r"^[WE]\d{4} ", done.stderr, maxsplit=1, flags=re.MULTILINE)[0]  # what torchrun logs
    assert of_ranks.endswith(
        f"{REFUSAL}  asked    blocks=no.such.path\n  allowed  names from model.named_modules()\n"
        "  type     blocks=null\n"
    )
    assert done.stderr.count(REFUSAL) == 1 and "Traceback" not in of_ranks and "Error executing" not in done.stderr


@pytest.mark.dist
@pytest.mark.slow
def test_a_refusal_in_every_rank_of_a_script_without_hydra_main_is_shown_once(tmp_path):
    """As srun starts them: nobody ends the other ranks."""
    (tmp_path / "app.py").write_text(APP.replace("CALL", "script"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"SLURM_NTASKS": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    shared["PYTHONWARNINGS"] = "ignore:The version_base"  # of Hydra 1.4, about the app's own words
    ranks = [shared | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]
    command = {"args": [sys.executable, "app.py"], "cwd": tmp_path, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen(**command, env=os.environ | variables) for variables in ranks]
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [1, 1]
    assert said[0].startswith(REFUSAL) and said[1] == ""
