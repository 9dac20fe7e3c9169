"""A stage of a build, and the one loop that runs stages.

    key = digest(name, source code of the packages that the stage runs, digests of what it reads)

A stage whose record has this key, and whose files are as they were recorded, is "unchanged". Otherwise it runs into
a temporary folder, its files are moved to their place, and the record is written. Nothing else decides whether a stage
runs again: every command is this loop, with another first or last stage.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lemica_trt.bundle.workspace import Record, digest_of
from lemica_trt.core.errors import InputError
from lemica_trt.core.progress import Reporter
from lemica_trt.ir.report import StageEstimate

if TYPE_CHECKING:
    from lemica_trt.compiler.context import Context
    from lemica_trt.compiler.estimates import Forecast

PACKAGE = Path(__file__).parent.parent

ALWAYS_RUN = ("core", "ir", "compiler")
"""Packages whose source is part of every key."""

Writes = dict[str, list[str]]
"""Artifact → paths of its files, below the folder that the stage was given, or already in the work folder."""


def _always(_: Context) -> bool:
    return True


def _nothing(_: Context) -> None:
    return None


def _no_more(_: Context) -> tuple[str, ...]:
    return ()


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: what is printed, and what its record is called.
        reads: what it reads: artifacts, and inputs or fields of them (`profile.sampling`); see `Context.digest`.
        writes: the artifacts that it makes.
        packages: packages of this project whose source decides what it makes, apart from `ALWAYS_RUN`.
        run: makes the artifacts, in a folder.
        estimate: what running it would take, before anything is computed.
        is_needed: whether a request needs it at all.
        is_whole: whether what it left outside the work folder is still there.
        ensures: raises what is known to fail later; called after the stage, also where it is unchanged.
        command: what the user types to run it.
        also_reads: what it reads besides, for some requests.
    """

    name: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    packages: tuple[str, ...]
    run: Callable[[Context, Path], Writes]
    estimate: Callable[[Forecast], list[StageEstimate]]
    command: str
    is_needed: Callable[[Context], bool] = _always
    is_whole: Callable[[Context], bool] = _always
    ensures: Callable[[Context], None] = _nothing
    also_reads: Callable[[Context], tuple[str, ...]] = _no_more

    def all_reads(self, context: Context) -> tuple[str, ...]:
        """What it reads for this request."""
        return (*self.reads, *self.also_reads(context))


def needed_stages(stages: Sequence[Stage], context: Context, *last: str) -> list[Stage]:
    """The stages that a request needs to come to some, in order: those, and what they read from, and so on."""
    found: list[Stage] = []
    wanted: set[str] = set()
    for stage in reversed(stages):
        if (stage.name in last or wanted & set(stage.writes)) and stage.is_needed(context):
            found.insert(0, stage)
            wanted |= set(stage.all_reads(context))
    return found


def run_stages(stages: Sequence[Stage], context: Context, *, only: Collection[str] | None = None) -> None:
    """Run stages in order; those that are unchanged are not run again.

    Args:
        stages: those that are needed, see `needed_stages`.
        only: names of those that may run, the others must have run for the inputs that there are now; None: all.

    Raises:
        InputError: a stage that may not run has not run, or ran for something else; says the command that runs it.
        LemicaError: whatever a stage raises; finished stages stay.
    """
    may_run = {stage.name for stage in stages} if only is None else set(only)
    for stage in stages:
        if stage.name not in may_run:
            _require_finished(stage, context)
    for stage in stages:
        if stage.name not in may_run:
            continue
        if is_unchanged(stage, context, note=context.reporter):
            context.reporter.stage(stage.name, "unchanged")
        else:
            _run_again_what_is_damaged(stage, stages, may_run, context)
            _run(stage, context)
        stage.ensures(context)


def estimate_stages(stages: Sequence[Stage], context: Context, forecast: Forecast) -> list[StageEstimate]:
    """What `run_stages` would do, and what it would take; computes next to nothing."""
    found: list[StageEstimate] = []
    stale: set[str] = set()
    for stage in stages:
        if not stale & set(stage.all_reads(context)) and is_unchanged(stage, context):
            found.append(StageEstimate(name=stage.name, what="unchanged", seconds=0.0))
        else:
            stale |= set(stage.writes)
            found += stage.estimate(forecast)
    return found


def is_unchanged(stage: Stage, context: Context, *, note: Reporter | None = None) -> bool:
    """Whether what a stage left is what it would make now.

    Args:
        note: told what was damaged.
    """
    record = context.work.record(stage.name)
    if record is None or record.key != stage_key(stage, context):
        return False
    damaged = context.work.damaged(record)
    if note is not None:
        _note_damage(stage, damaged, note)
    return not damaged and stage.is_whole(context)


def stage_key(stage: Stage, context: Context) -> str:
    """Digest of everything that decides what a stage makes."""
    reads = _digests(stage.all_reads(context), context)
    return digest_of([stage.name, source_digest((*ALWAYS_RUN, *stage.packages)), reads])


@functools.cache
def source_digest(packages: tuple[str, ...]) -> str:
    """SHA-256 (hex) of the Python source of some packages of this project."""
    digest = hashlib.sha256()
    for package in sorted(packages):
        for path in sorted((PACKAGE / package).rglob("*.py")):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{content}  {path.relative_to(PACKAGE).as_posix()}\n".encode())
    return digest.hexdigest()


def _run(stage: Stage, context: Context) -> None:
    with context.work.staged() as folder:
        writes = stage.run(context, folder)
        assert set(writes) == set(stage.writes), f"{stage.name} wrote {sorted(writes)}"
        reads = _digests(stage.all_reads(context), context)
        context.work.commit(stage.name, stage_key(stage, context), reads, writes, folder)


def _run_again_what_is_damaged(
    stage: Stage, stages: Sequence[Stage], may_run: Collection[str], context: Context
) -> None:
    """Hash what a stage is about to read, whatever its size; stages that wrote what is damaged run again."""
    for other in stages:
        record = context.work.record(other.name) if set(other.writes) & set(stage.all_reads(context)) else None
        damaged = [] if record is None else context.work.damaged(record, every=True)
        if damaged:
            if other.name not in may_run:
                _require_finished(other, context, damaged)
            _note_damage(other, damaged, context.reporter)
            _run(other, context)


def _require_finished(stage: Stage, context: Context, damaged: Sequence[str] = ()) -> None:
    """Raise InputError unless a stage has run for these inputs; libraries and machine may be others by now."""
    record = context.work.record(stage.name)
    got = "it has not run" if record is None else None
    if record is not None:
        damaged = damaged or context.work.damaged(record)
        other = _differing(record, stage.all_reads(context), context)
        got = f"{damaged[0]} was altered" if damaged else f"it ran for another {other}" if other else None
    if got is not None:
        raise InputError(
            f"{context.work.root}: expected the stage {stage.name} to be finished, {got}",
            fix=stage.command.format(work=context.work.root),
        )


def _differing(record: Record, reads: Iterable[str], context: Context) -> str | None:
    names = [name for name in reads if not context.is_of_environment(name)]
    return next((name for name in names if record.reads.get(name) != context.digest(name)), None)


def _note_damage(stage: Stage, damaged: Sequence[str], reporter: Reporter) -> None:
    if damaged:
        reporter.stage(stage.name, f"runs again: {', '.join(damaged)} is missing or was altered")


def _digests(names: Iterable[str], context: Context) -> dict[str, str]:
    return {name: context.digest(name) for name in names}
