"""Every name of TensorRT that the code uses is in the real bindings of TensorRT 10, 11 and TensorRT for RTX.

The bindings are fetched once into `.cache/tensorrt`; see tools/fetch_tensorrt_bindings.sh.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from vendor_api import Use, complaints, find_uses

from lemica_trt.backends.options import option_fields
from lemica_trt.backends.tensorrt import inspect
from lemica_trt.backends.tensorrt.options import MEMORY_POOLS, RTX_CAPABILITIES
from lemica_trt.backends.tensorrt.vendor import DTYPES, LEAN_MODULE, VENDORS
from lemica_trt.backends.tensorrt.worker import capability_member

ROOT = Path(__file__).parents[2]
CACHE = ROOT / ".cache" / "tensorrt"

FOLDER = ROOT / "lemica_trt/backends/tensorrt"
BUILDER = [FOLDER / "worker.py", FOLDER / "inspect.py"]
EXECUTOR = FOLDER / "run.py"
FILES = [*BUILDER, EXECUTOR]
"""All code that touches a vendor's module."""

RTX_ONLY = {
    "ComputeCapability",
    "CudaGraphStrategy",
    "DynamicShapesKernelSpecializationStrategy",
    "EngineInvalidityDiagnostics",
    "EngineValidity",
}
"""Names in the module that only TensorRT for RTX has; its classes' own are told by their annotation."""

TENSORRT_ONLY = {"create_timing_cache", "set_timing_cache", "get_timing_cache", "serialize", "ITimingCache"}
"""What does nothing in TensorRT for RTX, and is not called there."""

DEPRECATED_ON_PURPOSE = {
    "NetworkDefinitionCreationFlag.STRONGLY_TYPED": "ignored from 11.0 on, where all networks are; 10 needs it",
}

FIELDS = option_fields(VENDORS)

TABLES: list[tuple[str, list[str]]] = [
    ("DataType", list(DTYPES)),
    ("LayerType", [*inspect.COMPUTING_LAYERS, *inspect.ATTENTION_LAYERS]),
    ("MemoryPoolType", list(MEMORY_POOLS.values())),
    ("ProfilingVerbosity", [name.upper() for name in FIELDS["profiling_verbosity"].choices]),
    ("HardwareCompatibilityLevel", [name.upper() for name in FIELDS["hardware_compatibility_level"].choices]),
    ("ComputeCapability", [capability_member(text) for text in (*RTX_CAPABILITIES, "current")]),
]
"""Names that the code takes from tables of its own."""


@pytest.fixture(scope="module")
def bindings() -> Path:
    """Folder of the bindings; fetched if they are not here."""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        pytest.skip("the bindings are taken from wheels for Linux x86_64")
    done = subprocess.run(
        [str(ROOT / "tools" / "fetch_tensorrt_bindings.sh"), str(CACHE)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHON": sys.executable},
    )
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        pytest.skip(f"TensorRT's bindings cannot be fetched: {reason}")
    return CACHE


def uses_of(*, rtx: bool, files: Sequence[Path] = FILES) -> list[Use]:
    """All uses that one of the two vendors must have; with the tables only where the builder is among the files."""
    uses = [use for path in files for use in find_uses(path).uses]
    if BUILDER[0] in files:
        uses += [Use("tables", cls, name, False) for cls, members in TABLES for name in members]
    if rtx:
        return [use for use in uses if not {use.cls, use.name} & TENSORRT_ONLY]
    return [use for use in uses if not use.rtx_only and not {use.cls, use.name} & RTX_ONLY]


def asked(module: str, uses: list[Use], folder: Path | None = None) -> dict[str, Any]:
    """What `vendor_api.py` says of a module, in a process of its own."""
    environment = dict(os.environ)
    if folder is not None:
        environment |= {"PYTHONPATH": str(folder), "LD_LIBRARY_PATH": str(folder / "lib")}
    command = [sys.executable, str(Path(__file__).with_name("vendor_api.py")), module]
    done = subprocess.run(command, input=json.dumps(uses), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    answer["complaints"] = [
        text for text in answer["complaints"] if not any(name in text for name in DEPRECATED_ON_PURPOSE)
    ]
    return answer


@pytest.mark.cpu
@pytest.mark.parametrize("major", [10, 11])
def test_tensorrt_has_all_that_is_used(major: int, bindings: Path) -> None:
    answer = asked("tensorrt_bindings", uses_of(rtx=False), bindings / str(major))
    assert answer["version"].startswith(f"{major}.")
    assert answer["complaints"] == []
    assert unannotated(answer["names"]) == []


@pytest.mark.cpu
@pytest.mark.parametrize("major", [10, 11])
def test_the_lean_runtime_has_all_that_running_needs(major: int, bindings: Path) -> None:
    answer = asked(f"{LEAN_MODULE}_bindings", uses_of(rtx=False, files=[EXECUTOR]), bindings / str(major))
    assert answer["version"].startswith(f"{major}.")
    assert answer["complaints"] == []
    assert asked(f"{LEAN_MODULE}_bindings", [Use("", "", "Builder", False)], bindings / str(major))["complaints"]


@pytest.mark.cpu
@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx")
def test_tensorrt_for_rtx_has_all_that_is_used() -> None:
    answer = asked("tensorrt_rtx", uses_of(rtx=True))
    assert answer["complaints"] == []
    assert unannotated(answer["names"]) == []


@pytest.mark.cpu
@pytest.mark.parametrize("major", [10, 11])
def test_what_is_only_in_rtx_is_not_in_tensorrt(major: int, bindings: Path) -> None:
    """Else the list above hides what need not be hidden."""
    answer = asked("tensorrt_bindings", [Use(name, "", name, False) for name in RTX_ONLY], bindings / str(major))
    assert {text.partition(":")[0] for text in answer["complaints"]} == RTX_ONLY


def unannotated(vendor_names: list[str]) -> list[str]:
    """Uses of a vendor's name on something that nobody said the class of."""
    return [
        f"{where}: .{name}: annotate what it is an attribute of"
        for path in FILES
        for where, name in find_uses(path).unknown
        if name in vendor_names
    ]


@pytest.mark.null
def test_the_reader_finds_what_is_used() -> None:
    """Of the real files, so that a rule that stops to match is noticed."""
    found = {(use.cls, use.name) for path in BUILDER for use in find_uses(path).uses}
    assert {
        ("", "Builder"),
        ("NetworkDefinitionCreationFlag", "STRONGLY_TYPED"),
        ("Builder", "build_serialized_network_to_stream"),
        ("", "IStreamWriter"),
        ("INetworkDefinition", "get_layer"),
        ("ILayer", "get_output"),
        ("ITensor", "dtype"),
        ("IBuilderConfig", "set_memory_pool_limit"),
        ("IBuilderConfig", "progress_monitor"),
        ("IOptimizationProfile", "set_shape"),
        ("EngineInspector", "get_engine_information"),
        ("ICudaEngine", "get_tensor_mode"),
        ("TensorIOMode", "INPUT"),
        ("Runtime", "engine_host_code_allowed"),
    } <= found


@pytest.mark.null
def test_the_reader_and_the_checker_on_a_small_module(tmp_path: Path) -> None:
    source = """
def f(trt, builder: tensorrt.Builder, many: "list"):
    cache: tensorrt_rtx.Cache | None = builder.make_cache(trt.Flag.NEW)
    layers: list[tensorrt.Layer] = builder.layers
    cache.save_all(); [layer.kind_of for layer in layers]
    trt.Flag.OLD; builder.old_way(); builder.missing_way(); many.make_cache()
class C:
    def __init__(self, trt):
        self._builder: tensorrt.Builder = trt.Builder()
    def g(self):
        return self._builder.make_cache
"""
    (tmp_path / "code.py").write_text(source)
    found = find_uses(tmp_path / "code.py")
    assert ("code.py:6", "make_cache") in found.unknown
    assert Use("code.py:5", "Cache", "save_all", True) in found.uses
    assert Use("code.py:5", "Layer", "kind_of", False) in found.uses
    assert Use("code.py:11", "Builder", "make_cache", False) in found.uses

    class Flag:
        """Flags.

        NEW : The new one.
        OLD : [DEPRECATED] Use NEW.
        """

        NEW, OLD = 1, 2
        __members__ = {"NEW": 1, "OLD": 2}

    class Builder:
        """:ivar layers: all of them"""

        layers = ()

        def make_cache(self) -> None:
            """Make it. Not [deprecated] at all."""

        def old_way(self) -> None:
            """[DEPRECATED] Go the new way."""

    class Module:
        __version__ = "1"

    for cls in (Flag, Builder):
        setattr(Module, cls.__name__, cls)
    said = {text.partition(": ")[2] for text in complaints(Module, found.uses)}
    assert said == {
        "no Cache",
        "no Layer",
        "Flag.OLD is deprecated",
        "Builder.old_way is deprecated",
        "no Builder.missing_way",
    }
