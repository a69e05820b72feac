"""However a job ends, no rank outlives it, and the sweep tells which rank ended it and why."""

import re
import signal
from pathlib import Path

import pytest

from tests.launch.program import TORCHRUN, Program, end, is_running, started_by, wait_for

pytestmark = [pytest.mark.dist, pytest.mark.slow]

SIGNALS = [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    """Makes a program in a new folder."""
    return lambda: Program(tmp_path_factory.mktemp("app"))


def pids(program, folder):
    return [int(text) for text in program.read(f"{folder}/pid.*").values() if text]


def assert_gone(ranks):
    wait_for(lambda: not any(is_running(pid) for pid in ranks), seconds=10.0)


@pytest.mark.parametrize(
    ("start_method", "signals"), [("forkserver", SIGNALS), ("spawn", SIGNALS[:1]), ("fork", SIGNALS[:1])]
)
def test_a_launcher_that_is_stopped_or_killed_leaves_no_process(new, start_method, signals):
    """However its ranks were started; what it does about a signal that it can catch does not depend on that."""
    program = new()
    (program.folder / "wait").touch()
    words = ["-m", *TORCHRUN, f"hydra.launcher.start_method={start_method}", "do=wait,write"]
    running = {number: program.start(*words, f"hydra.sweep.dir={number.name}") for number in signals}
    for number, process in running.items():
        ranks = wait_for(lambda: len(found := pids(program, f"{number.name}/0")) == 2 and found)
        assert set(ranks) <= set(started_by(process)) and all(is_running(pid) for pid in ranks)
        out, err = end(process, number)
        wait_for(lambda: not started_by(process), seconds=10.0)
        if number is signal.SIGKILL:
            assert process.returncode == -number and not program.read(f"{number.name}/sweep.md")
            continue
        assert process.returncode == 128 + number, out + err
        assert f"stopped by {number.name}; to go on: hydra.launcher.resume={number.name}\n" in err
        assert "Traceback" not in err
        records = program.records(number.name)
        assert [records[job]["status"] for job in (0, 1)] == ["interrupted", "not started"]


@pytest.fixture(scope="module")
def failing(new):
    """Jobs that end in several ways, in a sweep that goes on."""
    program = new()
    ways = "do=kill,raise,exit3,exit0,lock,write,no_number,infinite"
    return program, program.sweep(ways, "hydra.launcher.on_failure=continue")


class TestJobsThatEndInTheirOwnWay:
    def test_the_sweep_goes_on_after_each_and_ends_with_1(self, failing):
        program, done = failing
        assert done.returncode == 1, done.stdout + done.stderr
        status = {job: record["status"] for job, record in program.records().items()}
        assert status == dict(enumerate(["failed"] * 3 + ["completed"] * 3 + ["failed"] * 2))
        events = program.read("events.txt")["events.txt"]
        assert events.count("on_job_end") == 8 and events.count("on_multirun_end") == 1

    def test_a_killed_rank_is_told_with_its_signal(self, failing):
        program, done = failing
        assert program.records()[0]["reason"] == "rank 1: was killed by SIGKILL"
        log_file = program.folder / "sweep/0/app.rank1.log"
        assert f"job #0 failed: do=kill\n  rank 1: was killed by SIGKILL\n  its log      {log_file}\n" in done.stdout

    def test_an_exception_is_told_with_its_rank_traceback_and_log_file(self, failing):
        program, done = failing
        report = done.stdout[done.stdout.index("job #1 failed: do=raise") : done.stdout.index("#2 : do=exit3")]
        assert "\n  rank 1: ValueError: not on rank 1\n" in report
        trace = re.search(r'Traceback \(most recent call last\):\n    File "(.*)", line \d+, in main\n', report)
        assert trace is not None
        assert trace[1] == str(program.folder / "app.py")  # no frames of ours before the task function
        found = re.search(r"  its log      (.*)\n", report)
        assert found is not None
        log_file = found[1]
        assert log_file == str(program.folder / "sweep/1/app.rank1.log")
        assert "logged by rank 1" in Path(log_file).read_text()

    def test_an_exit_with_a_status_is_a_failure_and_one_with_0_is_none(self, failing):
        program, done = failing
        records = program.records()
        assert re.fullmatch(r"rank [01]: RankExit: exited with status 3", records[2]["reason"])
        assert records[3]["value"] is None
        report = done.stdout[done.stdout.index("job #2 failed") : done.stdout.index("#3 : do=exit0")]
        assert "Traceback" not in report

    def test_a_value_that_cannot_be_sent_is_told_and_left_out(self, failing):
        program, done = failing
        assert "the job's value, a lock, cannot be sent to the sweeper: cannot pickle" in done.stdout
        assert program.records()[4]["value"] is None and program.records()[5]["value"] == 0

    def test_a_value_that_is_not_finite_is_no_value(self, failing):
        program, done = failing
        reasons = [program.records()[job]["reason"] for job in (6, 7)]
        assert reasons == [f"rank 0: returned (1.0, {word}), which no sweeper can compare" for word in ("nan", "-inf")]
        assert program.records()[6]["value"] is None and "job #6 failed: do=no_number\n" in done.stdout


def test_by_default_the_first_failed_job_ends_the_sweep(new):
    program = new()
    done = program.sweep("do=raise,write", "hydra.launcher.start_method=fork")
    assert done.returncode == 1
    assert done.stderr.startswith("job #0 failed: do=raise\n  rank 1: ValueError: not on rank 1\n  Traceback")
    records = program.records()
    assert [records[job]["status"] for job in (0, 1)] == ["failed", "not started"]
    assert re.search(r"^1 +do=write +dp_shard 2 +not started$", done.stdout, re.MULTILINE)


def test_ranks_are_started_again_after_one_was_killed(new):
    program = new()
    done = program.sweep("do=kill_once", "hydra.launcher.max_restarts=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert program.records()[0]["status"] == "completed" and program.records()[0]["value"] == 0
    assert "a rank failed; the ranks are started again (1 of 1)" in done.stdout
    names = [name.rpartition("/")[2] for name in program.read("sweep/0/pid.*")]
    assert names == ["pid.0.0", "pid.0.1", "pid.1.0", "pid.1.1"]
    first = [int(text) for text in program.read("sweep/0/pid.*.0").values()]
    assert_gone(first)
    (written,) = set(program.read("sweep/0/written.*").values())
    assert "${random" not in written


def test_a_job_that_hangs_ends_after_its_time_and_leaves_its_stacks_in_its_log(new):
    program = new()
    done = program.sweep("do=hang", "hydra.launcher.job_timeout_s=12", "hydra.launcher.start_method=fork")
    assert done.returncode == 1
    assert done.stderr.startswith("job #0 failed: do=hang\n  took longer than 12 s (hydra.launcher.job_timeout_s)\n")
    for name in ("app.log", "app.rank1.log"):
        (text,) = program.read(f"sweep/0/{name}").values()
        assert re.search(r'File ".*/app.py", line \d+ in a_place_to_hang\n  File ".*/app.py", line \d+ in main\n', text)
    assert_gone(pids(program, "sweep/0"))
    assert 12 <= program.records()[0]["seconds"] < 60


def test_a_job_without_logging_files_runs_and_fails_with_the_folder_of_what_it_printed(new):
    program = new()
    options = ["hydra.launcher.on_failure=continue", "hydra.launcher.start_method=fork"]
    done = program.sweep("do=write,raise", "hydra/job_logging=disabled", *options)
    assert done.returncode == 1, done.stdout + done.stderr
    records = program.records()
    assert [records[job]["status"] for job in (0, 1)] == ["completed", "failed"]
    assert records[1]["reason"] == "rank 1: ValueError: not on rank 1"
    assert not program.read("sweep/*/*.log")
    assert f"its log      {program.folder / 'sweep/1/ranks'}" in done.stdout + done.stderr
