"""What importing each room pulls in, how long it takes, and which way imports point."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lemica_trt

ROOT = Path(__file__).parent.parent

HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "cuda",
    "av",
    "PIL",
    "tokenizers",
    "ray",
}
HEAVY |= {
    "matplotlib",
    "scipy",
    "pickletools",
    "sentencepiece",
    "safetensors",
    "accelerate",
    "huggingface_hub",
    "onnxscript",
}

LIGHT = [
    "lemica_trt",
    "lemica_trt.errors",
    "lemica_trt.values",
    "lemica_trt.spec",
    "lemica_trt.text",
    "lemica_trt.resources",
    "lemica_trt.sampler",
    "lemica_trt.provenance",
    "lemica_trt.graph",
    "lemica_trt.grams",
    "lemica_trt.schedule",
    "lemica_trt.signed",
    "lemica_trt.predict",
    "lemica_trt.plan",
    "lemica_trt.fold",
    "lemica_trt.candidates",
    "lemica_trt.sensitivity",
    "lemica_trt.builders",
    "lemica_trt.builders.onnxruntime",
    "lemica_trt.builders.tensorrt",
    "lemica_trt.builders.tensorrt_program",
    "lemica_trt.builders.tensorrt_worker",
    "lemica_trt.bundle",
    "lemica_trt.runtime",
    "lemica_trt.runtime.backend",
    "lemica_trt.runtime.cuda",
    "lemica_trt.runtime.denoise",
    "lemica_trt.runtime.device",
    "lemica_trt.runtime.null",
    "lemica_trt.runtime.onnxruntime",
    "lemica_trt.runtime.pipeline",
    "lemica_trt.runtime.random",
    "lemica_trt.runtime.rebuild",
    "lemica_trt.runtime.tensorrt",
    "lemica_trt.runtime.text",
    "lemica_trt.runtime.video",
    "lemica_trt.progress",
    "lemica_trt.quality",
    "lemica_trt.budget",
    "lemica_trt.timing",
    "lemica_trt.diagnosis",
    "lemica_trt.report",
    "lemica_trt.report.timeline",
    "lemica_trt.report.summary",
    "lemica_trt.triton.interface",
    "lemica_trt.triton.repository",
    "lemica_trt.triton.serving",
    "lemica_trt.triton.check",
    "lemica_trt.triton.client",
    "lemica_trt.pipeline",
    "lemica_trt.pipeline.budgets",
    "lemica_trt.pipeline.commands",
    "lemica_trt.pipeline.compile",
    "lemica_trt.pipeline.planning",
    "lemica_trt.pipeline.stages",
    "lemica_trt.pipeline.work",
    "lemica_trt.cli",
]
"""Rooms that import no heavy library."""

UPSIDE_DOWN = {
    ("bundle", "runtime"),  # `Bundle.pipeline` opens what it holds: the one line that everybody types
    ("report", "pipeline"),  # the type of what `summary.dry_run_table` draws
}
"""Room → room listed below it: imports within a function or for types only, so that loading never goes in circles."""

SCRIPT = """
import json, sys, time
start = time.process_time()
import {module}
seconds = time.process_time() - start
top = sorted({{name.partition(".")[0] for name in sys.modules}})
print(json.dumps([seconds, top, sorted(name for name in sys.modules if name.startswith("lemica_trt"))]))
"""


def imported(module: str) -> tuple[float, set[str], set[str]]:
    """CPU seconds, top-level modules and own modules after importing one in a new interpreter."""
    output = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(module=module)], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    seconds, top, own = json.loads(output)
    return seconds, set(top), set(own)


@pytest.mark.null
@pytest.mark.parametrize("module", LIGHT)
def test_imports(module: str) -> None:
    _, top, own = imported(module)
    assert not top & HEAVY
    for room in ("lemica_trt.models", "lemica_trt.lower", "lemica_trt.calibrate", "lemica_trt.export"):
        assert room not in own


def rooms_on_the_map() -> list[str]:
    """The names in the map of `lemica_trt/__init__.py`, from the top."""
    return re.findall(r"^    ([a-z_]+)/? {2,}\S", lemica_trt.__doc__ or "", re.MULTILINE)


def room_imports() -> set[tuple[str, str, bool]]:
    """(room, room that it imports, whether that happens on loading), of every import in the package."""
    found = set()
    package = ROOT / "lemica_trt"
    for path in package.rglob("*.py"):
        room = path.relative_to(package).parts[0].removesuffix(".py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path.name}:{node.lineno}: name the package"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for top, _, rest in (name.partition(".") for name in names):
                target = rest.partition(".")[0]
                if top == "lemica_trt" and target not in (room, "__version__"):
                    found.add((room, target, node in tree.body))
    return found


@pytest.mark.null
def test_every_room_is_on_the_map() -> None:
    rooms = {path.name.removesuffix(".py") for path in (ROOT / "lemica_trt").iterdir() if path.suffix == ".py"}
    rooms |= {path.parent.name for path in (ROOT / "lemica_trt").glob("*/__init__.py")}
    listed = rooms_on_the_map()
    assert sorted(listed) == sorted(rooms - {"__init__", "__main__"})


@pytest.mark.null
def test_imports_point_upwards_on_the_map() -> None:
    place = {room: i for i, room in enumerate(rooms_on_the_map())}
    place["__main__"] = len(place)  # `python -m lemica_trt`
    down = {(room, target, loading) for room, target, loading in room_imports() if place[target] > place[room]}
    assert {(room, target) for room, target, _ in down} == UPSIDE_DOWN
    assert not any(loading for _, _, loading in down)


@pytest.mark.null
def test_the_runtime_imports_fast() -> None:
    """In CPU time, best of three: what else the machine does has no say."""
    assert min(imported("lemica_trt.runtime.pipeline")[0] for _ in range(3)) < 0.5


@pytest.mark.cpu
def test_ruff_holds_the_rest() -> None:
    """The banned-api rules of pyproject.toml: who may import torch, diffusers, transformers, onnxruntime, pickle."""
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--no-cache", "lemica_trt"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.null
def test_running_a_bundle_needs_no_torch() -> None:
    """The rooms that run a bundle load where torch, diffusers, transformers and onnx cannot be imported."""
    script = (
        "import sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'onnx', 'safetensors'): sys.modules[name] = None\n"
        "import lemica_trt.runtime.pipeline, lemica_trt.runtime.video, lemica_trt.bundle, lemica_trt.triton.serving\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)
