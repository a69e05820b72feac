"""The jobs of a sweep, each composed once and checked before the first starts."""

import pickle
import shlex

import pytest
from hydra import initialize
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from nemo_dist_conf.composition.check import check, find_roots
from nemo_dist_conf.composition.sweep_check import SweepRefused, compose_jobs, jobs_of_basic_sweep, judge, refusal
from nemo_dist_conf.errors import ConfigError, Problem
from nemo_dist_conf.topology.launched_ranks import Start, about_to_start

START = Start(2, "launch {n} {asked}")


@pytest.fixture(scope="module")
def sweep():
    """The config of a sweep with these words."""
    with initialize(None, version_base="1.3"):

        def load(*words):
            loader = GlobalHydra.instance().config_loader()
            return loader.load_configuration("nemo_dist_conf", list(words), RunMode.MULTIRUN)

        yield load


def checked(config):
    return next((check(root) for root in find_roots(config)), None)


def judged(sweep, *words):
    jobs = compose_jobs(sweep(), [word.split() for word in words])
    with about_to_start(START):
        return judge(jobs, checked)


def test_each_job_is_composed_with_its_overrides_number_and_hydras_node(sweep):
    jobs = compose_jobs(sweep("hydra.sweep.dir=here"), [["strategy=ddp"], ["parallelism.tp_size=2"]], first=3)
    assert [job.number for job in jobs] == [job.config.hydra.job.num for job in jobs] == [3, 4]
    assert [job.config.parallelism.tp_size for job in jobs] == [1, 2]
    assert "ddp" in jobs[0].config.strategy._target_.lower() and jobs[0].config.hydra.sweep.dir == "here"
    assert jobs[1].config.hydra.overrides.task == ["parallelism.tp_size=2"]


def test_the_words_of_a_job_leave_hydras_own_out(sweep):
    (job,) = compose_jobs(sweep(), [["hydra.job.name=x", "strategy=ddp", "parallelism.tp_size=1"]])
    assert job.words == "strategy=ddp parallelism.tp_size=1"


def test_jobs_of_hydras_own_sweeper_are_known_before_it_runs(sweep):
    master = sweep("strategy=ddp,fsdp2", "+n=range(0,2)", "+name=x")
    assert jobs_of_basic_sweep(master) == [
        ["strategy=ddp", "+n=0", "+name=x"],
        ["strategy=ddp", "+n=1", "+name=x"],
        ["strategy=fsdp2", "+n=0", "+name=x"],
        ["strategy=fsdp2", "+n=1", "+name=x"],
    ]


def test_so_are_those_of_its_params_and_of_its_batches(sweep):
    master = sweep("hydra.sweeper.max_batch_size=1", "+n=1")
    master.hydra.sweeper.params = {"strategy": "ddp,fsdp2"}  # as an app's config does
    assert jobs_of_basic_sweep(master) == [["strategy=ddp", "+n=1"], ["strategy=fsdp2", "+n=1"]]


def test_a_sweeper_that_decides_as_it_goes_has_none(sweep):
    master = sweep("strategy=ddp,fsdp2")
    OmegaConf.update(master, "hydra.sweeper._target_", "somewhere.OptunaSweeper")
    assert jobs_of_basic_sweep(master) == []


def test_a_job_has_its_layout_or_every_reason_why_not(sweep):
    good, bad = judged(sweep, "strategy=fsdp2", "strategy=ddp parallelism.tp_size=2 parallelism.cp_size=2")
    assert (good.layout, good.refused) == ("dp_shard 2", ())
    assert bad.layout == "" and {problem.what.split(" is not")[0] for problem in bad.refused} >= {
        "strategy=ddp: tp_size=2",
        "strategy=ddp: cp_size=2",
    }


def test_a_job_of_an_app_without_our_groups_is_not_judged():
    jobs = judge([*_plain_jobs()], lambda config: None)
    assert [(job.layout, job.refused) for job in jobs] == [("", ()), ("", ())]


def test_each_job_is_judged_by_the_check_of_its_own_config():
    def no_odd(config):
        if config.n % 2:
            raise ConfigError(Problem(what="odd", asked=f"n={config.n}", allowed="even", instead="n=0"))

    jobs = judge([*_plain_jobs()], of=lambda config: no_odd)
    assert [len(job.refused) for job in jobs] == [0, 1]


def _plain_jobs():
    from nemo_dist_conf.composition.sweep_check import Job

    return (Job(n, [f"n={n}"], OmegaConf.create({"n": n})) for n in range(2))


def test_one_text_tells_of_all_that_cannot_work_and_what_can(sweep):
    jobs = judged(sweep, "strategy=ddp parallelism.tp_size=2", "strategy=fsdp2", "strategy=ddp parallelism.cp_size=2")
    problem = refusal(jobs, "skip=them")
    lines = problem.what.splitlines()
    assert lines[0] == "2 of 3 jobs cannot work, so none was started"
    assert lines[1] == "#0 strategy=ddp parallelism.tp_size=2" and "#2 strategy=ddp parallelism.cp_size=2" in lines
    assert "    type     strategy=fsdp2 parallelism.tp_size=2" in lines
    assert (problem.asked, problem.allowed, problem.instead) == ("a sweep of 3 jobs", "strategy=fsdp2", "skip=them")


def test_a_long_list_of_what_works_is_cut(sweep):
    jobs = judged(sweep, *["strategy=fsdp2"] * 7, "strategy=ddp parallelism.tp_size=2")
    assert refusal(jobs, "skip").allowed == "; ".join(["strategy=fsdp2"] * 5) + "; 2 more"


def test_where_the_launcher_cannot_skip_a_job_that_works_is_offered(sweep):
    jobs = judged(sweep, "strategy=ddp parallelism.tp_size=2", "strategy=fsdp2", "strategy=ddp")
    assert refusal(jobs, None).instead == "strategy=fsdp2"


def test_where_none_works_skipping_is_not_offered(sweep):
    jobs = judged(sweep, "strategy=ddp parallelism.tp_size=2")
    problem = refusal(jobs, "skip=them")
    assert problem.allowed == "none of them" and problem.instead == "strategy=fsdp2 parallelism.tp_size=2"


def test_a_refused_sweep_is_its_problems_and_can_be_sent_to_another_process():
    error = SweepRefused(
        Problem(what="one", asked="a", allowed="b", instead="c"),
        Problem(what="two", asked="a", allowed="b", instead="c"),
    )
    assert str(error) == "one\n  asked    a\n  allowed  b\n  type     c\ntwo\n  asked    a\n  allowed  b\n  type     c"
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is SweepRefused and again.problems == error.problems


LONG = "hydra.sweep.subdir='${hydra.job.num}-${x}'"


def test_a_folder_name_that_the_file_system_does_not_take_is_refused_before_anything_starts(sweep, tmp_path):
    master = sweep(f"hydra.sweep.dir={tmp_path}/new/sweep", LONG)
    jobs = judge(compose_jobs(master, [["+x=b"], [f"+x={'c' * 260}"], [f"+x='{'ü' * 130}'"]]), lambda config: None)
    assert [len(job.refused) for job in jobs] == [0, 1, 1]
    problem = jobs[1].refused[0]
    assert problem.what == "the name of the output folder has 262 bytes, and the file system takes 255"
    assert shlex.split(f"{problem.asked} {problem.instead}") == shlex.split(
        f"{LONG} hydra.sweep.subdir='${{hydra.job.num}}'"
    )
    assert "has 262 bytes" in jobs[2].refused[0].what
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_not_asked_for_a_place_to_make_it(sweep, tmp_path, monkeypatch):
    """A job may have its folder below one that is not its own."""
    monkeypatch.setattr("os.access", lambda *_: False)
    (tmp_path / "own").mkdir()
    master = sweep(f"hydra.sweep.dir={tmp_path}/own", "hydra.sweep.subdir=.")
    assert not judge(compose_jobs(master, [["+x=b"]]), lambda config: None)[0].refused
    master = sweep(f"hydra.sweep.dir={tmp_path}/new", "hydra.sweep.subdir=.")
    (problem,) = judge(compose_jobs(master, [["+x=b"]]), lambda config: None)[0].refused
    assert problem.what == f"the output folder cannot be made: nothing may be written in {tmp_path}"
