"""What a run shows: readable lines in a file, a live bar on a terminal, nothing from other ranks."""

from __future__ import annotations

import io
import re
import sys

import pytest
import torch

from nemo_dist_conf.train.console import Console, duration, peak_memory_bytes


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def show(steps: int, *, seconds: float = 0.1, stream: io.StringIO | None = None, **options: object) -> str:
    stream = io.StringIO() if stream is None else stream
    clock = Clock()
    first = int(options.get("first_step", 1))  # type: ignore[call-overload]
    with Console(steps, stream=stream, clock=clock, **options) as console:  # type: ignore[arg-type]
        for step in range(first, steps + 1):
            clock.now += seconds
            console.step(step=step, loss=5.0 / step, grad_norm=1.5, tokens=100, seconds=seconds)
    return stream.getvalue()


def plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def shown_steps(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"^step +(\d+)/", text, re.MULTILINE)]


def test_a_line_has_the_numbers_of_its_step() -> None:
    last = show(4).splitlines()[-1]
    assert last == "step 4/4  loss 1.250  grad norm 1.50  1,000 tokens/s  0:00 left"


@pytest.mark.parametrize("steps", [1, 2, 9, 10, 57, 200, 10_000])
def test_a_log_file_gets_the_first_the_last_and_about_ten_lines(steps: int) -> None:
    shown = shown_steps(show(steps, seconds=1e-6))
    assert shown[0] == 1 and shown[-1] == steps
    assert len(shown) == len(set(shown))
    assert min(steps, 10) <= len(shown) <= 14


def test_slow_steps_are_shown_at_least_every_half_minute() -> None:
    assert shown_steps(show(50, seconds=40.0)) == list(range(1, 51))


def test_a_resumed_run_starts_where_it_resumes() -> None:
    shown = shown_steps(show(100, first_step=91, seconds=1e-6))
    assert shown == list(range(91, 101))


def test_the_rate_leaves_out_the_first_step() -> None:
    console = Console(3, stream=io.StringIO())
    assert console.tokens_per_second == 0
    console.step(step=1, loss=1, grad_norm=1, tokens=100, seconds=50)
    console.step(step=2, loss=1, grad_norm=1, tokens=100, seconds=1)
    console.step(step=3, loss=1, grad_norm=1, tokens=100, seconds=1)
    assert console.tokens_per_second == 100


def test_a_run_of_one_step_has_a_rate() -> None:
    console = Console(1, stream=io.StringIO())
    console.step(step=1, loss=1, grad_norm=1, tokens=100, seconds=2)
    assert console.tokens_per_second == 50


def test_the_time_left_is_that_of_the_rate() -> None:
    assert "1:30 left" in show(10, seconds=10.0).splitlines()[0]


def test_a_file_gets_no_control_characters() -> None:
    text = show(20)
    assert "\x1b" not in text and "\r" not in text
    assert text.endswith("\n")


def test_other_ranks_print_nothing() -> None:
    for stream in (io.StringIO(), Terminal()):
        console = Console(2, enabled=False, stream=stream)
        with console:
            console.header({"a": "b"})
            console.step(step=1, loss=1, grad_norm=1, tokens=1, seconds=1)
            console.summary({"a": "b"})
        assert stream.getvalue() == ""


def test_tables_are_aligned() -> None:
    stream = io.StringIO()
    Console(1, stream=stream).header({"a": "one", "longer": "two"})
    assert stream.getvalue() == "a       one\nlonger  two\n"


def test_a_terminal_gets_a_live_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    text = show(20, stream=Terminal())
    assert "\x1b" in text
    assert "20/20" in text and "loss 0.250  grad norm 1.50  1,000 tokens/s 0:00 left" in plain(text)
    assert shown_steps(text) == []


def test_an_error_gives_the_terminal_back(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt):
        with Console(5, stream=stream):
            raise KeyboardInterrupt
    assert stream.getvalue().rfind("\x1b[?25h") > stream.getvalue().rfind("\x1b[?25l")  # the cursor is shown again


@pytest.mark.parametrize("missing", ["rich.progress", "rich.console"])
def test_a_terminal_without_rich_gets_lines(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setitem(sys.modules, missing, None)
    text = show(3, stream=Terminal())
    assert shown_steps(text) == [1, 2, 3] and "\x1b" not in text


def test_a_dumb_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert shown_steps(show(3, stream=Terminal())) == [1, 2, 3]


@pytest.mark.parametrize(
    "seconds, text", [(0, "0:00"), (6.6, "0:07"), (59.6, "1:00"), (750, "12:30"), (3723, "1:02:03")]
)
def test_durations_read_as_a_clock(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_peak_memory_of_this_process_is_believable() -> None:
    """Importing torch alone takes more than 50 MB and less than 100 GB."""
    assert 50e6 < peak_memory_bytes(torch.device("cpu")) < 100e9
