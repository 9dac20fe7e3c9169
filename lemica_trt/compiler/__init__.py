"""The ordered list of stages, and the only place that joins them.

    model → sampler → calibrate → plan (select) → export → engine → bundle → verify

Each stage leaves its result in the work folder, named by what it was made from, and is not run again while that is
the same. Torch is imported by the stages that need it, inside the functions.

    work        the work folder: what the stages leave there
    planning    what is known of a model → plans
    stages      the stages, each a function
    budgets     budgets in any unit → plans: measured times, searched qualities
    compile     all of them, in order; and what they would cost
    commands    one at a time, on the files of the one before; and what is done with a finished bundle
"""

from lemica_trt.compiler.commands import (
    Replanned,
    absolute_source,
    calibrate_stage,
    engine_stage,
    export_stage,
    plan_stage,
    profile_of_bundle,
    replan,
    verify_stage,
)
from lemica_trt.compiler.compile import Request, Result, build, check_request, dry_run
from lemica_trt.compiler.planning import fitter, make_plans, planned_solvers, require_graph_fits
from lemica_trt.compiler.stages import (
    assemble,
    calibrate,
    calibration_prompts,
    engines,
    export,
    lower_sampler,
    open_model,
    reference_sampler,
    verifiable,
    verify_bundle,
)
from lemica_trt.compiler.work import TOKENIZER_FILE, Exported, Findings, Work, work_folder
from lemica_trt.ir.report import Answer, Pace, Stage

__all__ = [
    "TOKENIZER_FILE",
    "Answer",
    "Exported",
    "Findings",
    "Pace",
    "Replanned",
    "Request",
    "Result",
    "Stage",
    "Work",
    "absolute_source",
    "assemble",
    "build",
    "calibrate",
    "calibrate_stage",
    "calibration_prompts",
    "check_request",
    "dry_run",
    "engine_stage",
    "engines",
    "export",
    "export_stage",
    "fitter",
    "lower_sampler",
    "make_plans",
    "open_model",
    "plan_stage",
    "planned_solvers",
    "profile_of_bundle",
    "reference_sampler",
    "replan",
    "require_graph_fits",
    "verifiable",
    "verify_bundle",
    "verify_stage",
    "work_folder",
]
