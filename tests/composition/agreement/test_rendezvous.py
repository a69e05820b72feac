"""Where ranks meet: the address that the launcher tells, or that all ranks can work out."""

import socket
import threading
import time

import pytest

from nemo_dist_conf.composition.agreement.rendezvous import all_have_come, export_ranks, master_address, rank_store
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.topology.launched_ranks import Launched

VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_JOB_ID")
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SUBMITIT_LOCAL_JOB_ID", "TORCHELASTIC_USE_AGENT_STORE")


@pytest.fixture
def environ(monkeypatch):
    """Sets variables; none of those that tell of ranks are set before."""
    for name in VARIABLES + RANK_VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is put back also where the code under test sets it
        monkeypatch.delenv(name)

    def put(**values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return put


def place(source, rank=1):
    return Launched(rank, 2, rank, source)


def test_torchruns_address_is_taken(environ):
    environ(MASTER_ADDR="node7", MASTER_PORT="1234")
    assert master_address(place("torchrun")) == ("node7", 1234)


@pytest.mark.parametrize("missing", ["MASTER_ADDR", "MASTER_PORT"])
def test_without_an_address_the_missing_variable_is_named(environ, missing):
    environ(**{name: "1" for name in ("MASTER_ADDR", "MASTER_PORT") if name != missing})
    with pytest.raises(ConfigError, match=f"2 ranks, but {missing} is not set") as error:
        master_address(place("torchrun"))
    assert error.value.type.startswith("torchrun --nproc-per-node 2 ")


def test_on_slurm_all_ranks_of_a_job_work_out_the_same(environ):
    environ(SLURM_JOB_NODELIST="n[1-4]", SLURM_STEP_NODELIST="n[3-4]", SLURM_JOB_ID="123456")
    assert master_address(place("Slurm", 0)) == master_address(place("Slurm", 1)) == ("n3", 15000 + 123456 % 15000)
    environ(MASTER_ADDR="own", MASTER_PORT="99")
    assert master_address(place("Slurm")) == ("own", 99)


def test_jobs_on_one_node_meet_at_ports_of_their_own(environ):
    ports = []
    for job in ("101_1", "101_2"):
        environ(SUBMITIT_LOCAL_JOB_ID=job)
        host, port = master_address(place("submitit"))
        ports.append(port)
        assert host == "127.0.0.1" and 15000 <= port < 30000
    assert len(set(ports)) == 2


def test_torchruns_variables_are_set_where_another_launcher_started_the_ranks(environ):
    import os

    environ(SLURM_JOB_NODELIST="n1", SLURM_JOB_ID="1", WORLD_SIZE="stays")
    export_ranks(place("Slurm"))
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    assert [os.environ[name] for name in names] == ["1", "stays", "1", "n1", "15001"]


def test_rank_0_serves_the_store_and_may_ask_for_it_again(environ):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environ(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]))
    first, again, other = (rank_store(place("submitit", rank)) for rank in (0, 0, 1))
    first.set("key", "value")
    assert again.get("key") == other.get("key") == b"value"


def test_rank_0_asks_the_store_of_torchruns_agent(environ):
    from torch.distributed import TCPStore

    served = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environ(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(served.port), TORCHELASTIC_USE_AGENT_STORE="True")
    rank_store(place("torchrun", 0)).set("key", "value")
    assert served.get("key") == b"value"


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr("nemo_dist_conf.composition.agreement.rendezvous._AT_ONCE_S", 0.2)


def test_rank_0_says_at_once_who_is_missing_and_after_the_timeout_what_to_type(environ, impatient, capfd):
    port = free_port()
    environ(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, SLURM_NTASKS="3")
    first, second = Launched(0, 3, 0, "Slurm"), Launched(1, 3, 1, "Slurm")
    store, other = rank_store(first), rank_store(second)
    waiting = threading.Thread(target=lambda: pytest.raises(ConfigError, all_have_come, second, other, 1))
    waiting.start()
    with pytest.raises(ConfigError) as error:
        all_have_come(first, store, 1)
    waiting.join()
    state = f"2 of 3 ranks have come to 127.0.0.1:{port}; missing: 2"
    assert capfd.readouterr().err == f"waiting: {state}\n"
    assert error.value.what == f"after 1 s: {state}" and error.value.asked == "SLURM_NTASKS=3"
    assert error.value.type.startswith("srun --ntasks=3 python ")


def test_ranks_that_all_come_are_told_nothing(environ, impatient, capfd):
    environ(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    places = [Launched(rank, 3, rank, "Slurm") for rank in range(3)]
    stores = [rank_store(place) for place in places]
    threads = [threading.Thread(target=all_have_come, args=(*pair, 30)) for pair in zip(places, stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert capfd.readouterr().err == ""


def test_a_rank_that_finds_nobody_says_whom_it_waits_for_and_where(environ, impatient, capsys, monkeypatch):
    from torch.distributed import DistNetworkError

    def nobody(*_, **__):
        time.sleep(0.5)
        raise DistNetworkError("timed out\nmore")

    port = free_port()
    environ(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    monkeypatch.setattr("torch.distributed.TCPStore", nobody)
    with pytest.raises(ConfigError) as error:
        rank_store(Launched(1, 2, 1, "Slurm"))
    assert capsys.readouterr().err == f"waiting: rank 1 of 2 waits for rank 0 at 127.0.0.1:{port}\n"
    assert error.value.what == f"rank 1 found nobody at 127.0.0.1:{port}: timed out"


def test_a_port_that_somebody_else_holds_is_named_with_another(environ):
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        held.listen()
        port = held.getsockname()[1]
        environ(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        with pytest.raises(ConfigError, match=f"rank 0 cannot serve the others at 127.0.0.1:{port}") as error:
            rank_store(Launched(0, 2, 0, "Slurm"))
    assert error.value.type == f"export MASTER_PORT={port + 1}"


def test_a_port_that_is_no_number_is_refused(environ):
    environ(MASTER_ADDR="127.0.0.1", MASTER_PORT="any")
    with pytest.raises(ConfigError, match="MASTER_PORT is not a port"):
        master_address(Launched(0, 2, 0, "torchrun"))
