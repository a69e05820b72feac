"""The launcher's options: what each does to torch elastic's own, and what is refused."""

import atexit
import dataclasses
import shlex
import socket
from typing import Any, Callable

import pytest
import yaml
from omegaconf import OmegaConf
from torch.distributed.elastic.multiprocessing import Std

from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.launch import settings as module
from nemo_dist_conf.launch.agent import _launch_config
from nemo_dist_conf.launch.nodes import Nodes
from nemo_dist_conf.launch.settings import read_settings
from nemo_dist_conf.schema.launcher import StartMethod, TorchrunConf

NODES = {"nnodes": 2, "rdzv_endpoint": "node0:29400"}


def read(**options):
    return read_settings({**vars(TorchrunConf()), **options})


def elastic(**options):
    settings = read(**options)
    return _launch_config(settings, settings.options.rdzv_endpoint or "", "job0", "logs")


def problems(**options):
    with pytest.raises(ConfigError) as error:
        read(**options)
    return error.value.problems


# Option -> a value, and what elastic is given for it.
PASSED_ON: dict[str, tuple[dict[str, Any], Callable[[Any], bool]]] = {
    "nproc_per_node": ({"nproc_per_node": 3}, lambda given: given.nproc_per_node == 3),
    "nnodes": (NODES, lambda given: (given.min_nodes, given.max_nodes) == (2, 2)),
    "rdzv_backend": (
        {**NODES, "rdzv_backend": "static", "node_rank": 1},
        lambda given: given.rdzv_backend == "static",
    ),
    "node_rank": (
        {**NODES, "rdzv_backend": "static", "node_rank": 1},
        lambda given: given.rdzv_configs["rank"] == 1,
    ),
    "rdzv_endpoint": (NODES, lambda given: given.rdzv_endpoint == "node0:29400"),
    "local_addr": ({"local_addr": "10.0.0.7"}, lambda given: given.local_addr == "10.0.0.7"),
    "max_restarts": ({"max_restarts": 2}, lambda given: given.max_restarts == 2),
    "monitor_interval_s": ({"monitor_interval_s": 2.5}, lambda given: given.monitor_interval == 2.5),
    "start_method": ({"start_method": StartMethod.spawn}, lambda given: given.start_method == "spawn"),
    "rdzv_timeout_s": ({"rdzv_timeout_s": 7}, lambda given: given.rdzv_configs["timeout"] == 7),
    "shutdown_timeout_s": ({"shutdown_timeout_s": 4}, lambda given: given.shutdown_timeout == 4),
    "tee": (
        {"nproc_per_node": 2, "tee": "0:1,1:3"},
        lambda given: given.logs_specs._tee == {0: Std.OUT, 1: Std.ALL},
    ),
}

# Shown elsewhere with real ranks: test_sweep.py and test_ends.py; rdzv_id below.
WITH_RANKS = {
    *("env", "threads_per_rank", "preload", "log_dir", "job_timeout_s", "on_failure", "on_invalid", "resume"),
    "rdzv_id",
}


@pytest.mark.parametrize("option", PASSED_ON)
def test_elastic_is_given_the_option_and_something_else_by_default(option, monkeypatch):
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "")
    words, shows = PASSED_ON[option]
    assert shows(elastic(**words))
    with pytest.raises((AssertionError, KeyError)):
        assert shows(elastic())


def test_every_option_is_tested():
    assert PASSED_ON.keys() | WITH_RANKS == {item.name for item in dataclasses.fields(TorchrunConf)}


def test_a_sweep_on_one_node_asks_for_any_free_port_and_keeps_to_this_machine():
    given = elastic()
    assert (given.rdzv_endpoint, given.local_addr) == ("localhost:0", "127.0.0.1")


def test_all_ranks_but_the_first_print_into_files():
    assert elastic(nproc_per_node=3).logs_specs._redirects == {1: Std.ALL, 2: Std.ALL}


def test_ranks_by_name(monkeypatch):
    monkeypatch.setattr(module, "_cores", lambda: 6)
    monkeypatch.setattr(module, "cuda_count", lambda: 0)
    assert read(nproc_per_node="auto").ranks == 6
    assert read(nproc_per_node="2").ranks == 2
    monkeypatch.setattr(module, "cuda_count", lambda: 4)
    assert read(nproc_per_node="auto").ranks == read(nproc_per_node="gpu").ranks == 4
    assert read(nproc_per_node="gpu", **NODES).world_size == 8


def test_threads_of_a_rank_are_those_asked_for_or_the_environments_or_its_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(module, "_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert read(nproc_per_node=3).threads == 2
    assert read(nproc_per_node=16).threads == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert read(nproc_per_node=3).threads == 5
    assert read(env={"OMP_NUM_THREADS": "6"}).threads == 6
    assert read(threads_per_rank=7).threads == 7


def test_a_config_is_checked_for_the_ranks_of_all_nodes_and_told_how_to_start_others():
    start = read(nproc_per_node=4, **NODES).start
    assert start.world_size == 8
    words = start.command.format(n=2, asked="a=1")
    assert words == "hydra.launcher.nnodes=1 hydra.launcher.nproc_per_node=2 a=1"
    assert read().start.command.format(n=2, asked="a=1") == "hydra.launcher.nproc_per_node=2 a=1"


STATIC = {"rdzv_backend": "static", "node_rank": 0}

# Bad options, and the words that the refusal tells to type instead.
REFUSED = [
    ({"nproc_per_node": 0}, "hydra.launcher.nproc_per_node=1"),
    ({"nproc_per_node": "many"}, "hydra.launcher.nproc_per_node=1"),
    ({"nproc_per_node": True}, "hydra.launcher.nproc_per_node=1"),
    ({"nproc_per_node": 1.5}, "hydra.launcher.nproc_per_node=1"),
    ({"nnodes": 0}, "hydra.launcher.nnodes=1"),
    ({"nnodes": 2}, "hydra.launcher.rdzv_endpoint=node0:29400"),
    ({"rdzv_endpoint": "http://node0"}, "hydra.launcher.rdzv_endpoint=node0:29400"),
    ({"rdzv_backend": "etcd"}, "hydra.launcher.rdzv_backend=c10d"),
    ({**STATIC, **NODES, "node_rank": None}, "hydra.launcher.node_rank=0"),
    ({**STATIC, **NODES, "node_rank": 2}, "hydra.launcher.node_rank=0"),
    ({**STATIC}, "hydra.launcher.rdzv_endpoint=localhost:29400"),
    ({**STATIC, "nnodes": 2, "rdzv_endpoint": "node0"}, "hydra.launcher.rdzv_endpoint=node0:29400"),
    ({"node_rank": 0}, "hydra.launcher.node_rank=null"),
    ({"max_restarts": -1}, "hydra.launcher.max_restarts=0"),
    ({"rdzv_timeout_s": 0}, "hydra.launcher.rdzv_timeout_s=1"),
    ({"shutdown_timeout_s": -1}, "hydra.launcher.shutdown_timeout_s=0"),
    ({"monitor_interval_s": 0.0}, "hydra.launcher.monitor_interval_s=0.1"),
    ({"threads_per_rank": 0}, "hydra.launcher.threads_per_rank=null"),
    ({"job_timeout_s": 0.0}, "hydra.launcher.job_timeout_s=null"),
    ({"tee": "all"}, "hydra.launcher.tee=3"),
    ({"tee": "0:4"}, "hydra.launcher.tee=3"),
    ({"tee": "0:1,2:3", "nproc_per_node": 2}, "hydra.launcher.tee=3"),
    ({"env": {"LOCAL_RANK": "0"}}, "the same without +hydra.launcher.env.LOCAL_RANK=0"),
    ({"preload": "torch"}, "'hydra.launcher.preload=[torch]'"),
    ({"preload": ["torch", "no_such_module"]}, "'hydra.launcher.preload=[torch]'"),
    ({"preload": ["no_such_package.module"]}, "'hydra.launcher.preload=[]'"),
    ({"preload": ["json"], "start_method": StartMethod.spawn}, "'hydra.launcher.preload=[torch]'"),
    ({"resume": "/no/such/folder"}, "hydra.launcher.resume=multirun/DATE/TIME"),
    ({"max_restart": 3}, "hydra.launcher.max_restarts=3"),
    ({"zzz": 3}, "the same without +hydra.launcher.zzz=3"),
]


@pytest.mark.parametrize(("words", "instead"), REFUSED, ids=str)
def test_a_bad_option_is_refused_with_what_to_type(words, instead):
    (problem,) = problems(**words)
    assert problem.instead == instead
    [asked] = (word.lstrip("+") for word in shlex.split(problem.asked))
    assert asked.split("=")[0] in problem.what or asked in problem.what
    assert [asked] != shlex.split(problem.instead)


# A key that is left out has no new value, and only the user knows the folder of a sweep.
TOLD = [case for case in REFUSED if not case[1].startswith(("the same without", "hydra.launcher.resume"))]


@pytest.mark.parametrize(("words", "instead"), TOLD, ids=str)
def test_what_a_refusal_tells_to_type_is_accepted(words, instead):
    [word] = shlex.split(instead)
    name, _, value = word.removeprefix("hydra.launcher.").partition("=")
    typed: Any = OmegaConf.merge(OmegaConf.structured(TorchrunConf), {name: yaml.safe_load(value)})
    read(**{key: given for key, given in words.items() if hasattr(TorchrunConf(), key)} | {name: typed[name]})


def test_all_bad_options_are_refused_at_once():
    found = problems(nproc_per_node=0, nnodes=0, max_restarts=-1, tee="x", preload=3, zzz=1)
    assert len(found) == 6


def test_a_gpu_is_not_made_up(monkeypatch):
    monkeypatch.setattr(module, "cuda_count", lambda: 0)
    (problem,) = problems(nproc_per_node="gpu")
    assert problem.what.endswith("finds no GPU on this machine")
    assert problem.instead == "hydra.launcher.nproc_per_node=auto"


def test_a_misspelt_option_is_told_the_nearest_first():
    (problem,) = problems(max_restart=3)
    assert problem.allowed.startswith("max_restarts, ") and "tee" in problem.allowed


def test_a_time_limit_needs_the_main_thread():
    from concurrent.futures import ThreadPoolExecutor

    assert read(job_timeout_s=2.0).options.job_timeout_s == 2.0
    with ThreadPoolExecutor(1) as pool, pytest.raises(ConfigError, match="main thread"):
        pool.submit(read, job_timeout_s=2.0).result()


def test_sweeps_with_names_of_their_own_share_an_endpoint():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        endpoint = f"localhost:{free.getsockname()[1]}"
    nodes = [Nodes(read(nnodes=2, rdzv_endpoint=endpoint, rdzv_id=name)) for name in ("a", "a", "b")]
    for node in nodes:
        atexit.unregister(node._leave)
    assert [node.number for node in nodes] == [0, 1, 0]
    assert nodes[0].agree("word", lambda: "of a") == nodes[1].agree("word", lambda: "ignored") == "of a"
    assert nodes[2].agree("word", lambda: "of b") == "of b"
    with pytest.raises(ConfigError, match="2 nodes have joined the sweep 'a'") as error:
        Nodes(read(nnodes=2, rdzv_endpoint=endpoint, rdzv_id="a"))
    assert error.value.type == "hydra.launcher.rdzv_id=a2"
