"""The callback that comes with a strategy: it ends a wrong run with the message alone, and lets ranks agree."""

import subprocess
import sys
import textwrap

import pytest

APP = """
    import hydra

    @hydra.main(version_base="1.3", config_path=None, config_name="{base}")
    def main(cfg):
        print("the task ran")

    if __name__ == "__main__":
        main()
"""


@pytest.fixture
def app(tmp_path):
    def run(*words, base="nemo_dist_conf"):
        (tmp_path / "app.py").write_text(textwrap.dedent(APP.format(base=base)))
        # Hydra 1.4 warns of version_base, which 1.3 needs, and of callbacks outside its list of trusted modules
        python = [sys.executable, "-W", "ignore:The version_base", "-W", "ignore:hydra.utils.instantiate() resolved"]
        return subprocess.run([*python, "app.py", *words], cwd=tmp_path, capture_output=True, text=True)

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
