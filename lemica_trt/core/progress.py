"""How stages tell what they do: a live bar on a terminal, plain lines in a log, nothing when quiet.

Everything goes to standard error. Stages know `Reporter` only.
"""

from __future__ import annotations

import time
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lemica_trt.core.text import printable


class Reporter(Protocol):
    """Receives what happens, in order: a stage begins, advances, has notes, and the next one begins."""

    def stage(self, name: str, detail: str) -> None:
        """A stage begins."""

    def advance(self, done: int, total: int, seconds_left: float | None = None) -> None:
        """The running stage has done `done` of `total` units."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def close(self) -> None:
        """The end, however it came: leave the terminal as it was. May be called twice."""


class Quiet:
    """Says nothing."""

    def stage(self, name: str, detail: str) -> None: ...

    def advance(self, done: int, total: int, seconds_left: float | None = None) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class Lines:
    """Plain lines for a log: each stage, each note, and progress at most every `interval` seconds."""

    def __init__(self, console: Console, *, interval: float = 15.0) -> None:
        self._console = console
        self._interval = interval
        self._name = ""
        self._next = 0.0

    def stage(self, name: str, detail: str) -> None:
        self._name = name
        self._next = time.monotonic() + self._interval
        self._print(f"{name:<10} {detail}")

    def advance(self, done: int, total: int, seconds_left: float | None = None) -> None:
        if time.monotonic() >= self._next or (done == total and self._interval == 0):
            self._next = time.monotonic() + self._interval
            left = "" if seconds_left is None else f", {duration(seconds_left)} left"
            self._print(f"{self._name:<10} {done}/{total}{left}")

    def note(self, text: str) -> None:
        self._print(f"{'':<10} {text}")

    def close(self) -> None: ...

    def _print(self, text: str) -> None:
        self._console.print(printable(text), highlight=False, markup=False, soft_wrap=True)


class Bars(Lines):
    """Like `Lines`, with a live bar while a stage advances."""

    def __init__(self, console: Console) -> None:
        super().__init__(console)
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def stage(self, name: str, detail: str) -> None:
        self.close()
        super().stage(name, detail)

    def advance(self, done: int, total: int, seconds_left: float | None = None) -> None:
        if self._bar is None:
            self._bar = Progress(
                TextColumn(" " * 10),
                BarColumn(bar_width=40),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=total, left="")
            self._bar.start()
        left = "" if seconds_left is None else f"{duration(seconds_left)} left"
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total, left=left)
        if done >= total:
            self.close()

    def close(self) -> None:
        """Take the bar away and show the cursor that it hid; also behind a stage that raised."""
        if self._bar is not None:
            bar, self._bar = self._bar, None
            bar.stop()


def reporter(*, quiet: bool = False) -> Reporter:
    """The reporter that fits where standard error goes."""
    if quiet:
        return Quiet()
    console = Console(stderr=True)
    return Bars(console) if console.is_terminal else Lines(console)


def duration(seconds: float) -> str:
    """Seconds as a person writes them: 0.8 ms, 120 ms, 3.4 s, 42 s, 3 min 20 s, 2 h 5 min."""
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms" if seconds < 0.01 else f"{seconds * 1e3:.0f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def size(count: int) -> str:
    """Bytes as a person writes them: 640 B, 9.8 MB, 3.4 GB (powers of 1000)."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"
