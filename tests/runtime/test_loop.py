"""The loop against a plain interpreter of the plan, on a backend that records and poisons."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st

from lemica_trt.core.errors import EngineError, InputError, UsageError
from lemica_trt.ir.graphs import StepLayout
from lemica_trt.ir.plan import PlanRow, StepPlan, trunk_reads
from lemica_trt.runtime.denoise import PREPARED_PROGRAMS, Cancelled, Denoiser, RowDone

pytestmark = pytest.mark.null


def inputs_of(layout: StepLayout, batch: int, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    rows = batch * (1 + layout.guided)
    return {
        "conditions": {"prompt_embeds": rng.standard_normal((rows, toy.TEXT_LENGTH, toy.WIDTH)).astype(np.float32)},
        "noise": rng.standard_normal((batch, *toy.LATENT_SHAPE)).astype(np.float32),
        "guidance": rng.uniform(1, 5, batch) if layout.guided else None,
    }


def noises(batch: int) -> Any:
    rng = np.random.default_rng(9)
    return lambda: rng.standard_normal((batch, *toy.LATENT_SHAPE)).astype(np.float32)


def denoiser_of(layout: StepLayout, **kwargs: Any) -> tuple[Denoiser, toy.NullBackend]:
    graphs = toy.graphs_of(layout, **kwargs)
    backend = toy.NullBackend(graphs)
    return Denoiser(backend, graphs, backend.engines()), backend  # type: ignore[arg-type]


@st.composite
def cases(draw: st.DrawFn) -> tuple[StepLayout, StepPlan, int]:
    """A layout with histories 1–3, a valid plan that it can run, and a batch size."""
    depth = st.integers(1, 3)
    guided = draw(st.booleans())
    outputs = draw(depth)
    layout = toy.layout_of(
        draw(depth),
        outputs,
        draw(depth),
        stochastic=draw(st.booleans()),
        guided=guided,
        terms=draw(st.integers(0, outputs)) if guided else 0,
    )
    weight = st.integers(-8, 8).map(lambda number: number / 8)

    def weights(least: int, most: int) -> tuple[float, ...]:
        return tuple(draw(st.lists(weight, min_size=min(least, most), max_size=most)))

    rows, full, number, step, drawn = [], 0, draw(st.integers(2, 8)), 0, 0
    for i in range(number):
        last = i == number - 1
        variant = None if last else "full" if i == 0 else draw(st.sampled_from(["full", "skip", "skip", None]))
        fresh = draw(st.integers(0, 2)) if layout.stochastic else 0
        drawn += fresh
        rows.append(
            PlanRow(
                variant=variant,
                step=step,
                latents=weights(1, min(i + 1, layout.latent_history)),
                outputs=weights(0, min(i, layout.output_history)),
                guidance_terms=weights(0, min(i, layout.guidance_history)),
                draws=fresh,
                noise=tuple(draw(st.lists(weight.filter(bool), max_size=min(drawn, 3)))),
                timestep=None if variant is None else draw(weight),
                in_scale=draw(weight),
                guidance=draw(st.sampled_from([(0.0, 1.0), (1.0, 0.5)])),
                caches=trunk_reads(*weights(1, min(full, layout.depth("trunk")))) if variant == "skip" else (),
                reuse=weights(1, min(i, layout.guidance_history or layout.output_history))
                if variant is None and not last
                else (),
            )
        )
        full += variant == "full"
        step += draw(st.integers(1, 4))  # folded rows leave steps out
    return layout, toy.plan_of(*rows), draw(depth)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_the_loop_is_the_plan(case: tuple[StepLayout, StepPlan, int]) -> None:
    layout, plan, batch = case
    denoiser, backend = denoiser_of(layout)
    for seed in (1, 2):  # the second request sees buffers that the first one has used
        inputs = inputs_of(layout, batch, seed)
        expected = toy.interpret(plan, layout, **inputs, draw=noises(batch))
        found = denoiser.run(plan, **inputs, draw=noises(batch))
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)

    # Between the rows of a request nothing happens but the upload of fresh noise.
    last = len(backend.log) - 1 - [kind for kind, _ in reversed(backend.log)].index("download")
    start = max(i for i, (kind, _) in enumerate(backend.log[:last]) if kind == "download") + 1
    request = [kind for kind, _ in backend.log[start:last]]
    assert set(request) <= {"upload", "run"}, "a second request allocates and binds nothing"
    first_run = request.index("run")
    mixed = sum(bool(row.noise) for row in plan.rows)
    assert request.count("run") == len(plan.rows)
    assert request[first_run:].count("upload") == mixed - bool(plan.rows[0].noise)


def test_batches_are_their_requests() -> None:
    layout = toy.layout_of(2, 2, 2)
    plan = toy.euler_plan("fsrfss")
    denoiser, _ = denoiser_of(layout)
    inputs = inputs_of(layout, 3)
    together = denoiser.run(plan, **inputs)
    for i in range(3):
        alone = denoiser.run(
            plan,
            {"prompt_embeds": inputs["conditions"]["prompt_embeds"][[i, 3 + i]]},
            inputs["noise"][[i]],
            inputs["guidance"][[i]],
        )
        np.testing.assert_allclose(alone[0], together[i], atol=1e-6)


def test_rows_are_reported_in_order_and_timed() -> None:
    layout = toy.layout_of()
    plan = toy.euler_plan("fsr")
    denoiser, backend = denoiser_of(layout)
    rows: list[RowDone] = []
    denoiser.run(plan, **inputs_of(layout, 1), on_step=rows.append)
    assert [(row.index, row.rows, row.step, row.variant) for row in rows] == [
        (0, 4, 0, "full"),
        (1, 4, 1, "skip"),
        (2, 4, 2, None),
        (3, 4, 3, None),
    ]
    assert all(row.seconds > 0 for row in rows)
    assert sum(kind == "synchronize" for kind, _ in backend.log) == 4


def test_cancelled_and_failed_requests_leave_nothing_behind() -> None:
    layout = toy.layout_of(2, 2, 2)
    plan = toy.euler_plan("fsrfs")
    denoiser, backend = denoiser_of(layout)
    inputs = inputs_of(layout, 2)
    expected = denoiser.run(plan, **inputs)

    def cancel(row: RowDone) -> None:
        if row.index == 2:
            raise Cancelled

    runs = sum(kind == "run" for kind, _ in backend.log)
    with pytest.raises(Cancelled):
        denoiser.run(plan, **inputs_of(layout, 2, seed=5), on_step=cancel)
    assert sum(kind == "run" for kind, _ in backend.log) == runs + 3
    np.testing.assert_array_equal(denoiser.run(plan, **inputs), expected)

    backend.fail_at = sum(kind == "run" for kind, _ in backend.log) + 1
    with pytest.raises(EngineError, match="on purpose"):
        denoiser.run(plan, **inputs)
    np.testing.assert_array_equal(denoiser.run(plan, **inputs), expected)


def test_threads_wait_for_each_other() -> None:
    layout = toy.layout_of()
    plan = toy.euler_plan("fsfs")
    denoiser, backend = denoiser_of(layout)
    expected = [denoiser.run(plan, **inputs_of(layout, 1, seed)) for seed in range(4)]
    found: dict[int, Any] = {}
    together = threading.Barrier(4)  # all live at once: no thread has the identity of one that ended

    def work(seed: int) -> None:
        together.wait()
        for _ in range(20):
            found[seed] = denoiser.run(plan, **inputs_of(layout, 1, seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(backend.threads) == 5
    for seed in range(4):
        np.testing.assert_array_equal(found[seed], expected[seed])


def test_prepared_plans_are_bounded() -> None:
    layout = toy.layout_of()
    denoiser, backend = denoiser_of(layout)
    inputs = inputs_of(layout, 1)
    for number in range(PREPARED_PROGRAMS + 3):
        denoiser.run(toy.euler_plan("f", name=f"p{number}"), **inputs)
    bound = len(backend.log)
    denoiser.run(toy.euler_plan("f", name="p5"), **inputs)
    assert not any(kind == "bind" for kind, _ in backend.log[bound:])
    denoiser.run(toy.euler_plan("f", name="p0"), **inputs)
    assert any(kind == "bind" for kind, _ in backend.log[bound:])


def test_bad_inputs_are_one_line() -> None:
    layout = toy.layout_of()
    plan = toy.euler_plan("fs")
    denoiser, _ = denoiser_of(layout)
    good = inputs_of(layout, 2)
    bad = [
        (InputError, "batch must be 1 … 3, got 4", inputs_of(layout, 4)),
        (InputError, "noise must have shape", {**good, "noise": good["noise"][:, :1]}),
        (
            InputError,
            "prompt_embeds must have shape",
            {**good, "conditions": {"prompt_embeds": good["conditions"]["prompt_embeds"][:2]}},
        ),
        (InputError, "guidance must be finite", {**good, "guidance": np.array([1.0, np.nan])}),
        (InputError, "noise must be finite", {**good, "noise": good["noise"] * np.inf}),
        (UsageError, "guidance must be given", {**good, "guidance": None}),
    ]
    for kind, message, inputs in bad:
        with pytest.raises(kind, match=message):
            denoiser.run(plan, **inputs)


def test_plans_that_do_not_fit_are_refused() -> None:
    layout = toy.layout_of()
    denoiser, _ = denoiser_of(layout)
    deep = toy.plan_of(
        PlanRow(variant="full", step=0, latents=(1.0,), timestep=1.0),
        PlanRow(variant=None, step=1, latents=(1.0, 2.0), outputs=(1.0,)),
    )
    with pytest.raises(InputError, match="step 1: 2 latents coefficients, the graphs take 1"):
        denoiser.run(deep, **inputs_of(layout, 1))
    noisy = toy.plan_of(
        PlanRow(variant="full", step=0, latents=(1.0,), timestep=1.0),
        PlanRow(variant=None, step=1, latents=(1.0,), draws=1, noise=(0.5,)),
    )
    with pytest.raises(InputError, match="draws noise"):
        denoiser.run(noisy, **inputs_of(layout, 1), draw=noises(1))
    stochastic, _ = denoiser_of(toy.layout_of(stochastic=True))
    with pytest.raises(UsageError, match="no source"):
        stochastic.run(noisy, **inputs_of(layout, 1))
