"""Who may import whom, and what importing each module pulls in: derived from one list."""

from __future__ import annotations

import ast
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lemica_trt

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lemica_trt"

LAYERS: dict[str, tuple[str, ...]] = {
    "core": (),
    "ir": ("core",),
    "planning": ("ir",),
    "models": ("planning",),
    "calibrate": ("planning",),
    "export": ("models",),
    "backends": ("ir",),
    "bundle": ("ir",),
    "runtime": ("backends", "bundle"),
    "evaluate": ("calibrate", "models", "runtime"),
    "report": ("ir",),
    "pipelines": ("calibrate", "models", "bundle"),
    "compiler": ("evaluate", "export", "report"),
    "triton": ("runtime",),
    "endpoint": ("triton",),
    "hub": ("bundle",),
    "cli": ("compiler", "endpoint", "hub"),
    "testing": ("runtime", "models"),
}
"""Package → the packages right below it. A package may import those, and all that lies below them."""

HEAVY = {
    "PIL", "accelerate", "av", "cuda", "diffusers", "huggingface_hub", "jinja2", "matplotlib", "onnx", "onnxruntime",
    "onnxscript", "openvino", "pickletools", "prometheus_client", "ray", "safetensors", "scipy", "sentencepiece",
    "starlette", "tensorrt", "tensorrt_rtx", "tokenizers", "torch", "transformers", "uvicorn",
}  # fmt: skip
"""Libraries that no light module may import when it is loaded."""

MAY_BE_HEAVY = (
    "backends.torch.branches",
    "backends.torch.run",
    "models",
    "endpoint.app",
    "endpoint.guard",
    "endpoint.metrics",
    "endpoint.server",
    "export",
    "evaluate.agreement",
    "evaluate.baselines",
    "evaluate.estimate",
    "evaluate.kept",
    "evaluate.quality",
    "evaluate.torch_runtime",
    "evaluate.verify",
    "pipelines",
    "testing",
    "report.contact_sheet",
    "report.pictures",
    "report.plots",
    "triton.model",
    "zoo",
)
"""Modules that need such libraries themselves; every other module is light."""

MOST_LINES = 60
"""Of a function."""

VARIANT_NAMES = ("full", "skip", "combine")

NO_TORCH = (
    *("core", "ir", "planning", "calibrate", "backends", "bundle", "runtime", "evaluate", "report", "triton"),
    *("endpoint", "hub", "cli"),
)
"""Packages whose modules load where PyTorch, diffusers, transformers and ONNX cannot be imported."""


@functools.cache
def below(package: str) -> frozenset[str]:
    """All packages that a package may import, itself included."""
    return frozenset({package}.union(*(below(name) for name in LAYERS[package])))


def modules() -> dict[str, Path]:
    """Dotted name → file, of every module of the package."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path) -> set[str]:
    """Packages of this project that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: name the package"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for top, _, rest in (name.partition(".") for name in names):
            if top == "lemica_trt":
                found.add(rest.partition(".")[0])
    return found


def is_light(module: str) -> bool:
    rest = module.partition(".")[2]
    return not any(rest == name or rest.startswith(f"{name}.") for name in MAY_BE_HEAVY)


@pytest.mark.null
def test_every_package_is_in_the_list_and_on_the_map() -> None:
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert packages == set(LAYERS)
    assert sorted(path.name for path in PACKAGE.glob("*.py")) == ["__init__.py", "__main__.py"]
    for package in LAYERS:
        assert f"\n    {package} " in (lemica_trt.__doc__ or ""), f"{package} is not on the map"


@pytest.mark.null
def test_imports_point_downwards() -> None:
    wrong = []
    for module, path in modules().items():
        package = module.partition(".")[2].partition(".")[0]
        if package in LAYERS:  # the face and `__main__` may import everything
            wrong += [f"{module} imports {name}" for name in imports(path) & set(LAYERS) - below(package)]
    assert not wrong, "\n".join(wrong)


SCRIPT = """
import importlib, json, sys
names, heavy = json.loads(sys.argv[1]), set(json.loads(sys.argv[2]))
for name in names:
    importlib.import_module(name)
    loaded = heavy & {loaded.partition(".")[0] for loaded in sys.modules}
    if loaded:
        sys.exit(f"{name} imports {sorted(loaded)}")
"""


@pytest.mark.null
def test_light_modules_import_no_heavy_library() -> None:
    light = [name for name in modules() if is_light(name) and name != "lemica_trt.__main__"]
    command = [sys.executable, "-c", SCRIPT, json.dumps(light), json.dumps(sorted(HEAVY))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.null
def test_what_runs_a_bundle_needs_no_torch() -> None:
    names = [name for name in modules() if name.startswith(tuple(f"lemica_trt.{package}" for package in NO_TORCH))]
    names = [name for name in names if is_light(name)]
    script = (
        "import importlib, sys\n"
        "for name in ('torch', 'diffusers', 'transformers', 'onnx', 'safetensors'): sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "import lemica_trt; lemica_trt.load, lemica_trt.Bundle\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)


@pytest.mark.cpu
def test_ruff_holds_the_rest() -> None:
    """The banned-api rules of pyproject.toml: who may import torch, diffusers, transformers, onnxruntime, pickle."""
    command = [sys.executable, "-m", "ruff", "check", "--select", "TID251", "--no-cache", "lemica_trt"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.null
def test_functions_fit_on_a_page() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or 0) - node.lineno + 1
                found += [f"{path.name}: {node.name} has {lines} lines"] if lines > MOST_LINES else []
    assert not found


@pytest.mark.null
def test_only_the_ir_and_the_step_modules_know_the_variants() -> None:
    """A new way to run a step is data and one torch module."""
    found = []
    for module, path in modules().items():
        if module.startswith(("lemica_trt.ir.", "lemica_trt.models.steps")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in VARIANT_NAMES:
                found.append(f"{module}:{node.lineno} spells {node.value!r}")
    assert not found


@pytest.mark.null
@pytest.mark.parametrize("package", LAYERS)
def test_every_module_is_on_the_map_of_its_package(package: str) -> None:
    """Nothing that is there is left out, nothing is listed that has moved."""
    folder = PACKAGE / package
    there = {path.stem for path in folder.glob("*.py")} | {path.parent.name for path in folder.glob("*/*.py")}
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    assert not {name for name in there - {"__init__"} if not re.search(rf"\b{name}\b", text)}
    listed = re.findall(r"^(?: {4})?([a-z_]+)/? {2,}\S", text, re.MULTILINE)
    assert set(listed) <= there | {path.stem for path in folder.glob("*/*.py")}


@pytest.mark.null
def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by name, and collects only one of two."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert len(names) > 80
    assert not [name for name in names if names.count(name) > 1]
