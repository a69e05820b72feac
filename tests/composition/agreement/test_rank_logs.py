"""Each rank logs to a file of its own; the console and ``.hydra`` are rank 0's."""

import copy

import pytest
from omegaconf import OmegaConf

from nemo_dist_conf.composition.agreement.rank_logs import keep_apart, rank_file

LOGGING = {
    "handlers": {
        "console": {"class": "logging.StreamHandler"},
        "file": {"class": "logging.FileHandler", "filename": "${where}/train.log"},
        "errors": {"class": "logging.FileHandler", "filename": "errors"},
        "off": None,
    },
    "root": {"handlers": ["console", "file"]},
    "loggers": {"mine": {"handlers": ["console", "errors"], "level": "DEBUG"}, "quiet": {"level": "ERROR"}},
}


def config(logging=LOGGING):
    hydra = {"output_subdir": ".hydra", "job_logging": copy.deepcopy(logging)}
    made = OmegaConf.create({"where": "out", "hydra": hydra})
    OmegaConf.set_readonly(made, True)
    OmegaConf.set_readonly(made.hydra, True)
    return made


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("out/train.log", "out/train.rank3.log"),
        ("out/train", "out/train.rank3"),
        ("v1.2/train", "v1.2/train.rank3"),
        ("${dir}/${name}.log", "${dir}/${name}.rank3.log"),
        ("${dir}/${a.b}", "${dir}/${a.b}.rank3"),
    ],
)
def test_a_ranks_file_stands_beside_that_of_rank_0(path, expected):
    assert rank_file(path, 3) == expected and rank_file(path, 0) == path


def test_rank_0_keeps_its_config():
    kept = config()
    keep_apart(kept, 0)
    assert kept == config()


def test_another_rank_has_files_of_its_own_no_console_and_no_hydra_folder():
    mine = config()
    keep_apart(mine, 2)
    assert mine.hydra.output_subdir is None
    logging = mine.hydra.job_logging
    assert logging.handlers.file.filename == "out/train.rank2.log"
    assert logging.handlers.errors.filename == "errors.rank2"
    assert (logging.root.handlers, logging.loggers.mine.handlers) == (["file"], ["errors"])
    assert logging.loggers.quiet == {"level": "ERROR"} and logging.loggers.mine.level == "DEBUG"
    assert OmegaConf.is_readonly(mine.hydra)


@pytest.mark.parametrize("logging", [None, {}, {"handlers": None}, {"root": {"level": "INFO"}}], ids=str)
def test_a_logging_without_handlers_is_left_as_it_is(logging):
    mine = config(logging)
    keep_apart(mine, 1)
    assert mine.hydra.job_logging == logging and mine.hydra.output_subdir is None


def test_a_program_that_only_prints_to_the_console_is_silent_on_other_ranks():
    mine = config({"handlers": {"console": {"class": "logging.StreamHandler"}}, "root": {"handlers": ["console"]}})
    keep_apart(mine, 1)
    assert mine.hydra.job_logging.root.handlers == []
