"""Bundles of tiny random pipelines that have no family: traced, planned, built."""

from __future__ import annotations

import warnings
from pathlib import Path

from click.testing import CliRunner, Result

from lemica_trt.cli.main import main

FLAGS = {
    "flux": ("--height", 32, "--width", 48, "--max-sequence-length", 64),
    "chroma": ("--height", 32, "--width", 48, "--max-sequence-length", 64),
    "hunyuanvideo": ("--height", 32, "--width", 48, "--frames", 9),
    "ltx": ("--height", 32, "--width", 64, "--frames", 9),
    "latte": ("--height", 32, "--width", 32, "--frames", 4, "--guidance-scale", 3),
    "open-sora": ("--height", 32, "--width", 48, "--frames", 6, "--max-sequence-length", 64, "--guidance-scale", 3),
    "qwen-image": ("--height", 32, "--width", 48, "--max-sequence-length", 64),
    "wan2.2": ("--height", 32, "--width", 48, "--frames", 9, "--max-sequence-length", 64),
    "sd3": ("--height", 32, "--width", 48, "--max-sequence-length", 64),
    "sana": ("--height", 64, "--width", 96, "--max-sequence-length", 64),
    "cogview4": ("--height", 32, "--width", 48, "--max-sequence-length", 64),
    "mochi": ("--height", 32, "--width", 48, "--frames", 7),
    "hunyuanvideo-1.5": ("--height", 32, "--width", 48, "--frames", 9),
    "lumina2": ("--height", 32, "--width", 48, "--max-sequence-length", 128),
    "z-image": ("--height", 32, "--width", 48, "--max-sequence-length", 64),
    "ltx2": ("--height", 64, "--width", 64, "--frames", 9, "--max-sequence-length", 64),
    "wan-modular": ("--height", 32, "--width", 48, "--frames", 9, "--max-sequence-length", 64),
    "z-image-modular": ("--height", 32, "--width", 48, "--max-sequence-length", 64),
    "hunyuanimage": ("--height", 32, "--width", 48, "--max-sequence-length", 64),
    "hidream": ("--height", 128, "--width", 128, "--max-sequence-length", 64),
    "flux2": ("--height", 32, "--width", 48, "--max-sequence-length", 256),
    "flux2-klein": ("--height", 32, "--width", 48, "--max-sequence-length", 64),
    "wan2.2-ti2v": ("--height", 64, "--width", 64, "--frames", 5, "--max-sequence-length", 64),
}

IMAGES = {
    "cogvideox-i2v": ("--height", 32, "--width", 48, "--frames", 9, "--max-sequence-length", 64),
    "wan-i2v": ("--height", 32, "--width", 48, "--frames", 9),
    "wan-flf2v": ("--height", 32, "--width", 48, "--frames", 9),
}
"""Those that take an image."""

LAST = ("wan-flf2v",)
"""Of these, those that take a last one, too."""

NAMED = {"wan2.2-ti2v": ("wan2.2-ti2v-5b", "--dtype", "fp32", "--flow-shift", 3)}
"""Pipelines of a class that takes a profile."""

SMALL = ("--samples", 1, "--validation-samples", 1, "--max-skip", 2, "--method", "lemica", "--verify-samples", 1)

SHARED = {
    "flux": ("--budget", 3, *SMALL),
    "qwen-image": ("--schedule", "0,2,4", "--verify-samples", 0),
    "cogvideox-i2v": ("--schedule", "0,2,4", "--verify-samples", 0),
}
"""Bundles that several files of tests read, and how they are planned; `conftest.traced` builds each once."""


def lemica(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)], env={"HF_HUB_OFFLINE": "1", "COLUMNS": "120"})


def saved(name: str, folder: Path) -> Path:
    from lemica_trt.testing.pipelines import tiny_pipeline

    tiny_pipeline(name).save_pretrained(str(folder))  # modular ones take no path
    return folder


def built(name: str, folder: Path, *flags: object) -> Path:
    """A bundle with five steps, below `folder`."""
    with warnings.catch_warnings():  # of diffusers, transformers and exporters
        warnings.simplefilter("ignore")
        source, output = saved(name, folder / name), folder / "bundle"
        model = ("--model", *NAMED.get(name, (source,)), "--weights", source)[: None if name in NAMED else 2]
        done = lemica(
            *("build", *model, *(FLAGS | IMAGES)[name], "--denoising-steps", 5),
            *(*(flags or ("--schedule", "0,2,4", "--verify-samples", 1)), "--quiet", "--output", output),
        )
    assert done.exit_code == 0, done.output
    return output
