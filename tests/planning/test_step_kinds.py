"""Steps of several kinds: what one kind caches is never read by another, and solvers run across."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from lemica_trt.calibrate.estimate import calibrate_cheaply
from lemica_trt.calibrate.exact import measure
from lemica_trt.core.errors import InfeasibleError, InputError, UnsupportedError
from lemica_trt.core.progress import Quiet
from lemica_trt.core.values import json_bytes, value_from_json
from lemica_trt.evaluate.timing import mean_of_kinds, shortened
from lemica_trt.ir.budget import Latency, MinPsnr, StepBudget, StepTimes
from lemica_trt.ir.calibration import Calibration, ErrorGraph
from lemica_trt.ir.graphs import GraphSet, GraphSpec, StepLayout, kind_of_variant, trunk_of
from lemica_trt.ir.plan import PlanRow, StepPlan, check_plan, coefficient_vector, layout_from_plans, trunk_reads
from lemica_trt.ir.profile import Profile, Sampling, Shape
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.ir.step_model import Beginning, Latents, StepInput, StepOutput
from lemica_trt.planning.extrapolation import linear_plan
from lemica_trt.planning.layout import layout_for_methods
from lemica_trt.planning.minimax import least_budget, require_feasible
from lemica_trt.planning.planner import Problem, candidates, plan_given, planners, planners_named
from lemica_trt.planning.schedules import uniform
from lemica_trt.planning.search import best_known, candidates_on, paths_begin, plan_budgets, resolve_budgets
from lemica_trt.planning.solvers import first_order_table
from lemica_trt.planning.step_plan import uncached_plan
from lemica_trt.testing.values import flow_table

pytestmark = pytest.mark.null

SHAPE, STEPS, MAX_SKIP, EXPERTS = (6,), 9, 3, ("transformer", "transformer_2")


def table_of(kinds: Sequence[int]) -> SamplerTable:
    table = flow_table(len(kinds))
    rows = [msgspec.structs.replace(row, kind=kind or msgspec.UNSET) for row, kind in zip(table.rows, kinds)]
    return msgspec.structs.replace(table, rows=(*rows, table.rows[-1]))


TABLE = table_of([0] * 4 + [1] * 5)


class TwoExperts:
    """A step model of a few lines; a residual is of the expert that made it, and no other can read it."""

    profile = Profile(
        name="toy", family="toy", source="none", dtype="fp32", text_length=2,
        shape=Shape(frames=1, height=8, width=8), sampling=Sampling(steps=STEPS, guidance_scale=1.0),
    )  # fmt: skip
    revision, latent_shape, guided, branches, libraries = "toy", SHAPE, False, False, dict[str, str]()

    def begin(self, prompt: str, seed: int) -> Beginning:
        random = np.random.default_rng(seed)
        noises: Iterator[Latents] = (random.standard_normal(SHAPE).astype(np.float32) for _ in itertools.count())
        return Beginning(None, noises)

    def steps(self, layout: StepLayout) -> Any:
        def take(row: PlanRow, runs: Sequence[StepInput], guidance_scale: float) -> list[StepOutput]:
            return [self._step(layout, row, run) for run in runs]

        return take

    def _step(self, layout: StepLayout, row: PlanRow, run: StepInput) -> StepOutput:
        coefficient_vector(row, layout)
        x = sum((c * v for c, v in zip(row.latents, run.latents)), np.zeros(SHAPE, np.float32))
        x = (x + sum(c * v for c, v in zip(row.outputs, run.outputs))).astype(np.float32)
        if row.variant is None:
            return StepOutput(x, x)
        kind = kind_of_variant(row.variant)
        of, residual = run.residual if row.cached else (kind, np.sin((2 + kind) * x + 0.002 * (row.timestep or 0.0)))
        assert of == kind, f"step {row.step} of kind {kind} reads a residual of kind {of}"
        output = np.tanh((0.5 - kind) * x + residual).astype(np.float32)
        return StepOutput(x, output, residual=(kind, residual))

    def run(self, plan: StepPlan, prompt: str, seed: int) -> Latents:
        latents, outputs, residuals = [next(self.begin(prompt, seed).noises)], list[Latents](), dict[str, Any]()
        for row in plan.rows:
            slot = trunk_of(row.variant)
            given = StepInput(None, latents, outputs, residual=residuals.get(slot))
            found = self._step(layout(plan), row, given)
            latents, outputs = [found.latents, *latents], [found.output, *outputs]
            if row.full:
                residuals[slot] = found.residual
        return latents[0]

    def frames(self, latents: Latents) -> Any:
        raise NotImplementedError


def layout(*plans: StepPlan) -> StepLayout:
    return layout_from_plans(plans, latent_shape=SHAPE, guided=False, experts=EXPERTS)


def within(i: int, j: int, table: SamplerTable = TABLE) -> bool:
    """Whether all steps that a segment skips are of the kind of its start."""
    return len(set(table.kinds[i:j])) == 1


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> ErrorGraph:
    folder = tmp_path_factory.mktemp("journal")
    return measure(
        TwoExperts(), TABLE, ["a", "b"], samples=2, seed=0, max_skip=MAX_SKIP, journal=folder / "exact.jsonl"
    ).graph


SEGMENTS = [(i, j) for i in range(STEPS) for j in range(i + 2, min(i + MAX_SKIP + 1, STEPS) + 1)]


def test_segments_end_where_another_kind_begins(exact: ErrorGraph, tmp_path: Path) -> None:
    expected = [(i, j) for i, j in SEGMENTS if within(i, j)]
    assert len(expected) < len(SEGMENTS)
    assert [(edge.start, edge.stop) for edge in exact.edges] == expected
    cheap = calibrate_cheaply(
        TwoExperts(), TABLE, ["a", "b"], method="secant", samples=2, seed=0, max_skip=MAX_SKIP,
        journal=tmp_path / "cheap.jsonl",
    )  # fmt: skip
    assert [(edge.start, edge.stop) for edge in cheap.graph.edges] == expected
    assert cheap.sensitivity is not None


def test_each_error_is_that_of_its_segment_alone(exact: ErrorGraph) -> None:
    model = TwoExperts()
    for s in range(2):
        whole = model.run(uncached_plan(TABLE, guidance_scale=1.0), "a", s)
        for edge in exact.edges:
            full = tuple(t for t in range(STEPS) if not edge.start < t < edge.stop)
            problem = Problem(table=TABLE, guidance_scale=1.0)
            final = model.run(plan_given(problem, full), "a", s)
            assert edge.errors[s] == pytest.approx(float(np.abs(final - whole).mean()), rel=1e-5)


@pytest.mark.parametrize("kinds", [[0] * 4 + [1] * 5, [0] + [1] * 8, [0, 0, 1, 1, 1, 0, 0, 2, 2]])
@pytest.mark.parametrize("name", ["lemica", "uniform"])
def test_plans_that_reuse_residuals_begin_each_kind_in_full(kinds: list[int], name: str, tmp_path: Path) -> None:
    """Of every budget: the model refuses residuals of another kind, and so do the slots of the plan."""
    table, model = table_of(kinds), TwoExperts()
    graph = measure(model, table, ["a"], samples=1, seed=0, max_skip=MAX_SKIP, journal=tmp_path / "j").graph
    problem = Problem(table=table, guidance_scale=1.0, calibration=Calibration(graph=graph))
    made = 0
    for budget in range(1, STEPS):
        try:
            plan = planners()[name](problem, budget)
        except InfeasibleError:
            assert budget <= len(table.switches) or name == "lemica"
            continue
        made += 1
        assert set(table.switches) <= set(plan.full_steps) and plan.budget == budget
        for row in plan.rows[:-1]:
            last = max(step for step in plan.full_steps if step <= row.step)
            assert within(last, row.step + 1, table) and kind_of_variant(str(row.variant)) == kinds[row.step]
        assert np.isfinite(model.run(plan, "a", 0)).all()
        check_plan(plan, graphs_of(layout(plan)))
    assert made >= STEPS // 2


def graphs_of(layout: StepLayout) -> GraphSet:
    graphs = tuple(GraphSpec(role=role, file="", inputs=(), outputs=(), opset=20) for role in layout.step_graphs)
    return GraphSet(dtype="fp32", layout=layout, max_batch=1, graphs=graphs)


def test_solvers_run_across_the_switch_on_the_right_expert() -> None:
    """Rows of any solver have the kind of the step that they stand for; nothing of them is cached."""
    steps = uniform(STEPS, 3).full_steps
    assert 4 not in steps
    for plan in (
        linear_plan(uniform(STEPS, 3), TABLE, guidance_scale=1.0),
        uncached_plan(first_order_table(TABLE, steps), guidance_scale=1.0),
    ):
        assert [row.variant for row in plan.rows] == ["full", "full", "full2", None]
        assert not plan.cache_depths
        assert np.isfinite(TwoExperts().run(plan, "a", 0)).all()


def test_a_schedule_that_skips_into_another_kind_is_refused() -> None:
    problem = Problem(table=TABLE, guidance_scale=1.0)
    with pytest.raises(InfeasibleError, match="expected step 4 among the full steps: it is the first of another kind"):
        plan_given(problem, (0, 3, 6))
    with pytest.raises(InfeasibleError, match=r"expected 4 … 9 full steps, of 2 kinds, where at most 2 in a row"):
        require_feasible(STEPS, 2, [3], TABLE.switches)
    require_feasible(STEPS, 2, [3])
    with pytest.raises(UnsupportedError, match="no two of the 3 steps that follow each other are of one kind"):
        measure(TwoExperts(), table_of([0, 1, 0]), ["a"], samples=1, seed=0, max_skip=1, journal=Path("unused"))


def test_fronts_and_times_ask_for_no_budget_that_kinds_of_steps_do_not_have() -> None:
    """At most 2 steps in a row are skipped: 2 full ones of the first 4, 2 of the next 5; 3 of 9 of one kind."""
    lemica, folding = planners_named(["lemica"]), planners_named(["lemica", "linear"])
    assert paths_begin(lemica, TABLE) == (4,) and paths_begin(folding, TABLE) == ()
    assert (least_budget(STEPS, 2), least_budget(STEPS, 2, (4,))) == (3, 4)
    assert (least_budget(STEPS, None), least_budget(STEPS, None, (4,))) == (1, 2)
    times = StepTimes(full=1.0, skipped=0.0, rest=0.0)
    (budget,) = resolve_budgets([Latency(3.5)], folding, times, STEPS, 2)
    assert isinstance(budget, StepBudget) and max(budget.budgets) == 3
    with pytest.raises(InfeasibleError, match="at least 4 are needed"):
        resolve_budgets([Latency(3.5)], lemica, times, STEPS, 2, (4,))

    looked_at: list[int] = []
    plan = uncached_plan(first_order_table(TABLE, range(STEPS)), guidance_scale=1.0)

    def point(budget: int) -> Any:
        looked_at.append(budget)
        return SimpleNamespace(mean=100.0, plan=plan)

    search: Any = SimpleNamespace(plan=lambda _: plan, point=point, tables={}, front=None)
    for budgets in ([4], [MinPsnr(30.0)]):
        plan_budgets(budgets, search, Quiet(), pareto=True, num_steps=STEPS, max_skip=2, switches=(4,))
    assert min(looked_at) == 4


def test_what_folds_is_planned_where_what_reuses_has_too_few_steps(exact: ErrorGraph) -> None:
    problem = Problem(table=TABLE, guidance_scale=1.0, calibration=Calibration(graph=exact))
    assert [plan.method for plan in candidates(planners_named(["linear", "uniform"]), problem, 4)] == [
        "linear",
        "uniform",
    ]
    three = table_of([0, 0, 0, 1, 1, 1, 2, 2, 2])
    problem = Problem(
        table=three, guidance_scale=1.0, solver=lambda schedule, _: first_order_table(three, schedule.full_steps)
    )
    assert [plan.method for plan in candidates(planners_named(["stock:first-order", "uniform"]), problem, 2)] == [
        "stock:first-order"
    ]
    with pytest.raises(InfeasibleError, match="at least 3 full steps"):
        candidates(planners_named(["uniform"]), problem, 2)


def test_a_layout_has_a_trunk_for_each_expert() -> None:
    problem = Problem(table=TABLE, guidance_scale=1.0)
    found = layout_for_methods(
        problem, planners_named(["lemica"]), latent_shape=SHAPE, guided=False, branches=False, conditions=(),
        experts=EXPERTS,
    )  # fmt: skip
    assert found.step_graphs == ("full", "skip", "full2", "skip2", "combine")
    assert [(v.expert, v.reads, v.writes) for v in found.variants] == [
        ("transformer", (), ("trunk",)),
        ("transformer", ("trunk",), ()),
        ("transformer_2", (), ("trunk2",)),
        ("transformer_2", ("trunk2",), ()),
    ]


def test_a_plan_that_reads_what_nobody_wrote_is_refused() -> None:
    plan = planners()["uniform"](Problem(table=TABLE, guidance_scale=1.0), 3)
    rows = list(plan.rows)
    first = TABLE.switches[0]
    rows[first] = msgspec.structs.replace(rows[first], variant="skip2", caches=trunk_reads(1.0, kind=1))
    with pytest.raises(InputError, match="step 4 reads trunk2 1 rows back, 0 before it write that"):
        check_plan(msgspec.structs.replace(plan, rows=tuple(rows)), graphs_of(layout(plan)))


def test_kinds_are_written_only_where_there_are_several() -> None:
    assert b"kind" not in json_bytes(flow_table(STEPS))
    assert value_from_json(SamplerTable, json_bytes(TABLE), where="x") == TABLE
    assert TABLE.switches == (4,) and flow_table(STEPS).switches == ()
    with pytest.raises(ValueError, match="expected the name of a variant"):
        kind_of_variant("full1")
    assert [kind_of_variant(name) for name in ("full", "skip2", "full10")] == [0, 1, 9]


def test_steps_are_timed_on_every_expert() -> None:
    short = shortened(
        uncached_plan(TABLE, guidance_scale=1.0),
        layout(planners()["uniform"](Problem(table=TABLE, guidance_scale=1.0), 3)),
        full=1,
    )
    assert [row.variant for row in short.rows] == ["full", "skip", "skip", "skip", "full2", *["skip2"] * 4, None]
    assert np.isfinite(TwoExperts().run(short, "a", 0)).all()
    assert mean_of_kinds([0, 1, 1, 1], [1.0, 3.0, 5.0, 4.0], {0: 30, 1: 10}) == pytest.approx((30 * 1 + 10 * 4) / 40)
    assert mean_of_kinds([0, 0, 1], [1.0, 3.0, 5.0]) == pytest.approx(3.0)


def test_budgets_that_the_best_method_cannot_have_are_another_methods() -> None:
    """Of a front, and of a bundle: what reuses runs the first step of each kind in full, solvers need not."""
    three = table_of([0, 0, 0, 1, 1, 1, 2, 2, 2])
    problem = Problem(
        table=three, guidance_scale=1.0, solver=lambda schedule, _: first_order_table(three, schedule.full_steps)
    )
    names = ("uniform", "stock:first-order")
    layout = layout_for_methods(
        problem,
        planners_named(names),
        latent_shape=SHAPE,
        guided=False,
        branches=False,
        conditions=(),
        experts=(*"abc",),
    )
    found = candidates_on(layout, problem, planners_named(names))
    assert [plan.method for plan in found(4, "uniform")] == ["uniform"]
    assert [plan.method for plan in found(2, "uniform")] == ["stock:first-order"]
    assert best_known(names, problem, layout, {4: names})(2).method == "stock:first-order"
