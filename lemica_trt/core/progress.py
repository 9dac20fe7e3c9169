"""How stages tell what they do: a live bar on a terminal, plain lines in a log, nothing when quiet.

Everything goes to standard error. Stages know `Reporter` only. The time that is left is that of the whole build, from
the time that its steps have taken so far (`Clock`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from lemica_trt.core.text import printable

Expected = Sequence[tuple[str, float]]
"""The stages that are going to run, in order, each with the full steps of the DiT that are expected of it."""


class Reporter(Protocol):
    """Receives what happens, in order: a stage begins, advances, has notes, and the next one begins."""

    def expect(self, stages: Expected) -> None:
        """What is going to come."""

    def stage(self, name: str, detail: str) -> None:
        """A stage begins, or goes on with something else."""

    def advance(self, done: float, total: float) -> None:
        """What the running stage does is done so far: in full steps of the DiT where some were expected of it."""

    def note(self, text: str) -> None:
        """Something worth a line."""

    def close(self) -> None:
        """The end, however it came: leave the terminal as it was. May be called twice."""


class Quiet:
    """Says nothing."""

    def expect(self, stages: Expected) -> None: ...

    def stage(self, name: str, detail: str) -> None: ...

    def advance(self, done: float, total: float) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self) -> None: ...


class Tally:
    """Counts what is done of a stage whose parts do not know of each other.

    Args:
        reporter: told.
        total: of all parts.
    """

    def __init__(self, reporter: Reporter, total: float) -> None:
        self._reporter, self._total, self._done = reporter, total, 0.0

    def __call__(self, steps: float) -> None:
        """So many more are done."""
        self._done += steps
        self._reporter.advance(self._done, self._total)


class Within(Quiet):
    """What work tells that is a part of a stage: its own stages become notes, and what it does is counted together.

    Args:
        reporter: told.
        total: full steps of all parts.
    """

    def __init__(self, reporter: Reporter, total: float) -> None:
        self._reporter, self._tally = reporter, Tally(reporter, total)
        self._done: float | None = None

    def stage(self, name: str, detail: str) -> None:
        self._done = None
        self._reporter.note(f"{name}: {detail}")

    def advance(self, done: float, total: float) -> None:
        if self._done is not None:  # what the first call says was done before
            self._tally(done - self._done)
        self._done = done

    def note(self, text: str) -> None:
        self._reporter.note(text)


TOGETHER = frozenset({"fit", "select", "quality"})
"""Stages that take turns, once for each budget."""


class Clock:
    """How long the stages that are left will take: their full steps, each as long as those were that have been done.

    Args:
        now: seconds.

    Attributes:
        counts: whether full steps are expected of the running stage.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._left: dict[str, float] = {}
        self._names: list[str] = []
        self._name = ""
        self._last: tuple[float, float] | None = None  # what was done, and when
        self._steps = self._seconds = 0.0

    def expect(self, stages: Expected) -> None:
        self._names, self._left = [name for name, _ in stages], {}
        for name, steps in stages:
            if steps > 0:
                self._left[name] = self._left.get(name, 0.0) + steps

    def stage(self, name: str) -> None:
        """A stage begins: those before it are over, whatever was expected of them; of `TOGETHER` none is over before
        all are."""
        self._name, self._last = name, None
        if name in self._names:
            for before in self._names[: self._names.index(name)]:
                if not {before, name} <= TOGETHER:
                    self._left.pop(before, None)

    def advance(self, done: float, total: float) -> None:
        """Of `total` steps, those that are known from an earlier run among them, `done` are done."""
        if not self.counts:
            return
        now, before = self._now(), 0.0
        if self._last is not None:  # what the first call says was done before this run
            before, since = self._last
            self._steps += done - before
            self._seconds += now - since
        self._left[self._name] = max(self._left[self._name] - (done - before), total - done)
        self._last = done, now

    @property
    def counts(self) -> bool:
        return self._name in self._left

    @property
    def place(self) -> str | None:
        """Which of the stages is running; None: none of those that were expected."""
        if self._name not in self._names:
            return None
        return f"stage {self._names.index(self._name) + 1} of {len(self._names)}"

    @property
    def seconds_left(self) -> float | None:
        """Of the running stage and all that come; None as long as no step has been done."""
        if self._steps <= 0:
            return None
        return self._seconds / self._steps * sum(self._left.values())


class Lines:
    """Plain lines for a log: each stage, each note, and progress at most every `interval` seconds."""

    def __init__(self, console: Console, *, interval: float = 15.0, clock: Clock | None = None) -> None:
        self._console = console
        self._interval = interval
        self._clock = clock or Clock()
        self._name = ""
        self._next = 0.0

    def expect(self, stages: Expected) -> None:
        self._clock.expect(stages)

    def stage(self, name: str, detail: str) -> None:
        self._name = name
        self._clock.stage(name)
        self._next = time.monotonic() + self._interval
        self._print(f"{name:<10} {detail}")

    def advance(self, done: float, total: float) -> None:
        self._clock.advance(done, total)
        if time.monotonic() >= self._next or (done == total and self._interval == 0):
            self._next = time.monotonic() + self._interval
            self._print(f"{self._name:<10} {self._progress(done, total)}")

    def note(self, text: str) -> None:
        self._print(f"{'':<10} {text}")

    def close(self) -> None: ...

    def _progress(self, done: float, total: float) -> str:
        """How far the stage is, and the build."""
        text = f"{done:.0f}/{total:.0f}" + (" full steps" if self._clock.counts else "")
        left, place = self._clock.seconds_left, self._clock.place
        if left is not None and self._clock.counts:
            return f"{text}; {place}, {duration(left)} left"
        return text

    def _print(self, text: str) -> None:
        self._console.print(printable(text), highlight=False, markup=False, soft_wrap=True)


class Bars(Lines):
    """Like `Lines`, with a live bar while a stage advances."""

    def __init__(self, console: Console, *, clock: Clock | None = None) -> None:
        super().__init__(console, clock=clock)
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def stage(self, name: str, detail: str) -> None:
        self.close()
        super().stage(name, detail)

    def advance(self, done: float, total: float) -> None:
        self._clock.advance(done, total)
        if self._bar is None:
            self._bar = Progress(
                TextColumn(" " * 10),
                BarColumn(bar_width=30),
                TimeElapsedColumn(),
                TextColumn("{task.fields[text]}"),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=total, text="")
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, completed=done, total=total, text=self._progress(done, total))
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


def count(number: int, what: str) -> str:
    """`1 sample`, `2 samples`."""
    return f"{number} {what}{'s' if number != 1 else ''}"


def size(count: int) -> str:
    """Bytes as a person writes them: 640 B, 9.8 MB, 3.4 GB (powers of 1000)."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"
