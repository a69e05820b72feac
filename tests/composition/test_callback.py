"""The callback that comes with a strategy: it ends a wrong run with the message alone, and lets ranks agree."""

import inspect
import os
import shlex
import socket
import subprocess
import sys
import textwrap
from typing import Any

import hydra
import pytest
from omegaconf import OmegaConf

from nemo_dist_conf.composition.callback import DistributedCallback, check_of
from nemo_dist_conf.composition.groups import register_resolvers

#: Hydra 1.4: what the app lets Hydra call. Without a whitelist everything is let, with a warning for each.
HAS_WHITELIST = "execution_whitelist" in inspect.signature(hydra.main).parameters
OPTIONS = {False: "" if HAS_WHITELIST else 'version_base="1.3"', True: 'execution_whitelist=["app.*", "mine.*"]'}

APP = """
    import hydra

    @hydra.main({options}{comma}config_path={path}, config_name={base})
    def main(cfg):
        print("the task ran")
        if "refuses" in cfg:
            from nemo_dist_conf.errors import ConfigError, Problem
            raise ConfigError(Problem(what="in main", asked="this", allowed="that", instead="other"))

    if __name__ == "__main__":
        main()
"""


@pytest.fixture(params=list(OPTIONS)[: 1 + HAS_WHITELIST], ids=lambda listed: "whitelist" if listed else "plain")
def app(tmp_path, request):
    """Runs it; any warning of Hydra or ours is an error."""

    def run(*words, base="nemo_dist_conf", path=None, warnings="error", by=(), **env):
        options = OPTIONS[request.param]
        text = APP.format(options=options, comma=", " if options else "", base=repr(base), path=repr(path))
        (tmp_path / "app.py").write_text(textwrap.dedent(text))
        environ = {name: value for name, value in os.environ.items() if not name.startswith("HYDRA_")}
        environ |= {"PYTHONWARNINGS": f"{warnings}::UserWarning", **env}  # of the ranks, too
        command = [sys.executable, *by, "app.py", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environ)

    return run


def test_a_good_config_runs(app):
    done = app("strategy=ddp")
    assert (done.returncode, done.stdout) == (0, "the task ran\n"), done.stderr


def test_a_wrong_one_ends_with_the_message_and_leaves_no_folder(app, tmp_path):
    done = app("strategy=ddp", "parallelism.tp_size=2")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("strategy=ddp: tp_size=2 is not possible\n") and "Traceback" not in done.stderr
    assert "torchrun --nproc-per-node 2 app.py strategy=fsdp2 parallelism.tp_size=2" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_it_is_there_under_the_namespaced_names_too(app):
    done = app("+nemo_dist@dist=nemo_dist_conf", "nemo_dist/strategy@dist.strategy=ddp", "dist.parallelism.tp_size=2")
    assert done.returncode == 1 and "dist.parallelism.tp_size=2" in done.stderr


def test_a_sweep_with_a_job_that_cannot_work_is_refused_before_the_first_starts(app, tmp_path):
    done = app("-m", "strategy=fsdp2,ddp", "parallelism.dp_replicate_size=1,2")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith("2 of 4 jobs cannot work, so none was started\n#1 strategy=fsdp2 parallelism.dp_rep")
    assert "#3 strategy=ddp parallelism.dp_replicate_size=2" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "multirun").exists()


def test_a_sweep_of_jobs_that_work_runs_under_hydras_own_launcher(app):
    done = app("-m", "strategy=fsdp2,ddp")
    assert (done.returncode, done.stdout.count("the task ran")) == (0, 2), done.stderr


def test_a_launcher_without_a_sweep_is_not_ignored(app):
    done = app("hydra/launcher=torchrun", "strategy=ddp")
    assert done.returncode == 1 and done.stdout == ""
    assert "type     python app.py -m hydra/launcher=torchrun strategy=ddp" in done.stderr


def test_a_sweeper_without_a_sweep_is_not_ignored(app):
    done = app("hydra/sweeper=layouts", "hydra.sweeper.top=1", "strategy=ddp")
    assert done.returncode == 1 and done.stdout == ""
    assert "type     python app.py -m hydra/sweeper=layouts hydra.sweeper.top=1 strategy=ddp\n" in done.stderr


def test_an_option_that_is_not_there_is_told_once_in_a_sweep(app):
    done = app("-m", "strategy=ddp,fsdp3")
    assert done.returncode == 1 and done.stderr.count("Could not find 'strategy/fsdp3'") == 1, done.stderr


def first_of_two_ranks():
    """Variables of rank 0 of two; it needs no answer of the other one before the task runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def test_an_app_without_our_groups_is_not_warned_whatever_it_lets_hydra_call(app):
    done = app(base=None)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the task ran\n", "")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("base", [None, "nemo_dist_conf"])
def test_no_rank_of_an_app_is_warned_whatever_it_lets_hydra_call(app, base):
    done = app(base=base, by=TORCHRUN)
    shown = done.stdout.replace("\n", "")  # both ranks may write before either ends its line
    assert (done.returncode, shown, done.stderr) == (0, 2 * "the task ran", "")


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.skipif(not HAS_WHITELIST, reason="tests/launch sweeps with Hydra 1.3 many times")
def test_no_rank_of_a_sweep_is_warned_whatever_the_app_lets_hydra_call(app):
    """Of two ranks the first is shown."""
    done = app("-m", "hydra/launcher=torchrun", "hydra.launcher.nproc_per_node=2", "+x=1", base=None)
    assert (done.returncode, done.stdout.count("the task ran\n"), done.stderr) == (0, 1, "")


def test_a_sweep_of_an_app_without_our_groups_in_every_rank_is_left_to_it(app):
    done = app("-m", "+x=1,2", base=None, **first_of_two_ranks())
    assert (done.returncode, done.stdout.count("the task ran"), done.stderr) == (0, 2, "")


@pytest.mark.parametrize("base", [None, "nemo_dist_conf"])
def test_ranks_that_cannot_meet_go_on_only_without_our_groups(app, base):
    """They would run without us, too."""
    done = app(base=base, **first_of_two_ranks() | {"MASTER_PORT": "none"})
    assert "MASTER_PORT is not a port" in (done.stdout if base is None else done.stderr)
    assert (done.returncode, "the task ran" in done.stdout) == ((0, True) if base is None else (1, False))


def test_nothing_is_said_to_an_app_without_our_groups_whose_ranks_are_not_to_meet(app):
    variables = first_of_two_ranks()
    del variables["MASTER_ADDR"], variables["MASTER_PORT"]
    done = app(base=None, **variables)
    assert (done.returncode, done.stdout, done.stderr) == (0, "the task ran\n", "")


def test_hydras_node_can_be_shown_resolved(app):
    done = app("strategy=ddp", "--cfg", "hydra", "--resolve")
    assert done.returncode == 0 and "nemo_dist_conf: nemo_dist_conf.hooks.DistributedCallback\n" in done.stdout


EXTENDED = """
defaults: [nemo_dist_conf, _self_]
size: 1
hydra: {callbacks: {nemo_dist_conf: {_target_: mine.Mine, most: 2}}}
"""
MINE = """
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.composition.groups import register_resolvers
from nemo_dist_conf.composition.callback import DistributedCallback


class Mine(DistributedCallback):
    def __init__(self, most):
        self.most = most

    def check(self, config):
        if config.size > self.most:
            most, size = f"{self.most}", f"size={config.size}"
            raise ConfigError(Problem(what="too large", asked=size, allowed=most, instead=f"size={self.most}"))
        return super().check(config)
"""


@pytest.mark.parametrize("app", [False], indirect=True, ids=["plain"])
def test_an_app_may_put_its_own_in_the_place_of_the_callback(app, tmp_path):
    (tmp_path / "config.yaml").write_text(EXTENDED)
    (tmp_path / "mine.py").write_text(MINE)
    its_own = {"base": "config", "path": ".", "warnings": "default"}  # Hydra 1.4 warns of the app's own target
    done = app("size=3", **its_own)
    assert done.returncode == 1 and "too large\n" in done.stderr
    done = app("size=2", "parallelism.tp_size=2", **its_own)
    assert done.returncode == 1 and "parallelism.tp_size=2" in done.stderr
    assert app("size=2", **its_own).returncode == 0


def test_other_callbacks_of_an_app_are_no_check():
    """A function makes them as well as a class."""
    register_resolvers()
    others = {"class": {"_target_": "operator.methodcaller", "name": "x"}, "function": {"_target_": "builtins.len"}}
    callbacks = {**others, "nemo_dist_conf": "${nemo_dist.callback:}"}
    check: Any = check_of(OmegaConf.create({"hydra": {"callbacks": callbacks}}))
    assert isinstance(check.__self__, DistributedCallback)


def test_a_refusal_in_the_apps_own_main_function_is_the_message_alone(app):
    done = app("+refuses=1")
    assert (done.returncode, done.stdout) == (1, "the task ran\n")
    assert done.stderr == "in main\n  asked    this\n  allowed  that\n  type     other\n"


def test_hydras_switch_still_shows_everything(app):
    done = app("+refuses=1", HYDRA_FULL_ERROR="1")
    assert done.returncode == 1 and "Traceback" in done.stderr and "in main\n  asked    this" in done.stderr


def test_a_sweep_decides_itself_about_a_job_that_refuses(app):
    done = app("-m", "+refuses=1,2")
    assert done.returncode == 1 and "ConfigError: in main" in done.stderr


def test_a_folder_name_that_is_too_long_is_refused_with_another(app, tmp_path):
    words = [f"+a={'v' * 150}", f"+b={'w' * 150}"]
    done = app("hydra.run.dir='runs/${a}${b}'", *words)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("the name of the output folder has 300 bytes, and the file system takes 255\n")
    instead = shlex.split(done.stderr.partition("  type ")[2])
    assert not (tmp_path / "runs").exists() and app(*instead, *words).returncode == 0


@pytest.mark.parametrize("app", [False], indirect=True, ids=["plain"])
def test_a_folder_below_a_file_is_refused_with_another(app, tmp_path):
    (tmp_path / "taken").write_text("")
    done = app("hydra.run.dir=taken/here", "strategy=ddp")
    assert done.returncode == 1 and "Traceback" not in done.stderr and "taken is a file" in done.stderr
    assert "type     'hydra.run.dir=outputs/" in done.stderr


def test_a_callback_of_the_apps_own_composes_the_jobs_of_a_sweep(app, tmp_path):
    """While Hydra calls its callbacks, its node is composed, and what stands in our place there is merged over ours."""
    (tmp_path / "config.yaml").write_text(EXTENDED)
    (tmp_path / "mine.py").write_text(MINE)
    done = app("-m", "size=1,3", base="config", path=".", warnings="default")
    assert done.returncode == 1 and done.stderr.count("1 of 2 jobs cannot work, so none was started\n#1 size=3\n") == 1
