"""Fitted solvers: exact where the model is linear, never worse than what they begin with, the same bits again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lemica_trt.calibrate.fit import FLOOR, Fitter, SampleRun, closest_combination
from lemica_trt.calibrate.replay import Stepper
from lemica_trt.calibrate.trajectories import Trajectories
from lemica_trt.core.errors import InputError, UnsupportedError, UsageError, VerificationError
from lemica_trt.ir.plan import PlanRow, StepPlan, layout_from_plans
from lemica_trt.ir.sampler import SamplerRow, SamplerTable
from lemica_trt.ir.schedule import Schedule
from lemica_trt.ir.step_model import AtGuidance, Latents
from lemica_trt.models import denoise
from lemica_trt.models.denoise import Rollout
from lemica_trt.planning.extrapolation import linear_plan
from lemica_trt.planning.step_plan import uncached_plan
from lemica_trt.testing.toy_model import LATENT_SHAPE, ToyModel, awkward, euler

pytestmark = pytest.mark.cpu

Array = npt.NDArray[np.float64]

PROMPTS = ["a cat", "a dog", "two boats"]
N, SAMPLES, SEED = 12, 3, 5
SCHEDULE = Schedule(num_steps=N, full_steps=(0, 2, 4, 7, 10))


def fitter(model: ToyModel, journal: Path, **changes: Any) -> Fitter:
    arguments: dict[str, Any] = {"table": euler(N), "prompts": PROMPTS, "samples": SAMPLES, "seed": SEED} | changes
    return Fitter(model, reference=arguments.pop("reference", arguments["table"]), journal=journal, **arguments)


def run(model: ToyModel, plan: StepPlan, s: int) -> Array:
    return denoise(model, plan, model.embed([PROMPTS[s % 3]]), model.noise(SEED + s)[None]).double().numpy()


def squared_errors(model: ToyModel, plan: StepPlan, reference: StepPlan) -> Array:
    return np.array([np.square(run(model, plan, s) - run(model, reference, s)).sum() for s in range(SAMPLES)])


class Linear(torch.nn.Module):
    """m = A·x, A with so many different eigenvalues: whatever comes of x lies in so many dimensions."""

    def __init__(self, eigenvalues: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(1)
        basis = torch.linalg.qr(torch.randn(12, 12, generator=random, dtype=torch.float64))[0]
        values = torch.linspace(-1.5, 2.0, eigenvalues, dtype=torch.float64).repeat(12)[:12]
        self.matrix = (basis @ torch.diag(values) @ basis.T).float()

    def forward(self, hidden_states: torch.Tensor, **others: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        output = (hidden_states.flatten(1) @ self.matrix).unflatten(1, LATENT_SHAPE)
        return output, output


def multistep(num_steps: int) -> SamplerTable:
    """Reads two latents and two outputs back (a sampler without a fine grid of its own)."""
    rows = [SamplerRow(latents=(1.0,), timestep=1000.0)]
    for i in range(1, num_steps + 1):
        rows.append(
            SamplerRow(
                latents=(0.9, 0.1),
                outputs=(-1.5 / num_steps, 0.5 / num_steps)[: min(i, 2)],
                timestep=None if i == num_steps else 1000.0 * (1 - i / num_steps),
            )
        )
    return SamplerTable(scheduler="Multistep", rows=tuple(rows))


# --- the fit of one row --------------------------------------------------------------------------------------------


def grams_of(vectors: Array) -> Array:
    return np.einsum("sid,sjd->sij", vectors, vectors)


def objective(grams: Array, weights: Array) -> float:
    signed = np.append(-weights, 1.0)
    errors = np.einsum("i,sij,j->s", signed, grams, signed)
    return float(np.log(np.maximum(errors, 0) + FLOOR * grams[:, -1, -1]).sum())


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), terms=st.integers(1, 5), samples=st.integers(1, 4), dimension=st.integers(2, 9))
def test_a_fit_is_never_worse_than_its_start(seed: int, terms: int, samples: int, dimension: int) -> None:
    random = np.random.default_rng(seed)
    vectors = random.standard_normal((samples, terms + 1, dimension)) * 10 ** random.uniform(-2, 2, (samples, 1, 1))
    grams, start = grams_of(vectors), random.standard_normal(terms)
    assert objective(grams, closest_combination(grams, start)) <= objective(grams, start)


def test_one_sample_is_least_squares_and_a_sum_is_found() -> None:
    random = np.random.default_rng(0)
    vectors = random.standard_normal((1, 4, 20))
    expected = np.linalg.lstsq(vectors[0, :3].T, vectors[0, 3], rcond=None)[0]
    np.testing.assert_allclose(closest_combination(grams_of(vectors), np.zeros(3)), expected, rtol=1e-6)
    several, weights = random.standard_normal((5, 4, 20)), np.array([0.9, -0.4, 0.1])
    several[:, 3] = np.einsum("i,sid->sd", weights, several[:, :3])
    np.testing.assert_allclose(closest_combination(grams_of(several), np.zeros(3)), weights, rtol=1e-5)


def test_the_logarithm_is_minimised_not_the_sum() -> None:
    """One sample that no weight fits does not draw the weights away from nine that one weight fits."""
    random = np.random.default_rng(3)
    vectors = random.standard_normal((10, 2, 50))
    vectors[1:, 1] = 0.7 * vectors[1:, 0] + 1e-3 * random.standard_normal((9, 50))
    vectors[0] *= 10
    (weight,) = closest_combination(grams_of(vectors), np.zeros(1))
    assert weight == pytest.approx(0.7, abs=1e-3)
    gradient = objective(grams_of(vectors), np.array([weight + 1e-4])) - objective(
        grams_of(vectors), np.array([weight - 1e-4])
    )
    assert abs(gradient) < 1e-3, "not at a minimum"


# --- whole solvers -------------------------------------------------------------------------------------------------


def test_a_fit_to_another_models_runs_corrects_the_model(tmp_path: Path) -> None:
    """All steps in full of a model that is a tenth too loud: with the plain one as target its runs end where those of
    the plain one end."""
    plain, loud = ToyModel(), ToyModel()
    loud.pipeline.transformer.head.weight.data *= 1.1
    loud.pipeline.transformer.head.bias.data *= 1.1
    schedule = Schedule(num_steps=N, full_steps=tuple(range(N)))
    found = fitter(loud, tmp_path / "fits", target=plain)
    plan, own = found(schedule), fitter(loud, tmp_path / "own")(schedule)
    exact = [run(plain, uncached_plan(euler(N), guidance_scale=3.0), s) for s in range(SAMPLES)]
    for s in range(SAMPLES):
        size = np.square(exact[s]).sum()
        assert np.square(run(loud, plan, s) - exact[s]).sum() < 1e-6 * size
        assert np.square(run(loud, own, s) - exact[s]).sum() > 1e-4 * size
    assert found.evaluations == 2 * SAMPLES * N, "the target's runs, and those that are fitted"
    with pytest.raises(InputError, match="another"):  # the journal is bound to the target
        fitter(loud, tmp_path / "fits")


@pytest.mark.parametrize("eigenvalues", [2, 3, 5])
@pytest.mark.parametrize("table", [euler(N), multistep(N)], ids=["euler", "multistep"])
def test_a_linear_model_is_solved_exactly_once_enough_is_read(
    tmp_path: Path, eigenvalues: int, table: SamplerTable
) -> None:
    """Five outputs and a latent span all that a linear model with five eigenvalues can do."""
    model = ToyModel(guidance_scale=1.0)
    model.split = model.split._replace(full=Linear(eigenvalues))
    plan = fitter(model, tmp_path / "j", table=table)(SCHEDULE)
    reference = uncached_plan(table, guidance_scale=1.0)
    start = linear_plan(SCHEDULE, table, guidance_scale=1.0)
    fitted, extrapolated = (squared_errors(model, p, reference).max() for p in (plan, start))
    assert fitted < 1e-8 and extrapolated > 1e-2


def test_each_row_is_nearer_than_the_extrapolated_row_from_there(tmp_path: Path) -> None:
    model, table = ToyModel(), multistep(N)
    plan = fitter(model, tmp_path / "j", table=table)(SCHEDULE)
    start = linear_plan(SCHEDULE, table, guidance_scale=3.0)
    layout = layout_from_plans([plan, start], latent_shape=LATENT_SHAPE, guided=True)
    logs = np.zeros((2, len(plan.rows)))
    for s in range(SAMPLES):
        path: dict[int, torch.Tensor] = {}

        def keep(row: PlanRow, result: dict[str, torch.Tensor], path: dict[int, torch.Tensor] = path) -> None:
            path[row.step] = result["latents"]

        embeds, noise = model.embed([PROMPTS[s]]), model.noise(SEED + s)[None]
        denoise(model, uncached_plan(table, guidance_scale=3.0), embeds, noise, on_row=keep)
        rollout = Rollout(model, layout, embeds, noise, guidance_scale=3.0)
        for k, row in enumerate(plan.rows):
            for which, candidate in enumerate((row, start.rows[k])):
                history = [*zip(candidate.latents, rollout.latents), *zip(candidate.outputs, rollout.outputs)]
                history += zip(candidate.guidance_terms, rollout.guidance_terms)
                latents = sum((c * x.double() for c, x in history), torch.zeros(1, *LATENT_SHAPE).double())
                error = float((latents - path[row.step]).square().sum())
                logs[which, k] += np.log(error + FLOOR * float(path[row.step].double().square().sum()))
            rollout(row)
    assert (logs[0, 1:] <= logs[1, 1:] + 1e-6).all()
    assert logs[0, -1] < logs[1, -1] - 1, "nothing was gained at the end"


def test_branches_apart_are_never_farther_than_joined(tmp_path: Path) -> None:
    """Row by row, from the same histories, on the samples that were fitted to; and nearer at the end."""
    model, table = ToyModel(), euler(N)
    plan = fitter(model, tmp_path / "j", table=table)(SCHEDULE)
    assert plan.guidance_history == 5
    runs, targets, ends = [], [], []
    for s in range(SAMPLES):
        path = []
        embeds, noise = model.embed([PROMPTS[s]]), model.noise(SEED + s)[None]
        uncached = uncached_plan(table, guidance_scale=3.0)
        denoise(model, uncached, embeds, noise, on_row=lambda row, result, path=path: path.append(result["latents"]))
        layout = layout_from_plans([plan], latent_shape=LATENT_SHAPE, guided=True)
        runs.append(Rollout(model, layout, embeds, noise, guidance_scale=3.0))
        targets.append([path[step] for step in (*SCHEDULE.full_steps[1:], N)])
        ends.append(path[-1])
    for k, row in enumerate(plan.rows):
        if k:
            vectors = np.array(
                [
                    [
                        v.double().numpy().ravel()
                        for v in (run.latents[0], *run.outputs, *run.guidance_terms, target[k - 1])
                    ]
                    for run, target in zip(runs, targets)
                ]
            )
            weights = np.array([*row.latents, *row.outputs, *row.guidance_terms])
            count = 1 + len(row.outputs)
            grams = grams_of(vectors)
            without = np.delete(np.delete(grams, range(count, len(weights)), 1), range(count, len(weights)), 2)
            start = linear_plan(SCHEDULE, table, guidance_scale=3.0).rows[k]
            padded = np.array([*start.latents, *start.outputs, *[0.0] * (count - 1 - len(start.outputs))])
            apart, joined = objective(grams, weights), objective(without, closest_combination(without, padded))
            assert apart <= joined + 1e-9
        for run in runs:
            run(row)
    assert apart < joined - 1, "nothing was gained at the end"


def test_fitted_plans_are_what_the_fit_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan, run from the noise on, arrives at the very latents that its last row was fitted with."""
    model = ToyModel()
    fits = fitter(model, tmp_path / "j")
    finals: list[Latents] = []
    call = SampleRun.__call__

    def watched(self: SampleRun, row: PlanRow) -> None:
        call(self, row)
        finals.extend([self.latents[0]] if row.variant is None else [])

    monkeypatch.setattr(SampleRun, "__call__", watched)
    plan = fits(SCHEDULE)
    monkeypatch.undo()
    assert (plan.full_steps, plan.scheduler, plan.method) == (SCHEDULE.full_steps, "Euler", "fitted")
    assert plan.reference_steps is None and plan.sampler_digest == euler(N).digest
    assert len(finals) == SAMPLES
    for s, final in enumerate(finals):
        assert np.array_equal(run(model, plan, s)[0], final)


def test_the_same_bits_again_from_the_journal_and_without(tmp_path: Path) -> None:
    model, other = ToyModel(), Schedule(num_steps=N, full_steps=(0, 3, 8))
    first = fitter(model, tmp_path / "j")
    assert first.evaluations_for(SCHEDULE) == SAMPLES * (N + 5)
    plans = [first(SCHEDULE), first(other)]
    assert first.evaluations == SAMPLES * (N + 5 + 3), "the references run once"
    again = fitter(model, tmp_path / "j")
    assert again.evaluations_for(other) == 0
    assert [again(SCHEDULE), again(other)] == plans and again.evaluations == 0
    data = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(data[: data.rindex(b"\n", 0, -1) + 9])  # killed while it wrote the second
    resumed = fitter(model, tmp_path / "j")
    assert [resumed(SCHEDULE), resumed(other)] == plans and resumed.evaluations == SAMPLES * (N + 3)
    assert (tmp_path / "j").read_bytes() == data
    assert fitter(model, tmp_path / "k")(other) == plans[1]


def test_fits_of_something_else_are_not_taken(tmp_path: Path) -> None:
    model = ToyModel()
    fitter(model, tmp_path / "j")(SCHEDULE)
    for changes in ({"samples": 2}, {"reference": euler(2 * N)}, {"prompts": ["a fish"]}):
        with pytest.raises(InputError, match="expected a journal of this measurement"):
            fitter(model, tmp_path / "j", **changes)


def test_a_reference_of_more_steps_is_what_is_fitted_to(tmp_path: Path) -> None:
    """Twice the steps: the plan keeps N steps' names, and is nearer to 2·N steps than N steps themselves."""
    model, table, fine = ToyModel(), euler(N), euler(2 * N)
    schedule = Schedule(num_steps=N, full_steps=tuple(range(0, N, 2)))
    fits = fitter(model, tmp_path / "j", reference=fine)
    assert fits.evaluations_for(schedule) == SAMPLES * (2 * N + 6)
    plan = fits(schedule)
    assert (plan.reference_steps, plan.num_steps, plan.full_steps) == (2 * N, N, schedule.full_steps)
    assert [row.timestep for row in plan.rows[:-1]] == [table.rows[f].timestep for f in schedule.full_steps]
    exact = uncached_plan(fine, guidance_scale=3.0)
    errors = [squared_errors(model, p, exact) for p in (plan, uncached_plan(table, guidance_scale=3.0))]
    assert np.log(errors[0]).mean() < np.log(errors[1]).mean()


def test_a_fit_across_guidance_scales_is_nearer_at_the_highest_and_as_near_at_its_own(tmp_path: Path) -> None:
    scales = {"alone": ToyModel(), "across": ToyModel(guidance_range=(1.5, 12.0))}
    samples = 8
    assert scales["across"].profile.sampling.fit_scales(samples) == (3.0, 12.0, 3.0, 8.5, 3.0, 5.0, 3.0, 1.5)
    assert scales["across"].profile.sampling.fit_scales(2) == (3.0, 12.0)
    errors = {}
    for name, model in scales.items():
        kept = Trajectories(tmp_path / name)
        for s in range(samples):  # as calibration leaves them
            kept.run(Stepper(model, euler(N), 1), PROMPTS[s % 3], SEED + s, f"sample {s}")
        fits = fitter(model, tmp_path / f"{name}.jsonl", samples=samples, trajectories=kept.folder)
        expected = samples * SCHEDULE.budget + (4 * N if name == "across" else 0)  # the uncached runs at other scales
        assert fits.evaluations_for(SCHEDULE) == expected
        plan = fits(SCHEDULE)
        assert fits.evaluations == expected
        for scale in (3.0, 12.0):
            there = AtGuidance(model, scale)
            exact = uncached_plan(euler(N), guidance_scale=scale)
            moved = msgspec.structs.replace(plan, guidance_scale=scale)
            found = [np.square(there.run(moved, p, 9) - there.run(exact, p, 9)).sum() for p in PROMPTS]
            errors[name, scale] = float(np.log(found).mean())
    assert errors["across", 12.0] < errors["alone", 12.0] - 1
    assert errors["across", 3.0] < errors["alone", 3.0] + 0.5
    with pytest.raises(InputError, match="expected a journal of this measurement"):
        fitter(scales["alone"], tmp_path / "across.jsonl", samples=samples)


def test_what_cannot_be_fitted(tmp_path: Path) -> None:
    model = ToyModel()
    with pytest.raises(UnsupportedError, match="draws noise"):
        fitter(model, tmp_path / "j", table=awkward(N))
    with pytest.raises(InputError, match="prompts"):
        fitter(model, tmp_path / "j", prompts=[])
    with pytest.raises(UsageError, match="more reference steps"):
        fitter(model, tmp_path / "j", reference=euler(N - 1))
    with torch.no_grad():
        model.pipeline.transformer.head.bias.fill_(torch.inf)
    with pytest.raises(VerificationError, match="sample 0"):
        fitter(model, tmp_path / "j")(SCHEDULE)
