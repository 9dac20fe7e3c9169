"""What a build costs, in samplings that were counted while it ran, and what its plan is worth on held-out clips.

    OMP_NUM_THREADS=1 python benchmarks/build_cost.py --model cogvideox-tiny \\
        --output benchmarks/results/build-cost-cogvideox-tiny.json
    OMP_NUM_THREADS=1 python benchmarks/build_cost.py --model wan-tiny \\
        --output benchmarks/results/build-cost-wan-tiny.json

Each way of building, for each calibration seed: a whole build with nothing left of the one before, verification
included. Full steps are counted where they run, in the DiT's first block in PyTorch and in the full graph on the
engines; both branches of the guidance together are one. The plans run in PyTorch on clips that no build has seen.
Writes JSON (`record.BuildCost`) and prints its table.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from clips import HeldOutClips
from record import BuildCost, BuildCostRow, this_run, write_result
from tables import described
from torch._subclasses.fake_tensor import FakeTensor

from lemica_trt.backends.onnxruntime.run import OrtCall
from lemica_trt.compiler import work_commands
from lemica_trt.compiler.context import solver_tables
from lemica_trt.compiler.requests import BuildRequest
from lemica_trt.core.metrics import psnr
from lemica_trt.core.progress import Quiet, reporter
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.profile import EFFORTS, Effort, Profile
from lemica_trt.ir.resources import load_profile
from lemica_trt.models import Model, load_model
from lemica_trt.models.scheduler import sampler_table
from lemica_trt.planning.planner import AUTO, Problem, planners
from lemica_trt.planning.step_plan import uncached_plan

BEFORE = Effort(
    samples=8, rollouts=8, validation_samples=32, verify_samples=8, methods=("auto", "lemica", "fitted-flat")
)
"""As builds were before they had an effort: every sample rolled out, five methods tried on 32 samples of their own."""

EXTRA_BUDGETS = (10, 20)
"""Further budgets of the build that shows what those cost."""


class Counting(Quiet):
    """A reporter that counts full steps by the stage that runs them."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._name = ""

    def stage(self, name: str, detail: str) -> None:
        self._name = name

    def count(self, steps: float) -> None:
        self.counts[self._name] += steps  # type: ignore[assignment]  # halves where a pipeline runs branches apart


@contextlib.contextmanager
def counted(counter: Counting) -> Iterator[None]:
    """Count the full steps of all models and engines that run."""
    run = OrtCall.run

    def on_engine(call: OrtCall) -> None:
        counter.count(call._role == "full")
        run(call)

    def in_torch(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module in first_blocks:
            hidden = args[0] if args else kwargs["hidden_states"]
            if not isinstance(hidden, FakeTensor):  # the export's
                counter.count(hidden.shape[0] / 2)

    first_blocks: set[torch.nn.Module] = set()
    load = Model.__init__

    def watched(model: Model, *args: Any, **kwargs: Any) -> None:
        load(model, *args, **kwargs)
        lists = [m for m in model.pipeline.transformer.modules() if isinstance(m, torch.nn.ModuleList)]
        first_blocks.add(lists[0][0])
        lists[0][0].register_forward_pre_hook(in_torch, with_kwargs=True)

    OrtCall.run, Model.__init__ = on_engine, watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        OrtCall.run, Model.__init__ = run, load  # type: ignore[method-assign]


class Clips:
    """Held-out clips by any plan, compared with the uncached run."""

    def __init__(self, model: Model, count: int) -> None:
        self._frames = HeldOutClips(model, count)
        table = sampler_table(model.scheduler(), dynamic_guidance=model.profile.sampling.dynamic_guidance)
        self.table = table
        self._reference = self._frames(uncached_plan(table, guidance_scale=model.profile.sampling.guidance_scale))

    def psnr(self, plan: StepPlan) -> tuple[float, ...]:
        """dB of each clip against the uncached run."""
        return tuple(map(psnr, self._frames(plan), self._reference))


def build(profile: Profile, effort: Effort, seed: int, budgets: tuple[int, ...], folder: Path) -> tuple[Counting, Any]:
    """One build, counted; graphs and engines of an earlier one in the folder stay."""
    for left in (folder / "bundle", folder / "bundle.work" / "journals"):
        shutil.rmtree(left, ignore_errors=True)
    for stage in ("draft", "early", "calibrate", "plan"):
        (folder / "bundle.work" / "records" / f"{stage}.json").unlink(missing_ok=True)
    settings = msgspec.structs.replace(
        profile.calibration,
        samples=effort.samples,
        rollouts=effort.rollouts,
        validation_samples=effort.validation_samples,
        seed=seed,
    )
    request = BuildRequest(budgets=budgets, methods=effort.methods, verify_samples=effort.verify_samples)
    counter = Counting()
    with counted(counter):
        result = work_commands.build(
            msgspec.structs.replace(profile, calibration=settings), folder / "bundle", request, counter
        )
    return counter, result.bundle


def measure(name: str, budget: int, seeds: tuple[int, ...], clips: int) -> BuildCost:
    """All builds of a model, and what their plans are worth."""
    profile, report, rows = load_profile(name), reporter(), list[BuildCostRow]()
    model = load_model(profile)
    held_out = Clips(model, clips)
    ways: dict[str, tuple[Effort, tuple[int, ...]]] = {
        "before": (BEFORE, (budget,)),
        **{effort: (settings, (budget,)) for effort, settings in EFFORTS.items()},
        "normal, further budgets": (EFFORTS["normal"], (budget, *EXTRA_BUDGETS)),
    }
    with tempfile.TemporaryDirectory() as folder:
        for seed in seeds:
            for way, (effort, budgets) in ways.items():
                report.stage(way, f"seed {seed}")
                counter, bundle = build(profile, effort, seed, budgets, Path(folder))
                plan = bundle.plan()
                rows.append(
                    BuildCostRow(
                        way=way,
                        seed=seed,
                        budgets=budgets,
                        full_steps={stage: round(steps) for stage, steps in sorted(counter.counts.items()) if steps},
                        method=plan.method,
                        psnr=held_out.psnr(plan),
                    )
                )
                row = rows[-1]
                report.note(f"{row.total / profile.sampling.steps:.1f} samplings, {np.mean(row.psnr):.1f} dB")
    problem = Problem(
        table=held_out.table,
        guidance_scale=profile.sampling.guidance_scale,
        solver=solver_tables(held_out.table),
    )
    stock = {name: held_out.psnr(planners()[name](problem, budget)) for name in AUTO if name.startswith("stock:")}
    report.close()
    return BuildCost(
        run=this_run(),
        model=name,
        revision=model.revision,
        steps=profile.sampling.steps,
        budget=budget,
        rows=tuple(rows),
        stock=stock,
    )


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="cogvideox-tiny")
    parser.add_argument("--budget", type=int, default=15)
    parser.add_argument("--seeds", default="0,100,200,300", help="of the first calibration sample")
    parser.add_argument("--clips", type=int, default=64)
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    given = parser.parse_args()
    result = measure(given.model, given.budget, tuple(map(int, given.seeds.split(","))), given.clips)
    write_result(result, given.output)
    print(described(result))


if __name__ == "__main__":
    main()
