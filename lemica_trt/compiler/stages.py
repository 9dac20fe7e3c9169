"""The stages of a build, in order; each reads artifacts, and writes some. `stage` runs them.

    lower      profile → sampler, reference
    layout     sampler, methods → the interface of the graphs: as deep as the sampler and any planner can need
    export     model, layout → graphs
    engine     graphs → engines
    time       engines → what steps take                              only where a budget is in a unit of time
    draft      engines → a bundle with a plan that takes no calibration, until there is a better one
    early      a few samples of the calibration → the draft with a fitted plan
    calibrate  model, sampler, prompts → error graph, Gram matrices   only where a method searches them
    plan       calibration, prompts, budgets, times → plans, trials, front
    bundle     everything → a bundle beside the one that it will replace
    verify     bundle, held-out prompts → report

Graphs come before plans: coefficients are an input of theirs, so that whatever is planned later runs on them; where a
plan reads less far back, it is multiplied by 0. PyTorch is imported inside the functions that need it.
`calibrate` and `plan` run the model in PyTorch or, with `--calibrate-on engine`, on the engines.
"""

from __future__ import annotations

from lemica_trt.compiler import bundle_stages, draft_stage, early_stage, estimates, graph_stages, plan_stages
from lemica_trt.compiler.context import Context
from lemica_trt.compiler.stage import Stage

MODEL = ("weights", "libraries", "profile.family", "profile.dtype", "profile.text_length", "profile.shape")
"""What decides the model that is loaded."""


def on_engines(context: Context) -> tuple[str, ...]:
    """What a stage reads that runs the model on engines."""
    if context.inputs.request.calibrate_on == "torch":
        return ()
    return ("request.calibrate_on", "machine", "graphs", "engines", "uncached")


STAGES = (
    Stage(
        "lower",
        reads=(*MODEL, "profile.sampling", "request.reference_steps"),
        writes=("model", "sampler", "uncached", "reference"),
        packages=("models", "planning"),
        run=graph_stages.run_lower,
        estimate=estimates.lower,
        ensures=graph_stages.require_plannable,
        command="lemica-trt calibrate … --output {work}",
    ),
    Stage(
        "layout",
        reads=("libraries", "model", "sampler", "reference", "request.methods", "request.schedule"),
        writes=("layout",),
        packages=("models", "planning"),
        run=graph_stages.run_layout,
        estimate=estimates.layout,
        command="lemica-trt export {work}",
    ),
    Stage(
        "export",
        reads=(*MODEL, "profile.opset", "layout"),
        writes=("graphs",),
        packages=("models", "export"),
        run=graph_stages.run_export,
        estimate=estimates.export,
        command="lemica-trt export {work}",
    ),
    Stage(
        "engine",
        reads=("machine", "graphs", "request.backends", "request.options"),
        writes=("engines",),
        packages=("backends",),
        run=graph_stages.run_engine,
        estimate=estimates.engine,
        command="lemica-trt engine {work} --output BUNDLE",
    ),
    Stage(
        "time",
        reads=("machine", "graphs", "engines", "uncached", "profile"),
        writes=("times",),
        packages=("backends", "runtime", "evaluate"),
        run=graph_stages.run_time,
        estimate=estimates.time,
        is_needed=lambda context: context.inputs.request.is_timed,
        command="lemica-trt plan {work}",
    ),
    Stage(
        "draft",
        reads=(
            *(*MODEL, "machine", "profile", "model", "sampler", "uncached", "reference", "layout", "graphs", "engines"),
            *("times", "held_out", "request.budgets", "request.methods", "request.verify_samples"),
        ),
        writes=("draft",),
        packages=("models", "planning", "bundle", "runtime", "evaluate"),
        run=draft_stage.run_draft,
        estimate=estimates.draft,
        is_needed=lambda context: context.inputs.request.has_draft,
        is_whole=draft_stage.is_there,
        command="lemica-trt build …",
    ),
    Stage(
        "early",
        reads=(
            *(
                "libraries",
                "machine",
                "profile",
                "model",
                "sampler",
                "layout",
                "uncached",
                "graphs",
                "engines",
                "times",
            ),
            *("draft", "prompts", "held_out", "request.budgets", "request.methods"),
        ),
        writes=("early",),
        packages=("models", "backends", "bundle", "runtime", "calibrate", "planning", "evaluate"),
        run=early_stage.run_early,
        also_reads=on_engines,
        estimate=estimates.early,
        is_needed=lambda context: context.inputs.early_samples > 0,
        is_whole=draft_stage.is_there,
        command="lemica-trt build …",
    ),
    Stage(
        "calibrate",
        reads=("libraries", "model", "sampler", "profile.sampling", "profile.calibration", "prompts", "given"),
        writes=("calibration",),
        packages=("models", "backends", "runtime", "calibrate", "evaluate"),
        run=plan_stages.run_calibrate,
        also_reads=on_engines,
        estimate=estimates.calibrate,
        is_needed=lambda context: context.inputs.request.needs_calibration,
        command="lemica-trt calibrate … --output {work}",
    ),
    Stage(
        "plan",
        reads=(
            *("libraries", "model", "sampler", "reference", "layout", "times", "calibration", "prompts"),
            *("profile.name", "profile.sampling", "profile.calibration"),
            *("request.budgets", "request.methods", "request.schedule", "request.pareto"),
        ),
        writes=("plans", "trials", "front"),
        packages=("models", "backends", "runtime", "calibrate", "planning", "evaluate"),
        run=plan_stages.run_plan,
        also_reads=on_engines,
        estimate=estimates.plan,
        command="lemica-trt plan {work}",
    ),
    Stage(
        "bundle",
        reads=(
            *("profile", "model", "sampler", "uncached", "reference", "graphs", "engines"),
            *("prompts", "calibration", "plans", "trials", "front"),
        ),
        writes=("bundle",),
        packages=("bundle", "runtime"),
        run=bundle_stages.run_bundle,
        estimate=estimates.bundle,
        is_whole=lambda context: bundle_stages.written_bundle(context) is not None,
        command="lemica-trt engine {work} --output BUNDLE",
    ),
    Stage(
        "verify",
        reads=(*MODEL, "machine", "draft", "bundle", "held_out", "request.verify_samples"),
        writes=("verified",),
        packages=("models", "runtime", "evaluate", "report"),
        run=bundle_stages.run_verify,
        estimate=estimates.verify,
        is_needed=lambda context: context.inputs.request.verify_samples > 0,
        is_whole=bundle_stages.is_verified,
        command="lemica-trt verify BUNDLE",
    ),
)
"""All stages, in the order in which they run."""
