"""What a person sees of the progress, and that the terminal is left as it was."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from lemica_trt.core.progress import Bars, Clock, Lines, Quiet, Reporter, Tally, duration, size

pytestmark = pytest.mark.null

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def terminal() -> tuple[Console, StringIO]:
    file = StringIO()
    return Console(force_terminal=True, file=file, width=80, _environ={"TERM": "xterm"}), file


def test_a_bar_that_is_cut_short_gives_the_cursor_back() -> None:
    console, file = terminal()
    bars = Bars(console)
    bars.stage("calibrate", "2 samples")
    bars.advance(1, 3)
    assert HIDE in file.getvalue() and SHOW not in file.getvalue()
    bars.close()
    text = file.getvalue()
    assert "1/3" in text
    assert text.rindex(SHOW) > text.rindex(HIDE)
    bars.close()
    assert file.getvalue() == text


def test_a_bar_that_comes_to_its_end_closes_itself() -> None:
    console, file = terminal()
    bars = Bars(console)
    bars.stage("verify", "")
    bars.advance(3, 3)
    assert file.getvalue().rindex(SHOW) > file.getvalue().rindex(HIDE)


def test_lines_are_plain() -> None:
    file = StringIO()
    lines = Lines(Console(file=file, width=20), interval=-1)
    lines.stage("plan", "[bold]4 of 8[/] steps, and more than fits into a line")
    lines.advance(1, 2)
    lines.advance(2, 2)
    lines.note("done")
    lines.close()
    assert file.getvalue().splitlines() == [
        "plan       [bold]4 of 8[/] steps, and more than fits into a line",
        "plan       1/2",
        "plan       2/2",
        "           done",
    ]


def test_lines_come_at_intervals() -> None:
    file = StringIO()
    lines = Lines(Console(file=file), interval=3600)
    lines.stage("plan", "x")
    for i in range(5):
        lines.advance(i + 1, 5)
    assert file.getvalue().splitlines() == ["plan       x"]


def test_quiet_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    quiet: Reporter = Quiet()
    quiet.stage("plan", "x")
    quiet.advance(1, 2)
    quiet.note("y")
    quiet.close()
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0008, "0.8 ms"),
        (0.12, "120 ms"),
        (3.44, "3.4 s"),
        (42.2, "42 s"),
        (59.7, "1 min 0 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
    ],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (640, "640 B"),
        (9_800_000, "9.8 MB"),
        (3_400_000_000, "3.4 GB"),
        (250_000, "250 kB"),
        (5 * 10**15, "5000 TB"),
    ],
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text


class Time:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_time_left_is_that_of_all_stages() -> None:
    """A step takes two seconds; the first fit needs none of the runs that were expected to be made anew."""
    time = Time()
    clock = Clock(time)
    clock.expect([("export", 0.0), ("calibrate", 20.0), ("fit", 30.0), ("verify", 10.0)])
    clock.stage("export")
    clock.advance(50, 100)  # percent
    assert clock.seconds_left is None and not clock.counts and clock.place == "stage 1 of 4"
    time.now += 100
    clock.stage("calibrate")
    clock.advance(5, 20)  # known from an earlier run
    assert clock.seconds_left is None
    for done in range(6, 21):
        time.now += 2
        clock.advance(done, 20)
        assert clock.seconds_left == pytest.approx(2 * (20 - done + 30 + 10))
    for left in (30, 20):
        clock.stage("fit")
        clock.advance(0, 10)
        time.now += 20
        clock.advance(10, 10)
        assert clock.seconds_left == pytest.approx(2 * left)
    clock.stage("a remark")
    assert clock.place is None
    clock.stage("verify")  # the third fit was not needed
    clock.advance(0, 12)
    assert clock.seconds_left == pytest.approx(2 * 12)


def test_stages_that_take_turns_are_not_over_before_all_are() -> None:
    time = Time()
    clock = Clock(time)
    clock.expect([("fit", 20.0), ("select", 10.0), ("verify", 5.0)])
    for name, total in (("fit", 10), ("select", 5), ("fit", 10)):
        clock.stage(name)
        clock.advance(0, total)
        assert clock.counts
        time.now += total
        clock.advance(total, total)
    assert clock.seconds_left == pytest.approx(5 + 5)
    clock.stage("verify")
    assert clock.seconds_left == pytest.approx(5)


def test_lines_say_where_the_build_is() -> None:
    time, file = Time(), StringIO()
    lines = Lines(Console(file=file), interval=-1, clock=Clock(time))
    lines.expect([("calibrate", 10.0), ("verify", 10.0)])
    lines.stage("calibrate", "x")
    lines.advance(0, 10)
    time.now += 4
    lines.advance(2, 10)
    assert file.getvalue().splitlines()[1:] == [
        "calibrate  0/10 full steps",
        "calibrate  2/10 full steps; stage 1 of 2, 36 s left",
    ]


def test_parts_of_a_stage_add_up() -> None:
    file = StringIO()
    tally = Tally(Lines(Console(file=file), interval=-1), 5)
    tally(2)
    tally(3)
    assert [line.split()[-1] for line in file.getvalue().splitlines()] == ["2/5", "5/5"]
