"""A task function reaches another process by its name, or packed where no name leads to it."""

import functools
import pickle
import subprocess
import sys
import textwrap
import threading

import pytest
from omegaconf import OmegaConf

from nemo_dist_conf.composition.agreement.drawn_values import Drawn
from nemo_dist_conf.errors import ConfigError
from nemo_dist_conf.launch import task as tasks
from nemo_dist_conf.launch.task import Reference, refer, refuse_unguarded

CONFIG, HYDRA = OmegaConf.create({"a": 1}), OmegaConf.create({"hydra": {"b": "${a}"}})


def decorator(function):
    @functools.wraps(function)
    def wrapper(*args):
        return ("wrapped", function(*args))

    return wrapper


def task(config):
    return config.a


@decorator
@decorator
def decorated(config):
    return config.a


def replaced(config):
    return "first"


first_of_two = replaced


def replaced(config):  # type: ignore[no-redef]
    return "second"


class Holder:
    @staticmethod
    def task(config):
        return "held"


def nested():
    def task(config):
        return ("nested", config.a)

    return task


def pack(function, config, hydra):
    return tasks.pack(function, config, hydra, Drawn())


def opened(body):
    function, config, hydra, _ = pickle.loads(body)
    return function.find() if isinstance(function, Reference) else function, config, hydra


@pytest.mark.parametrize(
    ("function", "depth"),
    [(task, 0), (Holder.task, 0), (decorated, 0), (decorated.__wrapped__, 1), (decorated.__wrapped__.__wrapped__, 2)],
)
def test_a_function_is_found_by_name_below_its_decorators(function, depth):
    reference = refer(function)
    assert reference is not None
    assert (reference.module, reference.depth) == (__name__, depth)
    assert pickle.loads(pickle.dumps(reference)).find() is function


@pytest.mark.parametrize("function", [nested(), lambda config: 1, first_of_two, functools.partial(task)])
def test_no_name_is_made_up_for_what_has_none(function):
    assert refer(function) is None


def test_a_function_without_a_module_that_can_be_imported_has_no_name():
    def made(config):
        return 1

    made.__module__, made.__qualname__ = "no_such_module", "made"
    assert refer(made) is None


def test_a_name_is_found_in_a_module_that_is_not_imported_yet():
    sys.modules.pop("colorsys", None)
    reference = Reference("colorsys", "rgb_to_hsv", 0)
    assert reference.find()(0, 0, 0) == (0.0, 0.0, 0)


def test_what_is_packed_is_opened_again():
    function, config, hydra = opened(pack(task, CONFIG, HYDRA))
    assert function is task and (config, hydra) == (CONFIG, HYDRA)
    assert opened(pack(None, CONFIG, HYDRA))[0] is None


def test_a_nested_function_is_packed_by_cloudpickle():
    pytest.importorskip("cloudpickle")
    function, config, _ = opened(pack(nested(), CONFIG, HYDRA))
    assert function(config) == ("nested", 1)


def test_without_cloudpickle_a_nested_function_is_refused_with_what_helps(monkeypatch):
    monkeypatch.setitem(sys.modules, "cloudpickle", None)
    with pytest.raises(ConfigError, match="cannot be sent to another process") as error:
        pack(nested(), CONFIG, HYDRA)
    assert "nested.<locals>.task" in error.value.what
    assert "fork" in error.value.allowed and error.value.type == "pip install cloudpickle"


def test_a_config_that_cannot_be_sent_is_refused_with_cloudpickle_too():
    config = OmegaConf.create({"lock": threading.Lock()}, flags={"allow_objects": True})
    with pytest.raises(ConfigError, match="cannot be sent to another process: cannot pickle '_thread.lock'"):
        pack(task, config, HYDRA)


def test_a_payload_keeps_the_surroundings_but_for_what_elastic_sets(monkeypatch, tmp_path):
    """Seen from a program, since a payload is about its arguments, folder and environment."""
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "__init__.py").write_text("")
    (tmp_path / "pkg" / "__main__.py").write_text(
        textwrap.dedent(
            """
            import datetime, sys
            from nemo_dist_conf.launch.task import Payload

            made = Payload(b"", "job", datetime.datetime.now(), 1)
            print(made.argv[1:], made.folder, made.package_main, sorted(n for n in made.environment if "RANK" in n))
            """
        )
    )
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("MY_RANK", "0")
    done = subprocess.run([sys.executable, "-m", "pkg", "a=1"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == f"['a=1'] {tmp_path} pkg.__main__ ['MY_RANK']\n", done.stderr


@pytest.mark.parametrize(
    ("ending", "method", "refused"),
    [
        ("main()", "forkserver", True),
        ("main()", "spawn", True),
        ("main()", "fork", False),
        ('if __name__ == "__main__":\n    main()', "forkserver", False),
        ("other()", "forkserver", False),
    ],
)
def test_a_program_that_runs_when_it_is_imported_is_refused_unless_forked(
    tmp_path, monkeypatch, ending, method, refused
):
    program = tmp_path / "app.py"
    program.write_text(f"def main(cfg): ...\ndef other(): ...\n{ending}\n")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", str(program), raising=False)

    def main(config): ...

    main.__module__ = "__main__"
    if refused:
        with pytest.raises(ConfigError, match=r"app.py calls main\(\) when it is imported") as caught:
            refuse_unguarded(main, method)
        assert caught.value.type == "hydra.launcher.start_method=fork"
    else:
        refuse_unguarded(main, method)
