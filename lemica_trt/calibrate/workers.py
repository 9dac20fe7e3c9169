"""Who does the work: a measurement is cut into units, and workers finish them in any order.

A unit depends on nothing but the job that it is of: not on what else was done, where, or when. So it does not matter
who does it, and a journal of what is finished (`journal`) makes the same result whoever did.

Knows nothing of what is measured, or of clusters (`cluster`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from lemica_trt.calibrate.journal import Entry, Journal
from lemica_trt.ir.step_model import StepModel

U = TypeVar("U", bound=Hashable)
E = TypeVar("E", bound=Entry[Any])
E_co = TypeVar("E_co", bound=Entry[Any], covariant=True)
U_contra = TypeVar("U_contra", bound=Hashable, contravariant=True)


class Progress(Protocol):
    """Called at the beginning and after each unit, in full steps of the DiT; what was done before is done."""

    def __call__(self, done: float, total: float) -> None: ...


class Job(Protocol[U_contra, E_co]):
    """What is done for each unit. It is sent to other machines: values only, no model."""

    def start(self, model: StepModel) -> Callable[[U_contra], Sequence[E_co]]:
        """What does one unit on this model; may keep what neighbouring units share."""


class Workers(Protocol):
    """Those who do a job."""

    def __call__(self, job: Job[U, E], units: Sequence[U]) -> Iterator[tuple[U, Sequence[E]]]:
        """Each unit with its entries, as it is finished, in any order."""


class InProcess:
    """One worker: this process, with the model that it has; units in their order. The last job stays begun."""

    def __init__(self, model: StepModel) -> None:
        self._model = model
        self._begun: tuple[Any, Any] = None, None

    def __call__(self, job: Job[U, E], units: Sequence[U]) -> Iterator[tuple[U, Sequence[E]]]:
        if self._begun[0] != job:
            self._begun = job, job.start(self._model)
        work = self._begun[1]
        for unit in units:
            yield unit, work(unit)


def complete(
    book: Journal[E],
    units: Mapping[U, float],
    keys: Callable[[U], Iterable[Hashable]],
    job: Job[U, E],
    workers: Workers,
    progress: Progress | None,
) -> None:
    """Have a journal completed.

    Args:
        book: gets the entries.
        units: everything that is wanted, and the full steps that each unit takes.
        keys: of the entries that come of a unit.
        job: what is done for each unit that lacks an entry.
        workers: do them.
        progress: told what is done.
    """
    missing = {unit: cost for unit, cost in units.items() if any(key not in book.entries for key in keys(unit))}
    total = sum(units.values())
    done = total - sum(missing.values())

    def tell() -> None:
        if progress is not None:
            progress(done, total)

    tell()
    if missing:
        for unit, entries in workers(job, list(missing)):
            book.add(entries)
            done += missing[unit]
            tell()
