"""The loop over stages, on toy stages: what runs again and what does not; a kill at any moment changes nothing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lemica_trt.bundle import workspace
from lemica_trt.bundle.workspace import Workspace
from lemica_trt.compiler import stage as loop
from lemica_trt.compiler.context import Context
from lemica_trt.compiler.requests import BuildRequest, Inputs, stored_inputs
from lemica_trt.compiler.stage import Stage, Writes, estimate_stages, needed_stages, run_stages
from lemica_trt.core.errors import InputError, UsageError
from lemica_trt.core.progress import Quiet
from lemica_trt.ir.report import StageEstimate
from lemica_trt.ir.resources import load_profile

pytestmark = pytest.mark.null

PROFILE = load_profile("cogvideox-tiny")
FORECAST: Any = None
"""Toy stages look at none."""


class Toy:
    """Three stages: `count` reads the budgets, `double` what that wrote, `join` both and the prompts."""

    def __init__(self, root: Path) -> None:
        self.root, self.ran = root, list[str]()
        self.stages = (
            self.stage("count", ("request.budgets",), "numbers"),
            self.stage("double", ("numbers",), "doubled"),
            self.stage("join", ("numbers", "doubled", "prompts"), "joined"),
        )

    def stage(self, name: str, reads: tuple[str, ...], writes: str) -> Stage:
        def run(context: Context, folder: Path) -> Writes:
            self.ran.append(name)
            (folder / "toy").mkdir()
            path = folder / "toy" / f"{writes}.txt"
            request = context.inputs.request
            texts = {
                "count": lambda: ",".join(map(str, request.budgets)),
                "double": lambda: 2 * context.view.read_bytes("toy/numbers.txt").decode(),
                "join": lambda: context.view.read_bytes("toy/doubled.txt").decode() + "".join(context.inputs.prompts),
            }
            path.write_text(texts[name]())
            return {writes: [f"toy/{path.name}"]}

        def estimate(_: Any) -> list[StageEstimate]:
            return [StageEstimate(name=name, what="toy")]

        return Stage(
            name,
            reads=reads,
            writes=(writes,),
            packages=(),
            run=run,
            estimate=estimate,
            command=f"make {name} {{work}}",
        )

    def inputs(self, *budgets: int, prompts: tuple[str, ...] = ("a",)) -> Inputs:
        request = BuildRequest(budgets=budgets or (1, 2))
        return Inputs(profile=PROFILE, request=request, prompts=prompts, held_out=())

    def run(self, *budgets: int, last: str = "join", only: set[str] | None = None, **inputs: Any) -> list[str]:
        """Names of the stages that ran."""
        self.ran.clear()
        work = Workspace(self.root)
        with work.locked(), Context(work, self.inputs(*budgets, **inputs), Quiet()) as context:
            context.inputs.store(work)
            run_stages(context.select(needed_stages(self.stages, context, last)), context, only=only)
        return list(self.ran)

    def contents(self) -> dict[str, bytes]:
        files = (path for path in self.root.rglob("*") if path.is_file() and path.name != ".lock")
        return {path.relative_to(self.root).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path / "work")


def test_a_stage_runs_again_where_something_that_it_reads_changed(toy: Toy) -> None:
    assert toy.run() == ["count", "double", "join"]
    assert toy.run() == []
    assert toy.run(prompts=("b",)) == ["join"]
    assert toy.run(3, prompts=("b",)) == ["count", "double", "join"]
    assert (toy.root / "toy" / "joined.txt").read_text() == "33b"


def test_equal_content_stops_the_change(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """`count` has new source, and writes what it wrote before: nothing behind it runs."""
    toy.run()
    toy.stages = (replace(toy.stages[0], packages=("planning",)), *toy.stages[1:])
    assert toy.run() == ["count"]
    monkeypatch.setattr(loop, "source_digest", lambda packages: "of another release")
    assert toy.run() == ["count", "double", "join"]


def test_only_what_is_needed_runs(toy: Toy) -> None:
    assert toy.run(last="double") == ["count", "double"]
    toy.stages = (*toy.stages[:1], replace(toy.stages[1], is_needed=lambda _: False), toy.stages[2])
    with pytest.raises(InputError, match="toy/doubled"):  # what a stage that takes no part has left is not there
        toy.run()


@pytest.mark.parametrize("limit", [0, 1 << 20])
def test_what_is_altered_is_made_again_before_it_is_used(toy: Toy, limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small files are looked at always, large ones when something is made of them; nothing is made of altered ones."""
    monkeypatch.setattr(workspace, "HASHED_ALWAYS_BYTES", limit)
    toy.run()
    right = toy.contents()
    numbers = toy.root / "toy" / "numbers.txt"
    for damaged in (b"1,3", b"", None):
        numbers.unlink()
        if damaged is not None:
            numbers.write_bytes(damaged)
        unseen = damaged == b"1,3" and limit == 0
        assert toy.run() == ([] if unseen else ["count"])
        assert toy.run(prompts=("b",)) == (["count", "join"] if unseen else ["join"])
        toy.run()
        assert toy.contents() == right
    (toy.root / "records" / "double.json").write_bytes(b"{")
    assert toy.run() == ["double"] and toy.contents() == right


def test_stages_that_may_not_run_must_have_finished(toy: Toy) -> None:
    """For the same inputs; the command that runs them is named."""
    with pytest.raises(InputError, match=r"stage count to be finished, it has not run → make count .*work"):
        toy.run(only={"join"})
    toy.run(last="double")
    assert toy.run(only={"join"}) == ["join"]
    with pytest.raises(InputError, match=r"stage count to be finished, it ran for another request\.budgets"):
        toy.run(5, only={"join"})
    (toy.root / "toy" / "doubled.txt").write_text("1")
    with pytest.raises(InputError, match=r"stage double to be finished, toy/doubled\.txt was altered"):
        toy.run(only={"join"})


def test_what_is_checked_after_a_stage_is_checked_where_it_is_unchanged_too(toy: Toy) -> None:
    toy.run()

    def refuse(_: Context) -> None:
        raise UsageError("no")

    toy.stages = (replace(toy.stages[0], ensures=refuse), *toy.stages[1:])
    with pytest.raises(UsageError, match="no"):
        toy.run()


def test_estimates_are_of_what_would_run(toy: Toy) -> None:
    toy.run()
    context: Any = Context(Workspace(toy.root), toy.inputs(1, 2, prompts=("b",)), Quiet())
    stages = context.select(needed_stages(toy.stages, context, "join"))
    assert [(found.name, found.what) for found in estimate_stages(stages, context, FORECAST)] == [
        ("count", "unchanged"), ("double", "unchanged"), ("join", "toy"),
    ]  # fmt: skip


class Killed(BaseException):
    """The process is gone: nothing is cleaned up."""


def kill_at(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raise `Killed` in place of the n-th change of the file system, and of all later ones."""
    left = [count]

    def dying(original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                raise Killed
            return original(*arguments, **options)

        return call

    for module, name in ((Path, "replace"), (Path, "unlink"), (Path, "mkdir"), (workspace, "write_value")):
        monkeypatch.setattr(module, name, dying(getattr(module, name)))
    monkeypatch.setattr(workspace.shutil, "rmtree", dying(workspace.shutil.rmtree))


def test_killed_at_any_moment_the_next_run_ends_in_the_same_files(tmp_path: Path) -> None:
    whole = Toy(tmp_path / "whole")
    whole.run()
    whole.run(7)
    survived = False
    count = 0
    while not survived:
        toy = Toy(tmp_path / f"killed-{count}")
        toy.run()
        with pytest.MonkeyPatch.context() as patch:
            kill_at(count, patch)
            try:
                toy.run(7)
                survived = True
            except Killed:
                pass
        toy.run(7)
        assert toy.contents() == whole.contents(), f"killed at change {count}"
        count += 1
    assert count > 20


def test_inputs_come_back_as_they_were_stored(toy: Toy) -> None:
    inputs = toy.inputs(4, prompts=("one", "two – three"))
    work = Workspace(toy.root)
    inputs.store(work)
    assert stored_inputs(work) == inputs
    (toy.root / "inputs" / "prompts.txt").write_text("one\n")
    with pytest.raises(InputError, match=r"inputs/prompts\.txt: expected what a stage of the build wrote, it was al"):
        stored_inputs(work)
    with pytest.raises(InputError, match="expected a work folder or a bundle, got neither"):
        stored_inputs(Workspace(toy.root / "nowhere"))


def test_one_process_at_a_time(toy: Toy) -> None:
    with Workspace(toy.root).locked(), pytest.raises(UsageError, match="another lemica-trt is using it"):
        toy.run()


def test_the_stages_of_a_build_read_what_earlier_ones_write() -> None:
    """Of every name that a stage reads: an earlier stage writes it, or it is an input that there is."""
    from lemica_trt.compiler.stages import STAGES

    context = Context(Workspace(Path("nowhere")), Toy(Path("nowhere")).inputs(), Quiet())
    written: set[str] = set()
    for stage in STAGES:
        for name in set(stage.reads) - written:
            assert context.is_of_environment(name) or context.inputs.digest_of(name), f"{stage.name} reads {name}"
        assert not written & set(stage.writes)
        written |= set(stage.writes)
        assert all((loop.PACKAGE / package / "__init__.py").is_file() for package in stage.packages)
    names = [stage.name for stage in STAGES]
    assert names.index("engine") < names.index("calibrate"), "engines fail early"
