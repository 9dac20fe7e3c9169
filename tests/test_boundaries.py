"""What importing each room pulls in, measured in a fresh interpreter, and how long it takes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

HEAVY = {
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "tensorrt",
    "tensorrt_rtx",
    "av",
    "PIL",
    "tokenizers",
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
    "lemica_trt.sampler",
    "lemica_trt.graph",
    "lemica_trt.schedule",
    "lemica_trt.plan",
    "lemica_trt.builders",
    "lemica_trt.builders.onnxruntime",
    "lemica_trt.bundle",
    "lemica_trt.runtime",
    "lemica_trt.runtime.backend",
    "lemica_trt.runtime.denoise",
    "lemica_trt.runtime.onnxruntime",
    "lemica_trt.runtime.pipeline",
    "lemica_trt.runtime.random",
    "lemica_trt.runtime.text",
    "lemica_trt.runtime.video",
    "lemica_trt.pipeline",
    "lemica_trt.cli",
]
"""Rooms that import no heavy library. All but `cli`, `pipeline` also run without click and rich."""

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
    if not (ROOT / (module.replace(".", "/") + ".py")).is_file() and not (ROOT / module.replace(".", "/")).is_dir():
        pytest.skip("not built yet")
    if module in ("lemica_trt.cli", "lemica_trt.pipeline") and importlib.util.find_spec("click") is None:
        pytest.skip("click is not here")
    _, top, own = imported(module)
    assert not top & HEAVY
    for room in ("lemica_trt.models", "lemica_trt.lower", "lemica_trt.calibrate", "lemica_trt.export"):
        assert room not in own


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
        "import lemica_trt.runtime.pipeline, lemica_trt.runtime.video, lemica_trt.bundle\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)
