"""Sweeps on real ranks: one config for all of them, one folder a job, a record of each, and going on later."""

import json
import re

import pytest
import yaml

from tests import warm
from tests.launch.program import APP, TORCHRUN, Program, end, wait_for

pytestmark = [pytest.mark.dist, pytest.mark.slow]

TORCHRUN_4 = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4")


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    """Makes a program in a new folder."""
    return lambda app=APP: Program(tmp_path_factory.mktemp("app"), app)


def assert_ranks_agree(program, folder, ranks=4):
    """As written the trees are the same bytes; as read they differ where a rank's own variable is asked for."""
    files = {name.rpartition("/")[2]: text for name, text in program.read(f"{folder}/*").items()}
    assert {name for name in files if name.startswith("written")} == {f"written.{rank}" for rank in range(ranks)}
    (written,) = {files[f"written.{rank}"] for rank in range(ranks)}
    assert "mine: gpu${oc.env:LOCAL_RANK,none}\n" in written and "size: ${late.size}\n" in written
    assert "${random" not in written
    trees = [yaml.safe_load(files[f"read.{rank}"]) for rank in range(ranks)]
    assert [tree.pop("mine") for tree in trees] == [f"gpu{rank}" for rank in range(ranks)]
    assert all(tree == trees[0] for tree in trees)
    assert trees[0]["follows"]["folder"].endswith(f"/{folder}/x")
    return trees[0]


def assert_one_place_for_a_job(program, folder, shown, ranks=4):
    names = {name.removeprefix(f"{folder}/") for name in program.read(f"{folder}/**/*")}
    assert {".hydra/config.yaml", ".hydra/hydra.yaml", ".hydra/overrides.yaml"} <= names
    logs = program.read(f"{folder}/*.log")
    assert {name.rpartition("/")[2] for name in logs} == {"app.log"} | {f"app.rank{r}.log" for r in range(1, ranks)}
    for name, text in logs.items():
        rank = re.search(r"rank(\d)", name)
        assert text.count("logged by rank") == 1
        assert f"[__main__][INFO] - logged by rank {rank[1] if rank else 0}\n" in text
    assert "logged by rank 0" in shown and not re.search("logged by rank [1-9]", shown)
    outputs = {yaml.safe_load(text)["runtime"]["output_dir"] for text in program.read(f"{folder}/hydra.*").values()}
    assert outputs == {str(program.folder / folder)}


@pytest.fixture(scope="module")
def twenty(new):
    program = new()
    done = program.sweep("hydra.launcher.nproc_per_node=4", "n=range(0,20)")
    assert done.returncode == 0, done.stdout + done.stderr
    return program, done


class TestTwentyJobsOnFourRanks:
    def test_the_ranks_of_each_agree_and_the_jobs_differ(self, twenty):
        program, _ = twenty
        trees = [assert_ranks_agree(program, f"sweep/{job}") for job in range(20)]
        assert [tree["n"] for tree in trees] == list(range(20))
        assert len({tree["seed"] for tree in trees}) == len({tree["name"] for tree in trees}) == 20
        assert all(re.fullmatch(r"run-\d+-\d\d-\d\d-\d\d-\d{6}", tree["name"]) for tree in trees)

    def test_each_has_one_folder_a_log_file_a_rank_and_rank_0_on_the_console(self, twenty):
        program, done = twenty
        for job in range(20):
            assert_one_place_for_a_job(program, f"sweep/{job}", done.stdout)
        assert done.stdout.count("printed by rank 0") == done.stdout.count("logged by rank 0") == 20
        assert "printed by rank 1" not in done.stdout and done.stderr == ""
        assert len(program.read("sweep/**/multirun.yaml")) == len(program.read("**/sweep.jsonl")) == 1

    def test_the_resolved_tree_lies_beside_hydras_files(self, twenty):
        program, _ = twenty
        noted = yaml.safe_load(program.read("sweep/7/.hydra/resolved.yaml").popitem()[1])
        assert noted.pop("mine") == "gpu${oc.env:LOCAL_RANK,none}"
        read = yaml.safe_load(program.read("sweep/7/read.0").popitem()[1])
        assert noted == {key: value for key, value in read.items() if key != "mine"}

    def test_callbacks_are_called_once_and_by_the_launcher(self, twenty):
        program, _ = twenty
        lines = program.read("events.txt")["events.txt"].splitlines()
        jobs = ["on_job_start", "on_job_end"] * 20
        assert [line.split()[0] for line in lines] == ["on_multirun_start", *jobs, "on_multirun_end"]
        assert len({line.split()[1] for line in lines}) == 1

    def test_the_value_of_a_job_is_what_rank_0_returns(self, twenty):
        program, done = twenty
        records = program.records()
        assert [records[job]["value"] for job in range(20)] == list(range(20))  # rank r returns n + r
        assert {record["status"] for record in records.values()} == {"completed"}
        assert {(record["ranks"], record["layout"]) for record in records.values()} == {(4, "dp_shard 4")}
        assert re.search(r"^19 +n=19 +dp_shard 4 +completed +19 +\d+\.\d +19$", done.stdout, re.MULTILINE)


@pytest.mark.parametrize("attempt", range(3))
def test_four_ranks_that_torchrun_started_agree_and_share_a_folder(new, attempt):
    program = new()
    if attempt:
        done = warm.run(["torchrun", "--nproc-per-node", "4", "app.py"], cwd=program.folder)
    else:
        done = program.run(launcher=TORCHRUN_4)
    assert done.returncode == 0, done.stderr
    (folder,) = {name.rpartition("/")[0] for name in program.read("outputs/**/written.*")}
    assert_ranks_agree(program, folder)
    assert_one_place_for_a_job(program, folder, done.stdout + done.stderr)


EFFECTS = """
    import gc, json, multiprocessing, os, sys
    MODELS = sorted(name.rpartition(".")[2] for name in sys.modules if ".modeling_" in name and "models" in name)
    import hydra
    import imported
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    @hydra.main(version_base="1.3", config_path=".", config_name="config")
    def main(cfg):
        import torch
        cfg.late.size = 97
        seen = {
            "follows": OmegaConf.to_container(cfg.follows, resolve=True), "main_only": cfg.get("main_only"),
            "env": os.environ.get("MINE"), "env_set": os.environ.get("SET"),
            "folder": os.getcwd(), "argv": sys.argv[1:2],
            "threads": [torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]],
            "in_rank": imported.PID == os.getpid(), "models": MODELS, "frozen": gc.get_freeze_count(),
        }
        with open(os.path.join(HydraConfig.get().runtime.output_dir, "seen." + os.environ["RANK"]), "w") as file:
            json.dump(seen, file)
        print("out", os.environ["RANK"])
        print("err", os.environ["RANK"], file=sys.stderr)

    if __name__ == "__main__":
        OmegaConf.register_new_resolver("here", lambda word: f"{word} of the launcher")
        main()
"""


@pytest.fixture(scope="module")
def effects(new):
    program = new(EFFECTS)
    (program.folder / "imported.py").write_text("import os\n\nPID = os.getpid()\n")
    return program


def seen(program, job):
    return [json.loads(text) for text in program.read(f"{job}/seen.*").values()]


def test_options_that_change_the_surroundings_of_ranks(effects):
    """env, threads_per_rank, preload, tee and log_dir of the launcher; env_set and chdir of Hydra; the job's model,
    whose modules are there before a rank begins.
    """
    words = ["+hydra.launcher.env.MINE=of-launcher", "+hydra.job.env_set.SET=of-job", "hydra.job.chdir=true"]
    words += ["hydra.launcher.preload=[torch,imported]", "hydra.launcher.threads_per_rank=2"]
    words += ["hydra.launcher.tee='1:3'", "hydra.launcher.log_dir=printed"]
    words += ["+model.config.model_type=llama", "+main_only='${here:answer}'"]
    done = effects.sweep(*words, fresh=True, PYTHONPATH=str(effects.folder))
    assert done.returncode == 0, done.stdout + done.stderr
    for one in seen(effects, "sweep/0"):
        assert {"modeling_auto", "modeling_llama"} <= set(one["models"]) and one["frozen"] > 100_000
        assert (one["env"], one["env_set"], one["folder"]) == ("of-launcher", "of-job", str(effects.folder / "sweep/0"))
        assert one["threads"] == [2, "2"] and one["argv"] == ["-m"] and not one["in_rank"]
        assert one["follows"] == {"size": 97, "folder": f"{effects.folder}/sweep/0/x", "set": "of-job"}
        assert one["main_only"] == "answer of the launcher"
    assert re.search(r"^\[\w+1\]: ?out 1$", done.stdout, re.MULTILINE) and "\nout 0\n" in done.stdout
    assert re.search(r"^\[\w+1\]: ?err 1$", done.stderr, re.MULTILINE)
    printed = effects.read("**/printed/**/attempt_0/1/std*.log")
    assert [text for name, text in printed.items() if name.endswith("stdout.log")] == ["out 1\n"]
    assert not effects.read("sweep/0/ranks/**")


def test_without_them_a_spawned_rank_imports_for_itself_and_prints_into_its_file(effects):
    words = ["hydra.launcher.start_method=spawn", "hydra.sweep.dir=plain"]
    done = effects.sweep(*words, fresh=True, OMP_NUM_THREADS="1", PYTHONPATH=str(effects.folder))
    assert done.returncode == 0, done.stdout + done.stderr
    for one in seen(effects, "plain/0"):
        assert (one["env"], one["env_set"], one["folder"]) == (None, None, str(effects.folder))
        assert one["threads"] == [1, "1"] and one["in_rank"] and not one["models"] and not one["frozen"]
    assert "out 0" in done.stdout and "out 1" not in done.stdout and "err 1" not in done.stderr
    (printed,) = effects.read("plain/0/ranks/*/attempt_0/1/stdout.log").values()
    assert printed == "out 1\n"


GO_ON = ["hydra.launcher.on_invalid=skip", "hydra.launcher.on_failure=continue"]


@pytest.fixture(scope="module")
def swept(new):
    program = new()
    (program.folder / "broken").touch()
    return program, program.sweep("do=break", "parallelism.tp_size=1,2,3", "n=1,2", *GO_ON)


class TestASweepWithInvalidAndFailingJobs:
    """Six jobs on 2 ranks: tp_size=3 cannot work; n=2 tp_size=1 fails until its cause is removed."""

    def test_the_others_run_and_the_exit_code_tells_of_the_failed_one(self, swept):
        program, done = swept
        assert done.returncode == 1, done.stdout + done.stderr
        status = {job: record["status"] for job, record in program.records().items()}
        assert status == dict(enumerate(["completed", "failed", "completed", "completed", "skipped", "skipped"]))
        assert done.stdout.count("is skipped, it cannot work:") == 2
        assert "Launching 4 jobs, each on 2 ranks" in done.stdout
        assert not program.read("sweep/4/**/*") and not program.read("sweep/5/**/*")
        assert len(program.read("events.txt")["events.txt"].splitlines()) == 2 * 4 + 2

    def test_table_and_files_tell_what_became_of_each(self, swept):
        program, done = swept
        table = done.stdout[done.stdout.index("job  overrides") :]
        assert len(table.splitlines()) == 1 + 6 + 1
        assert re.search(r"^1 +do=break parallelism.tp_size=1 n=2 +dp_shard 2 +failed +\d", table, re.MULTILINE)
        assert re.search(r"^2 +do=break parallelism.tp_size=2 n=1 +tp 2 +completed +1 ", table, re.MULTILINE)
        assert table.splitlines()[-1].endswith("sweep/sweep.md")
        markdown = program.read("sweep/sweep.md")["sweep/sweep.md"].splitlines()
        assert len(markdown) == 2 + 6
        assert markdown[3].startswith("| 1 | do=break parallelism.tp_size=1 n=2 | dp_shard 2 | failed |")
        assert markdown[3].endswith("ValueError: broken |")
        assert markdown[6].endswith("= 3 does not divide the world size 2 |")
        assert re.fullmatch(r"rank [01]: ValueError: broken", program.records()[1]["reason"])

    @pytest.mark.parametrize(
        ("words", "text"),
        [
            (["hydra.launcher.resume=sweep", "n=1,2,3"], "the sweep in this folder was another one"),
            (["hydra.launcher.resume=nowhere"], "hydra.launcher.resume=nowhere is not a sweep's folder"),
        ],
        ids=["other overrides", "no such folder"],
    )
    def test_another_sweep_cannot_go_on_with_it(self, swept, words, text):
        program, _ = swept
        before = program.read("**/*")
        done = program.sweep(*words)
        assert done.returncode == 1 and text in done.stderr and "Traceback" not in done.stderr
        after = program.read("**/*")
        after["events.txt"] = before["events.txt"]
        assert after == before

    def test_going_on_runs_only_what_has_not_completed(self, swept):
        program, _ = swept
        names = {job: program.read(f"sweep/{job}/read.0") for job in (0, 2, 3)}
        (program.folder / "broken").unlink()
        done = program.sweep(*GO_ON, "hydra.launcher.resume=sweep")  # no overrides are typed
        assert done.returncode == 0, done.stdout + done.stderr
        assert "Launching 1 job," in done.stdout and done.stdout.count(": completed before") == 3
        assert names == {job: program.read(f"sweep/{job}/read.0") for job in (0, 2, 3)}
        assert assert_ranks_agree(program, "sweep/1", ranks=2)["n"] == 2
        records = program.records()
        assert [records[job]["status"] for job in range(6)] == ["completed"] * 4 + ["skipped"] * 2
        table = done.stdout[done.stdout.index("job  overrides") :]
        assert table.count("completed") == 4 and table.count("skipped") == 2
        assert not program.read("multirun/**")


def test_by_default_nothing_starts_nothing_is_left_and_all_that_cannot_work_is_shown(new):
    program = new()
    before = program.read("*.*")
    done = program.run("-m", *TORCHRUN, "parallelism.tp_size=1,3", "n=1,2,3")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.startswith("3 of 6 jobs cannot work, so none was started\n")
    for number, n in ((3, 1), (4, 2), (5, 3)):
        assert f"\n#{number} parallelism.tp_size=3 n={n}\n" in done.stderr
    assert "type     hydra.launcher.on_invalid=skip" in done.stderr and "printed by" not in done.stdout
    assert {name for name in program.read("*.*") if name != "events.txt"} == set(before)
    assert sorted(path.name for path in program.folder.iterdir() if path.is_dir()) in ([], ["__pycache__"])


def test_two_sweeps_that_start_in_the_same_second_keep_apart(new):
    """The folder is named by the year, so that the two have the same name on any machine."""
    program = new()
    words = ["-m", *TORCHRUN, "hydra.sweep.dir='multirun/${now:%Y}'"]
    app = ["python", "app.py", *words]
    both = [warm.Program([*app, f"n={first},{first + 1}"], cwd=program.folder) for first in (10, 20)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, out + err
    files = program.read("multirun/*/sweep.jsonl")
    assert len(files) == 2
    jobs = {tuple(json.loads(line)["value"] for line in text.splitlines()) for text in files.values()}
    assert jobs == {(10, 11), (20, 21)}
    for name in files:
        for job in (0, 1):
            assert_ranks_agree(program, f"{name.rpartition('/')[0]}/{job}", ranks=2)


def test_bad_options_of_the_command_line_are_refused_in_one_text(new):
    program = new()
    done = program.sweep("hydra.launcher.tee=9", "hydra.launcher.max_restarts=-1", "+hydra.launcher.max_restart=1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    for word in ("tee=3", "max_restarts=0", "max_restarts=1"):
        assert done.stderr.count(f"  type     hydra.launcher.{word}\n") == 1
    assert not (program.folder / "sweep").exists()


def test_a_sweep_below_torchrun_is_told_the_command_that_does_it(new):
    program = new()
    launcher = (*TORCHRUN_4[:-1], "2")
    done = program.run("-m", "n=1,2", launcher=launcher)
    assert done.returncode == 1 and done.stderr.count("2 ranks were started, and each would sweep for itself") == 1
    assert "type     python app.py -m hydra/launcher=torchrun hydra.launcher.nproc_per_node=2 n=1,2\n" in done.stderr
    assert not (program.folder / "multirun").exists()


NESTED = """
    {hidden}
    import hydra

    def make():
        @hydra.main(version_base="1.3", config_path=".", config_name="config")
        def main(cfg):
            return cfg.n

        return main

    if __name__ == "__main__":
        make()()
"""


def test_a_nested_task_function_needs_cloudpickle_or_fork(new):
    one = ["n=7", "hydra.launcher.nproc_per_node=1"]
    program = new(NESTED.format(hidden="import sys; sys.modules['cloudpickle'] = None"))
    done = program.sweep(*one)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot be sent to another process" in done.stderr and "pip install cloudpickle" in done.stderr
    assert program.records()[0]["status"] == "failed"
    done = program.sweep(*one, "hydra.launcher.start_method=fork", "hydra.sweep.dir=forked")
    assert (done.returncode, program.records("forked")[0]["value"]) == (0, 7), done.stderr
    with_it = new(NESTED.format(hidden=""))
    done = with_it.sweep(*one)
    assert (done.returncode, with_it.records()[0]["value"]) == (0, 7), done.stderr


def test_a_running_sweep_cannot_be_gone_on_with_and_one_that_was_killed_can(new):
    program = new()
    (program.folder / "wait").touch()
    options = ["hydra.launcher.start_method=fork"]
    running = program.start("-m", *TORCHRUN, *options, "hydra.sweep.dir=sweep", "do=write,wait")
    wait_for(lambda: len(program.read("sweep/1/pid.*")) == 2)
    refused = program.sweep(*options, "hydra.launcher.resume=sweep")
    assert refused.returncode == 1 and "this sweep is still running" in refused.stderr
    end(running)
    (program.folder / "wait").unlink()
    done = program.sweep(*options, "hydra.launcher.resume=sweep", "do=write,wait")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("completed before") == 1 and "Launching 1 job," in done.stdout
    assert [program.records()[job]["status"] for job in (0, 1)] == ["completed"] * 2
