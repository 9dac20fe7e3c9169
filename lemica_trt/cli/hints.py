"""What people type who know trtexec, diffusers, Polygraphy or optimum-cli, and what it is called here.

Options that mean the same are accepted (`Flag.aliases`); these are the others. Only text: nothing is looked up.
"""

from __future__ import annotations

from collections.abc import Collection

COMMANDS = {
    "apply": "plans are applied in Python: lemica_trt.apply(pipe, plan)",
    "bench-mark": "lemica-trt bench BUNDLE",
    "benchmark": "lemica-trt bench BUNDLE",
    "check": "lemica-trt verify BUNDLE",
    "compile": "lemica-trt build --model MODEL",
    "convert": "lemica-trt build --model MODEL",
    "create": "lemica-trt build --model MODEL",
    "diff": "lemica-trt compare A B",
    "dry-run": "lemica-trt build --model MODEL --dry-run",
    "env": "lemica-trt doctor",
    "eval": "lemica-trt verify BUNDLE",
    "evaluate": "lemica-trt verify BUNDLE",
    "fit": "lemica-trt build --model MODEL --method fitted; in Python: lemica_trt.fit(pipe, budget)",
    "generate": 'lemica-trt run BUNDLE "a prompt" --output clip.mp4',
    "help": "lemica-trt COMMAND --help",
    "infer": 'lemica-trt run BUNDLE "a prompt" --output clip.mp4',
    "inference": 'lemica-trt run BUNDLE "a prompt" --output clip.mp4',
    "info": "lemica-trt inspect BUNDLE",
    "list": "lemica-trt models; the plans of a bundle: lemica-trt inspect BUNDLE",
    "list-models": "lemica-trt models",
    "ls": "lemica-trt inspect BUNDLE",
    "optimize": "lemica-trt build --model MODEL",
    "planner": "lemica-trt methods",
    "planners": "lemica-trt methods",
    "plans": "lemica-trt inspect BUNDLE",
    "predict": 'lemica-trt run BUNDLE "a prompt" --output clip.mp4',
    "profile": "lemica-trt bench BUNDLE; for profiles of models: lemica-trt models",
    "remove": "lemica-trt plan BUNDLE --remove NAME",
    "rename": "lemica-trt plan BUNDLE --rename OLD=NEW",
    "rm": "lemica-trt plan BUNDLE --remove NAME",
    "sample": 'lemica-trt run BUNDLE "a prompt" --output clip.mp4',
    "serve": "lemica-trt triton BUNDLE --output DIR writes a model repository for Triton Inference Server",
    "server": "lemica-trt triton BUNDLE --output DIR writes a model repository for Triton Inference Server",
    "show": "lemica-trt inspect BUNDLE",
    "test": "lemica-trt verify BUNDLE",
    "time": "lemica-trt bench BUNDLE",
    "train": "nothing is trained: lemica-trt build --model MODEL calibrates and fits plans",
    "validate": "lemica-trt verify BUNDLE",
    "version": "lemica-trt --version",
}
"""Commands that there are not → what does that."""

_BUILT = "it is part of a bundle: give it to lemica-trt build"
_PLAN = "the steps are part of a plan: name one with --plan; lemica-trt inspect BUNDLE shows them"
_SHAPE = "--shape FxHxW, one of the bundle's; lemica-trt shape BUNDLE --shape FxHxW adds one"

OPTIONS = {
    "best": "--dtype fp16 or bf16: one precision for the whole transformer",
    "cache-dir": "set HF_HOME, where downloads of the hub are kept",
    "cpu": "--device cpu",
    "cuda": "--device cuda",
    "engine": "engines are files of a bundle: name its folder",
    "export-profile": "lemica-trt bench BUNDLE --export-times FILE.json has the times of every step",
    "force": "nothing to force: an older bundle is replaced when the new one is whole",
    "bf16": "--dtype bf16",
    "fp16": "--dtype fp16",
    "fp32": "--dtype fp32",
    "int8": "of a finished bundle: lemica-trt engine BUNDLE --quantize int8 --output DIR",
    "fp8": "of a finished bundle: lemica-trt engine BUNDLE --quantize fp8 --output DIR",
    "int4": "of quantised precisions there are int8 and fp8: lemica-trt engine BUNDLE --quantize int8 --output DIR",
    "load-engine": "engines are files of a bundle: name its folder",
    "lora": "LoRA weights are fused when a bundle is built, lemica-trt build --lora FILE:SCALE, or added to a clip: "
    "lemica-trt run --lora FILE:SCALE",
    "max-shapes": "shapes are --shape FxHxW, repeated for several, and --max-batch",
    "min-shapes": "shapes are --shape FxHxW, repeated for several, and --max-batch",
    "no-cache": "give another --output: finished stages are kept beside it",
    "num-images-per-prompt": "one clip a request: repeat with another --seed",
    "num-videos-per-prompt": "one clip a request: repeat with another --seed",
    "onnx": "the graphs are exported from the model: --model; those in a work folder: lemica-trt engine WORK",
    "opt-shapes": "shapes are --shape FxHxW, repeated for several, and --max-batch",
    "overwrite": "nothing to force: an older bundle is replaced when the new one is whole",
    "plan-name": "--plan NAME",
    "plugins": "no plugins are loaded",
    "resume": "nothing to say: the same command goes on where it was",
    "save-engine": "engines are written into the bundle: --output DIR",
    "shapes": "shapes are --shape FxHxW, repeated for several, and --max-batch",
    "skip-steps": "--schedule STEP,STEP,… names the full steps",
    "threshold": "--min-psnr DB: the fewest full steps that are as good",
    "timing-cache-file": "the timing cache lies in the work folder, and is used again",
    "use-cuda-graph": "--capture plan or step, with lemica-trt run",
    "verbose": "progress is shown unless --quiet; --debug shows the traceback of an error",
    "yes": "nothing is asked",
}
"""Options that there are not, without dashes → what to write, wherever they are typed."""

OF_COMMANDS = {
    "bench": {
        "avg-runs": "--iterations N",
        "percentile": "p50, p95 and p99 are shown; all times are in --export-times FILE.json",
        "plans": "--plan NAME,NAME",
        "prompt": "--prompts FILE",
        "requests": "--iterations N",
        "runs": "--iterations N",
        "warmup": "--warm-up MS",
        "concurrency": "--batch N: requests at once; a server: lemica-trt triton BUNDLE",
        "streams": "--batch N: requests at once",
    },
    "compare": {
        "plan": "lemica-trt compare BUNDLE:PLAN BUNDLE:PLAN",
        "threshold": "--min-psnr DB",
        "seed": "seeds are those of verification, one a clip; prompts: --prompts FILE",
    },
    "run": {
        **{name: _PLAN for name in ("steps", "num-inference-steps", "denoising-steps", "budget", "speedup")},
        **{name: _SHAPE for name in ("size", "resolution")},
        **{name: _BUILT for name in ("dtype", "fp16", "bf16", "scheduler", "flow-shift", "method")},
        "prompt": 'the prompt is the second argument: lemica-trt run BUNDLE "a prompt" -o clip.mp4',
        "model": 'the bundle is the first argument: lemica-trt run BUNDLE "a prompt" -o clip.mp4',
        "fps": "the model makes so many frames a second as its profile says",
        "format": "the ending of --output says: .mp4, .gif, .png or .npy",
        "batch-size": "one clip a command; batches: lemica_trt.load(BUNDLE)([…]) in Python",
        "num-prompts": "one clip a command; batches: lemica_trt.load(BUNDLE)([…]) in Python",
    },
    "build": {
        "prompt": "prompts of the calibration are a file: --prompts FILE; a clip: lemica-trt run",
        "plan": "plans are made for a --budget, a --speedup, a --latency or a --min-psnr",
        "quality": "--min-psnr DB",
        "full-steps": "--budget B",
        "seeds": "--seed N is the first seed of the calibration, --samples K how many follow",
        "precision": "--dtype fp32, fp16 or bf16",
        "name": "--output DIR names the bundle",
    },
    "plan": {
        "delete": "--remove NAME",
        "name": "plans are named after their budget; afterwards: --rename OLD=NEW",
        "list": "lemica-trt inspect BUNDLE",
        "num-inference-steps": "the steps are part of the build; the full ones among them: --budget B",
        "steps": "the steps are part of the build; the full ones among them: --budget B",
        "model": "a bundle is planned without the model: lemica-trt plan BUNDLE --budget B",
    },
}
"""The same for one command; these go first."""


def hint_of_option(command: str, option: str, known: Collection[str]) -> str | None:
    """What to write instead of an option that a command does not have.

    Args:
        option: as it was typed, dashes included.
        known: options that the command has: nobody is sent to one that is not there.

    Returns:
        None: nothing is known of it.
    """
    name = option.lstrip("-")
    found = OF_COMMANDS.get(command, {}).get(name) or OPTIONS.get(name)
    if found is None or (found.startswith("--") and found.split()[0].rstrip(",:") not in known):
        return None
    return found
