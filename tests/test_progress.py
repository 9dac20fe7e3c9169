"""What a person sees of the progress, and that the terminal is left as it was."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from lemica_trt.core.progress import Bars, Lines, Quiet, Reporter, duration, size

pytestmark = pytest.mark.null

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def terminal() -> tuple[Console, StringIO]:
    file = StringIO()
    return Console(force_terminal=True, file=file, width=80, _environ={"TERM": "xterm"}), file


def test_a_bar_that_is_cut_short_gives_the_cursor_back() -> None:
    console, file = terminal()
    bars = Bars(console)
    bars.stage("calibrate", "2 samples")
    bars.advance(1, 3, 61.0)
    assert HIDE in file.getvalue() and SHOW not in file.getvalue()
    bars.close()
    text = file.getvalue()
    assert "1/3" in text and "1 min 1 s left" in text
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
    lines = Lines(Console(file=file, width=20), interval=0)
    lines.stage("plan", "[bold]4 of 8[/] steps, and more than fits into a line")
    lines.advance(1, 2, 5.0)
    lines.advance(2, 2)
    lines.note("done")
    lines.close()
    assert file.getvalue().splitlines() == [
        "plan       [bold]4 of 8[/] steps, and more than fits into a line",
        "plan       1/2, 5.0 s left",
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
