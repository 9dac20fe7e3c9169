"""Mistakes that people make, and what the command line answers: docs/mistakes.md is made by making them.

Every command runs in this process, in a folder that has `out/tiny`, a bundle without its engines; `out/altered`, one
whose manifest was changed; `work`, an empty folder; `empty.txt`; and `notes.txt`. Nothing is built or downloaded.
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from click.testing import CliRunner

from lemica_trt.cli.main import main

GOLDEN = Path(__file__).parents[1] / "tests/golden/bundle"

TINY = "build --model cogvideox-tiny"

MISTAKES: dict[str, tuple[str, ...]] = {
    "Commands and options of other tools": (
        "generate",
        "list",
        "convert model.onnx",
        "benchmark out/tiny",
        "frobnicate",
        "build cogvideox-tiny",
        f"{TINY} --saveEngine=model.plan",
        f"{TINY} --fp16",
        f"{TINY} --int8",
        f"{TINY} --minShapes=x:1x3",
        f"{TINY} --memPoolSize=workspace:4G",
        f"{TINY} --buget 5",
        f"{TINY} --solver fitted",
        'run out/tiny "a ball" --num-inference-steps 20 -o clip.mp4',
        'run out/tiny "a ball" --num_frames 17 -o clip.mp4',
        "bench out/tiny --avgRuns=10",
    ),
    "Models": (
        "build --budget 15",
        "build --model cogvideox-tinny",
        "build --model out/tiny",
        "build --model notes.toml",
        f"{TINY} --weights nowhere",
        f"{TINY} --lora nowhere.safetensors",
        f"{TINY} --lora somebody/style:strong",
        "trace --model wan-tin",
        "trace --model wan-tiny --argument clean",
    ),
    "Values": (
        f"{TINY} --budget fifteen",
        f"{TINY} --budget 0",
        f"{TINY} --budget 99",
        f"{TINY} --speedup 0.5",
        f"{TINY} --latency 800",
        f"{TINY} --min-psnr high",
        f"{TINY} --schedule 0,7,3",
        f"{TINY} --method fited",
        f"{TINY} --method published",
        f"{TINY} --effort max",
        f"{TINY} --dtype fp8",
        f"{TINY} --dtype bf16",
        f"{TINY} --denoising-steps 1",
        f"{TINY} --frames 8",
        f"{TINY} --height 60",
        f"{TINY} --scheduler DDIMSchedular",
        f"{TINY} --scheduler FlowMatchEulerDiscreteScheduler",
        f"{TINY} --backend abacus",
        f"{TINY} --opset 7",
    ),
    "Flags that exclude each other": (
        f"{TINY} --budget 15 --speedup 3",
        f"{TINY} --schedule 0,7 --budget 2",
        f"{TINY} --error-graph graph.json --samples 2",
        "triton out/tiny",
        "triton out/tiny --output repository --check repository",
    ),
    "Files and folders": (
        f"{TINY} --prompts nowhere.txt",
        f"{TINY} --prompts empty.txt",
        f"{TINY} --prompts work",
        f"{TINY} --error-graph nowhere.json",
        f"{TINY} --calibration-from nowhere",
        f"{TINY} --output out",
        f"{TINY} --output notes.txt",
        f"{TINY} --triton out",
        "inspect nowhere",
        "inspect notes.txt",
        "inspect out/altered",
        'run out/tiny "a ball" -o clip.mp4',
        'run out/tiny "a ball" -o clip.avi',
        'run out/tiny "a ball" -o out/tiny.gif/clip.gif',
        "plan nowhere --budget 5",
        "export out/tiny",
        "engine work --output out/new",
        "engine out/tiny --output out/tiny",
        "verify nowhere",
        "triton --check work",
    ),
    "Plans of a bundle": (
        "inspect out/tiny --plan b99",
        "run out/tiny a big red ball -o clip.gif",
        'run out/tiny "a ball" --backend tensorrt -o clip.gif',
        'run out/tiny "a ball" --capture plan -o clip.gif',
        "plan out/tiny --budget 99",
        "plan out/tiny --default b99",
        "plan out/tiny --remove b99",
        "plan out/tiny --remove uncached",
        "plan out/tiny --remove b3",
        "plan out/tiny --rename b3",
        "plan out/tiny --rename b3=uncached",
        "plan out/tiny --min-psnr 35",
        "plan out/tiny --reference-steps 100",
        "plan out/tiny --samples +4",
        "plan out/tiny --budget 4 --device cuda",
        "compare out/tiny:b3 b3",
        "bench out/tiny --plan b3,b3",
    ),
}
"""Section → commands."""


class Answer(NamedTuple):
    """What one mistake got.

    Attributes:
        command: as it was typed.
        exit_code: see `core.errors`.
        lines: of standard error, without progress.
    """

    command: str
    exit_code: int
    lines: list[str]


def answers() -> dict[str, list[Answer]]:
    """Make all mistakes; those of each section."""
    with _folder():
        return {section: [_answer(command) for command in commands] for section, commands in MISTAKES.items()}


def _answer(command: str) -> Answer:
    done = CliRunner().invoke(main, [*shlex.split(command), "--quiet"])
    return Answer(command, done.exit_code, done.stderr.strip().splitlines())


@contextmanager
def _folder() -> Iterator[None]:
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            shutil.copytree(GOLDEN, "out/tiny")
            shutil.copytree(GOLDEN, "out/altered")
            manifest = Path("out/altered/manifest.json")
            manifest.write_bytes(manifest.read_bytes().replace(b"cogvideox-tiny", b"cogvideox-tony", 1))
            Path("work").mkdir()
            Path("out/tiny.gif").write_text("a file")
            Path("empty.txt").write_text("# no prompt\n")
            Path("notes.txt").write_text("notes\n")
            Path("notes.toml").write_text("notes = 1\n")
            yield
        finally:
            os.chdir(before)


def mistakes_table() -> str:
    """A table a section, in Markdown."""
    parts = []
    for section, found in answers().items():
        rows = [
            f"| `lemica-trt {answer.command}` | {_cell(answer.lines[-1])} | {answer.exit_code} |" for answer in found
        ]
        parts.append("\n".join([f"## {section}\n", "| command | answer | code |", "| --- | --- | --: |", *rows]))
    return "\n\n".join(parts)


def _cell(line: str) -> str:
    text = line.removeprefix("lemica-trt: ")
    for character in "\\|<*_":
        text = text.replace(character, f"\\{character}")
    return text
