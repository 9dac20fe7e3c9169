"""The TensorRT builder: options of both vendors, the process that builds, its gate, and engines built for real.

Engines are built by TensorRT for RTX, which needs no GPU. Where a library must misbehave, a module of a few lines
takes its place.
"""

from __future__ import annotations

import json
import mmap
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import msgspec
import pytest

from lemica_trt.backends.build import build, check
from lemica_trt.backends.machine import Gpu
from lemica_trt.backends.tensorrt import inspect, worker
from lemica_trt.backends.tensorrt.build import BUILDERS
from lemica_trt.backends.tensorrt.inspect import Log
from lemica_trt.backends.tensorrt.options import RtxOptions, TensorRTOptions
from lemica_trt.backends.tensorrt.program import Layers, program_layers
from lemica_trt.backends.tensorrt.protocol import BuildJob, Failed, ProbeResult, WorkerError
from lemica_trt.core.errors import EngineError, InputError, MissingDependencyError
from lemica_trt.core.files import mapped
from lemica_trt.ir.engine import EngineBuild, EngineEntry
from lemica_trt.ir.graphs import GraphSet, GraphSpec, Role, TensorSpec, step_layout
from lemica_trt.ir.profile import DType

ROOT = Path(__file__).parents[2]

real = pytest.mark.skipif(
    find_spec("tensorrt_rtx") is None, reason="TensorRT for RTX is not installed: pip install tensorrt-rtx"
)


class RecordingReporter:
    """A reporter that keeps notes and progress."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.progress: list[int] = []

    def stage(self, name: str, detail: str) -> None: ...

    def expect(self, stages: object) -> None: ...

    def advance(self, done: float, total: float) -> None:
        self.progress.append(int(done * 100 // total))

    def note(self, text: str) -> None:
        self.notes.append(text)

    def close(self) -> None: ...


def spec(role: Role, dtype: DType, batch: str | int = "batch") -> GraphSpec:
    """A graph y = x·W of [batch, 16]."""
    x = TensorSpec(name="x", dtype=dtype, shape=(batch, 16))
    y = msgspec.structs.replace(x, name="y")
    dit = {"full": "whole", "skip": "part"}.get(role)
    return GraphSpec(role=role, file=f"onnx/{role}.onnx", inputs=(x,), outputs=(y,), opset=20, dit=dit)  # type: ignore


def graph_set(*graphs: GraphSpec, dtype: DType, max_batch: int = 3) -> GraphSet:
    layout = step_layout(latent_shape=(16,), latent_history=1, output_history=1)
    return GraphSet(dtype=dtype, layout=layout, max_batch=max_batch, graphs=graphs)


def write_graphs(folder: Path, dtype: DType) -> GraphSet:
    """full and combine, each one matrix product, as real ONNX files."""
    import onnx
    from onnx import TensorProto, helper

    kind = {"fp32": TensorProto.FLOAT, "fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[dtype]
    graphs = (spec("combine", dtype), spec("full", dtype))
    for graph in graphs:
        x, y = (helper.make_tensor_value_info(name, kind, ["batch", 16]) for name in "xy")
        size = 4 if dtype == "fp32" else 2
        weights = helper.make_tensor("W", kind, [16, 16], bytes([0] * (256 * size)), raw=True)
        body = helper.make_graph([helper.make_node("MatMul", ["x", "W"], ["y"])], "g", [x], [y], [weights])
        model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        (folder / "onnx").mkdir(exist_ok=True)
        onnx.save_model(model, str(folder / graph.file))
    return graph_set(*graphs, dtype=dtype)


def fake_vendor(folder: Path, monkeypatch: pytest.MonkeyPatch, source: str, module: str = "tensorrt_rtx") -> None:
    """A module of the vendor's name that workers find first."""
    folder.mkdir(exist_ok=True)
    (folder / f"{module}.py").write_text(textwrap.dedent(source), encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(folder))


# ---------------------------------------------------------------- options


@pytest.mark.null
def test_targets() -> None:
    nothing = ProbeResult(version="1", gpu=None)
    h100 = ProbeResult(version="1", gpu=Gpu(name="H100", compute_capability="9.0", driver="13.0"))
    rtx, own = BUILDERS["tensorrt-rtx"], BUILDERS["tensorrt"]
    assert rtx._target(RtxOptions(), nothing) == "sm_80+"
    assert rtx._target(RtxOptions(compute_capabilities="8.6,12.0"), nothing) == "sm_86,sm_120"
    assert rtx._target(RtxOptions(compute_capabilities="current"), h100) == "sm_90"
    assert own._target(TensorRTOptions(), h100) == "sm_90"
    assert own._target(TensorRTOptions(hardware_compatibility_level="ampere_plus"), h100) == "sm_80+"
    assert own._target(TensorRTOptions(hardware_compatibility_level="same_compute_capability"), h100) == "sm_90"
    with pytest.raises(MissingDependencyError, match=r"builds for the GPU of this machine.*--backend tensorrt-rtx"):
        own._target(TensorRTOptions(), nothing)
    with pytest.raises(MissingDependencyError, match="name --compute-capabilities"):
        rtx._target(RtxOptions(compute_capabilities="current"), nothing)


# ---------------------------------------------------------------- the gate


def job_of(graph: GraphSpec, dtype: DType, folder: Path = Path()) -> BuildJob:
    return BuildJob(
        module="tensorrt_rtx",
        graph=graph,
        dtype=dtype,
        max_batch=3,
        options=RtxOptions(),
        onnx=str(folder / graph.file),
        engine=str(folder / "engine"),
        timing_cache=None,
    )


@pytest.mark.null
def test_the_gate_refuses_another_interface() -> None:
    graph = spec("full", "fp16")
    x, y = {"x": ("fp16", (-1, 16))}, {"y": ("fp16", (-1, 16))}
    inspect.check_interface(graph, x, y)
    for inputs, outputs, word in (
        ({"x": ("fp32", (-1, 16))}, y, r"input x fp16 \[-1, 16\], it is fp32"),
        (x, {"y": ("fp16", (2, 16))}, r"output y fp16 \[-1, 16\], it is fp16 \[2, 16\]"),
        (x, {}, r"output y .* it is missing"),
        ({**x, "z": ("fp16", (1,))}, y, "input z missing"),
    ):
        with pytest.raises(WorkerError) as caught:
            inspect.check_interface(graph, inputs, outputs)
        assert re.search(word, caught.value.answer.what), caught.value.answer.what


@pytest.mark.null
def test_the_gate_refuses_half_precision_that_is_none() -> None:
    dit, encoder = job_of(spec("full", "fp16"), "fp16"), job_of(spec("text_encoder", "fp16"), "fp16")
    skip = job_of(spec("skip", "fp16"), "fp16")
    inspect.check_precisions(dit, {"fp16": 60, "fp32": 6})
    inspect.check_precisions(skip, {"fp16": 2, "fp32": 2})
    with pytest.raises(WorkerError):
        inspect.check_precisions(skip, {"fp32": 4})
    inspect.check_precisions(dit, {})
    inspect.check_precisions(encoder, {"fp32": 3})
    with pytest.raises(WorkerError) as caught:
        inspect.check_precisions(dit, {"fp32": 60, "fp16": 60})
    assert caught.value.answer.what == "fp16 was asked for, its layers compute in fp16 (60), fp32 (60)"
    inspect.check_layers(dit, {"fp16": 66}, Layers({"fp16": 40, "fp32": 2}, 0))
    with pytest.raises(WorkerError) as caught:
        inspect.check_layers(dit, {"fp16": 66}, Layers({"fp16": 40, "fp32": 5}, 0))
    assert caught.value.answer.what == "the network computes in fp16 (66), its engine in fp16 (40), fp32 (5)"


@pytest.mark.null
def test_what_the_engine_inspector_says_is_counted() -> None:
    """Layers as in NVIDIA/TensorRT issues 4397 (TensorRT 10) and pytorch/pytorch 66683 (older names of formats)."""
    layers = [
        {"Name": "/q/MatMul_myl0_16", "LayerType": "gemm", "Outputs": [{"Format/Datatype": "Half"}],
         "TacticName": "sm80_xmma_gemm_f16f16_f16f16_f16_nn_n_tilesize32x32x64"},
        {"Name": "_gemm_mha_v2_myl0_17", "LayerType": "kgen", "Outputs": [{"Format/Datatype": "Half"}],
         "TacticName": "_gemm_mha_v2_0x957a2fe283f77dcf35c142c1390a3e6a"},
        {"Name": "__myl_TranReshMove_myl3_5", "LayerType": "kgen", "Outputs": [{"Format/Datatype": "Float"}],
         "TacticName": "__myl_TranReshMove"},
        {"Name": "matmul_1", "LayerType": "MatrixMultiply",
         "Outputs": [{"Format/Datatype": "Row major linear FP32 format"}]},
        {"Name": "__mye6916", "LayerType": "wait", "Outputs": []},
        "a name only",
    ]  # fmt: skip
    assert inspect.engine_layers(json.dumps({"Layers": layers})) == Layers({"fp16": 2, "fp32": 1}, 1)
    assert inspect.engine_layers(json.dumps({"Layers": ["a name only"]})) is None


@pytest.mark.null
def test_a_program_is_read_from_an_engine_file(tmp_path: Path) -> None:
    program = """header {
  accelerators={sm80 }
}
descriptors {
  tensor={ alignment=2 dims={ 1 8 } name="a" strides={ 8 1 } type=bf16 }
  tensor={ alignment=4 dims={ 1 8 } name="b" strides={ 8 1 } type=float }
  tensor={ alignment=1 dims={ 1 8 } name="q" strides={ 8 1 } type=fp8_e4m3 }
}
main {
  fully_connected={ name="m+n" output={"a" } input={"x" } layers="[ONNX Layer: m]
[ONNX Layer: n]" }
  function={ name=_gemm_mha_v2 fqn=_gemm_mha_v2_0x5 args={ "a" "a" } output_args={ "a" } layers="" }
  function={ name=__myl_Move fqn=__myl_Move_0x5 args={ "a" "b" } output_args={ "b" } layers="" }
  runtime_fusion={ name=__myl_FcAdd input_args={ "x" } output_args={ "b" } backbone=gemm }
  mul={ name="c" output={"b" } input={"a" } }
  fully_connected={ name="o" output={"b" } input={"q" "w" } scratchspace={"s" } }
  mul={ name="d" output={"b" } input={"q" } }
  runtime_fusion={ name=__myl_FcMulCast input_args={ "x" "q" } output_args={ "q" } backbone=gemm }
}
shape_main {
}
header {
  accelerators={*}
}
descriptors {
  tensor={ name="a" type=float }
}
main {
  fully_connected={ name="later" output={"a" } input={"x" } }
}
"""
    file = tmp_path / "engine"
    file.write_bytes(b"ftrt\0\1\2" + program.encode() + b"\0\0")
    assert program_layers(file) == Layers({"bf16": 2, "fp32": 1, "fp8": 2}, 1)
    file.write_bytes(b"ftrt\0\1\2")
    assert program_layers(file) is None


@pytest.mark.null
def test_progress_rises_to_the_end_through_nested_phases() -> None:
    class Vendor:
        class IProgressMonitor: ...

    told: list[int] = []
    monitor = worker.progress_monitor(Vendor, told.append)
    monitor.phase_start("all", None, 2)
    for step in range(2):
        monitor.phase_start("part", "all", 4)
        for part in range(4):
            assert monitor.step_complete("part", part)
        monitor.phase_finish("part")
        monitor.step_complete("all", step)
    monitor.phase_finish("all")
    assert told == [12, 25, 37, 50, 62, 75, 87, 100]


class Vendor:
    """As much of a vendor's module as an engine takes that is looked into: one engine, and what was asked of it."""

    ILogger = type("ILogger", (), {"ERROR": 1, "INTERNAL_ERROR": 2})
    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    LayerInformationFormat = SimpleNamespace(JSON="json")

    def __init__(self, dtype: str = "HALF", error: str | None = None) -> None:
        self.runtime = SimpleNamespace(engine_host_code_allowed=True, deserialize_cuda_engine=self._deserialize)
        self._dtype, self._error = dtype, error

    def Runtime(self, logger: Any) -> SimpleNamespace:
        self._logger = logger
        return self.runtime

    def _deserialize(self, data: Any) -> SimpleNamespace | None:
        assert data[:] == b"engine"
        if self._error is not None:
            self._logger.log(1, self._error)
            return None
        layers = [{"Name": "g", "LayerType": "gemm", "Outputs": [{"Format/Datatype": "Half"}]}]
        inspector = SimpleNamespace(get_engine_information=lambda _: json.dumps({"Layers": layers}))
        return SimpleNamespace(
            num_io_tensors=2,
            get_tensor_name=lambda index: "xy"[index],
            get_tensor_mode=lambda name: {"x": "input", "y": "output"}[name],
            get_tensor_dtype=lambda name: SimpleNamespace(name=self._dtype),
            get_tensor_shape=lambda name: (-1, 16),
            create_engine_inspector=lambda: inspector,
        )


@pytest.mark.null
def test_an_engine_is_loaded_without_host_code_and_compared(tmp_path: Path) -> None:
    job, vendor = job_of(spec("full", "fp16"), "fp16", tmp_path), Vendor()
    Path(job.engine).write_bytes(b"engine")
    assert inspect.inspect_engine(vendor, Log(vendor), job) == Layers({"fp16": 1}, 0)
    assert vendor.runtime.engine_host_code_allowed is False
    quiet = msgspec.structs.replace(job, options=RtxOptions(profiling_verbosity="none"))
    assert inspect.inspect_engine(vendor, Log(vendor), quiet) is None
    with pytest.raises(WorkerError) as caught:
        inspect.inspect_engine(wrong := Vendor("FLOAT"), Log(wrong), job)
    assert "it is fp32" in caught.value.answer.what
    for error, kind in (("CUDA out of memory (In f at /src/a.cpp:5)", "memory"), ("bad magic", "build")):
        with pytest.raises(WorkerError) as caught:
            inspect.inspect_engine(broken := Vendor(error=error), Log(broken), job)
        assert caught.value.answer == Failed(kind=kind, what=error.partition(" (In")[0])  # type: ignore[arg-type]


@pytest.mark.null
def test_timings_that_the_library_refuses_are_begun_anew(tmp_path: Path) -> None:
    path, config = tmp_path / "timing_cache", MagicMock()
    path.write_bytes(b"of another GPU")
    config.create_timing_cache.side_effect = bytes
    config.set_timing_cache.side_effect = lambda timings, ignore_mismatch: not timings and not ignore_mismatch
    worker.use_timing_cache(config, path)
    assert [call.args for call in config.create_timing_cache.call_args_list] == [(b"of another GPU",), (b"",)]
    assert config.set_timing_cache.call_args.args == (b"",)


@pytest.mark.null
def test_options_of_tensorrt_reach_its_configuration() -> None:
    trt, builder = MagicMock(), MagicMock()
    options = TensorRTOptions(
        builder_optimization_level=5,
        mem_pool_size="workspace:1G",
        version_compatible=True,
        weight_streaming=True,
        hardware_compatibility_level="ampere_plus",
        profiling_verbosity="none",
    )
    job = msgspec.structs.replace(job_of(spec("full", "fp16"), "fp16"), module="tensorrt", options=options)
    config = worker.configure(trt, builder, job)
    assert config.builder_optimization_level == 5
    assert config.profiling_verbosity is trt.ProfilingVerbosity.NONE
    assert config.hardware_compatibility_level is trt.HardwareCompatibilityLevel.AMPERE_PLUS
    config.set_memory_pool_limit.assert_called_once_with(trt.MemoryPoolType.WORKSPACE, 1 << 30)
    flags = [call.args[0] for call in config.set_flag.call_args_list]
    known = trt.BuilderFlag
    assert flags == [known.WEIGHT_STREAMING, known.VERSION_COMPATIBLE, known.EXCLUDE_LEAN_RUNTIME]
    profile = builder.create_optimization_profile.return_value
    profile.set_shape.assert_called_once_with("x", (1, 16), (3, 16), (3, 16))
    config.add_optimization_profile.assert_called_once_with(profile)
    config.set_compute_capability.assert_not_called()


# ---------------------------------------------------------------- the process


@pytest.mark.null
def test_a_library_that_is_not_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_vendor(tmp_path / "fake", monkeypatch, "raise ImportError('libnvinfer.so.11: no such file')", "tensorrt")
    with pytest.raises(MissingDependencyError, match=r"libnvinfer.*pip install 'lemica-trt\[tensorrt\]'"):
        check("tensorrt", "fp16")


FAKE = """
    import os, signal, sys, time
    __version__ = "0.0"
    class ILogger: pass
    def Builder(logger):
        print("a library that talks on standard output")
        {}
"""


def prepared(folder: Path) -> GraphSet:
    """Files enough for a build whose library never reads them: models without anything in them."""
    graphs = graph_set(spec("combine", "fp16"), spec("full", "fp16"), dtype="fp16")
    (folder / "onnx").mkdir()
    for graph in graphs.graphs:
        (folder / graph.file).write_bytes(b"\x42\x02\x10\x14")  # opset 20, and no graph
    return graphs


@pytest.mark.null
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", "ran out of memory .combine. → build on a machine with more memory"),
        ("raise MemoryError", "cannot build the combine engine: memory ran out → build on a machine with about 300 MB"),
        ("os.abort()", "ended with code -6"),
        ("raise SystemError('broken')", "ended with code 1 .combine.: SystemError: broken"),
        ("return None", "no builder could be made"),
    ],
)
def test_a_build_that_dies_is_one_line(
    what: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_vendor(tmp_path / "fake", monkeypatch, FAKE.format(what))
    with pytest.raises(EngineError, match=message) as caught:
        build("tensorrt-rtx", prepared(tmp_path), tmp_path, tmp_path)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "engines").rglob("*") if path.is_file()]


@pytest.mark.null
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_build_outlives_who_asked_for_it(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pid = tmp_path / "pid"
    hang = f"open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(300)"
    fake_vendor(tmp_path / "fake", monkeypatch, FAKE.format(hang))
    graphs = tmp_path / "graphs.json"
    graphs.write_bytes(msgspec.json.encode(prepared(tmp_path)))
    script = f"""
import msgspec, pathlib, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests run in the background of a shell
from lemica_trt.backends.build import build
from lemica_trt.ir.graphs import GraphSet
folder = pathlib.Path({str(tmp_path)!r})
graphs = msgspec.json.decode((folder / "graphs.json").read_bytes(), type=GraphSet)
build("tensorrt-rtx", graphs, folder, folder)
"""
    process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        _until(lambda: pid.is_file() and pid.read_text() != "")
        process.send_signal(number)
        assert process.wait(timeout=30) != 0
        _until(lambda: not Path(f"/proc/{pid.read_text()}").exists())
    finally:
        process.kill()
    assert not [path for path in (tmp_path / "engines").rglob("*") if path.is_file()]


def _until(condition: object, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end
        time.sleep(0.02)


# ---------------------------------------------------------------- engines


@pytest.mark.cpu
@real
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_engines_are_built_once_and_only_for_the_same_key(dtype: DType, tmp_path: Path) -> None:
    graphs, told = write_graphs(tmp_path, dtype), RecordingReporter()

    def build_rtx(**options: str | int | bool) -> EngineEntry:
        return build("tensorrt-rtx", graphs, tmp_path, tmp_path / "work", options, told)

    entry = build_rtx()
    assert entry.key.target == "sm_80+" and entry.key.options == RtxOptions().as_dict()
    assert set(entry.files) == set(entry.builds) == {"combine", "full"}
    full = entry.builds["full"]
    assert (full.precisions, full.engine_precisions) == ({dtype: 1}, {dtype: 1})
    assert (full.attentions, full.fused_attention) == (0, 0)
    assert full.seconds > 0 and full.host_memory > 20_000_000
    assert told.notes[0].startswith("combine: ") and "of memory" in told.notes[0]
    assert told.progress[-1] == 100 and len(set(told.progress)) > 10
    path = tmp_path / "work" / entry.files["full"]
    before = path.read_bytes()
    told.notes.clear()
    assert build_rtx() == entry and path.read_bytes() == before
    assert told.notes == ["combine: unchanged", "full: unchanged"]
    if dtype != "fp16":  # the rest depends on no dtype
        return
    path.write_bytes(before[:-1])
    path.with_name("full.engine.tmp").write_bytes(b"half of an engine")
    told.notes.clear()
    assert build_rtx().key == entry.key and path.stat().st_size == len(before)
    assert told.notes[0] == "combine: unchanged" and told.notes[1].startswith("full: 612 B of graph")
    assert not list(path.parent.glob("*.tmp"))
    other = build_rtx(builder_optimization_level=1)
    assert set(other.files.values()).isdisjoint(entry.files.values())


def write_attention(folder: Path, opset: int) -> GraphSet:
    """full is one attention of two heads: in parts, or the operator of opset 23; combine moves its input."""
    import onnx
    from onnx import TensorProto, helper

    shape = (1, 2, 128, 64)
    inputs = tuple(TensorSpec(name=name, dtype="fp16", shape=shape) for name in "qkv")
    y = TensorSpec(name="y", dtype="fp16", shape=shape)
    full = GraphSpec(role="full", file="full.onnx", inputs=inputs, outputs=(y,), opset=opset)
    combine = GraphSpec(role="combine", file="combine.onnx", inputs=inputs[:1], outputs=(y,), opset=opset)
    parts = [
        helper.make_node("Transpose", ["k"], ["t"], perm=[0, 1, 3, 2]),
        helper.make_node("MatMul", ["q", "t"], ["s"]),
        helper.make_node("Softmax", ["s"], ["p"], axis=-1),
        helper.make_node("MatMul", ["p", "v"], ["y"]),
    ]
    attention = parts if opset < 23 else [helper.make_node("Attention", ["q", "k", "v"], ["y"])]
    for graph, nodes in ((full, attention), (combine, [helper.make_node("Neg", ["q"], ["y"])])):
        ins, outs = (
            [helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT16, shape) for tensor in side]
            for side in (graph.inputs, graph.outputs)
        )
        body = helper.make_graph(nodes, "g", ins, outs)
        model = helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        onnx.save_model(model, str(folder / graph.file))
    return graph_set(combine, full, dtype="fp16", max_batch=1)


@pytest.mark.cpu
@real
@pytest.mark.parametrize("opset", [20, 23])
def test_attention_is_counted_and_fused(opset: int, tmp_path: Path) -> None:
    told = RecordingReporter()
    entry = build("tensorrt-rtx", write_attention(tmp_path, opset), tmp_path, tmp_path, {}, told)
    assert (entry.builds["full"].attentions, entry.builds["full"].fused_attention) == (1, 1)
    assert any(note.startswith("full: ") and note.endswith("1 of 1 attentions fused") for note in told.notes)


@pytest.mark.cpu
@real
def test_an_engine_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    """TensorRT for RTX does not look at what its writer says, and takes half an engine for a whole one."""
    graphs = write_graphs(tmp_path, "fp16")
    job = msgspec.structs.replace(job_of(graphs.graph("full"), "fp16", tmp_path), engine="/dev/full")
    answer = BUILDERS["tensorrt-rtx"]._ask(job, "full")
    assert answer == Failed(kind="build", what="the engine cannot be written: No space left on device")


@pytest.mark.null
def test_the_peak_is_of_memory_that_only_this_process_has(tmp_path: Path) -> None:
    """A block that is gone at the end counts, a file that is mapped does not."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(80 << 20))
    with worker.HostMemory() as before:
        pass
    with worker.HostMemory() as mapping, mapped(file) as data:
        assert data.find(b"x") < 0
    assert mapping.peak - before.peak < 20 << 20
    with worker.HostMemory() as own:
        block = mmap.mmap(
            -1, 80 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )  # pages that it did not have before
        for at in range(0, len(block), mmap.PAGESIZE):
            block[at] = 1
        time.sleep(0.1)
        block.close()
    assert 60 << 20 < own.peak - before.peak < 120 << 20


@pytest.mark.cpu
@real
def test_every_option_of_rtx_is_taken_by_the_library(tmp_path: Path) -> None:
    options = {
        "builder_optimization_level": 1,
        "mem_pool_size": "workspace:256M,tacticSharedMem:48K",
        "weight_streaming": True,
        "profiling_verbosity": "layer_names_only",
        "compute_capabilities": "8.6,12.0",
    }
    assert set(options) == set(RtxOptions().as_dict())
    entry = build("tensorrt-rtx", write_graphs(tmp_path, "fp16"), tmp_path, tmp_path, options)
    assert entry.key.options == options and entry.key.target == "sm_86,sm_120"


@pytest.mark.cpu
@real
def test_files_that_are_not_the_graphs(tmp_path: Path) -> None:
    graphs = write_graphs(tmp_path, "fp32")
    asked = msgspec.structs.replace(graphs, dtype="fp16")
    with pytest.raises(EngineError, match=r"fp16 was asked for, its layers compute in fp32 \(1\)"):
        build("tensorrt-rtx", asked, tmp_path, tmp_path)
    described = graph_set(spec("combine", "fp32", batch=2), spec("full", "fp32"), dtype="fp32")
    with pytest.raises(EngineError, match=r"input x fp32 \[2, 16\], it is fp32 \[-1, 16\]"):
        build("tensorrt-rtx", described, tmp_path, tmp_path)
    (tmp_path / "onnx/combine.onnx").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"onnx/combine\.onnx: expected an ONNX file") as caught:
        build("tensorrt-rtx", graphs, tmp_path, tmp_path)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "engines").rglob("*") if path.suffix == ".tmp"]


@pytest.mark.cpu
@real
@pytest.mark.parametrize("limit", [40, 60, 70, 80, 90, 120])
def test_a_build_without_memory_is_one_line(limit: int, tmp_path: Path) -> None:
    """In a process that may not have as much as the library wants: to load, to start a thread, to build."""
    graphs = tmp_path / "graphs.json"
    graphs.write_bytes(msgspec.json.encode(write_graphs(tmp_path, "fp16")))
    script = f"""
import msgspec, pathlib, resource
from lemica_trt.backends.build import build
from lemica_trt.backends.tensorrt.build import BUILDERS
from lemica_trt.ir.graphs import GraphSet
folder = pathlib.Path({str(tmp_path)!r})
graphs = msgspec.json.decode((folder / "graphs.json").read_bytes(), type=GraphSet)
builder = BUILDERS["tensorrt-rtx"]
found = builder._probe()
builder._probe = lambda: found
resource.setrlimit(resource.RLIMIT_DATA, ({limit << 20}, {limit << 20}))
try:
    build("tensorrt-rtx", graphs, folder, folder)
except Exception as error:
    print(type(error).__name__, error)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("EngineError TensorRT for RTX"), done.stdout + done.stderr
    assert "memory" in done.stdout and "--mem-pool-size" in done.stdout and done.stdout.count("\n") == 1


@pytest.mark.cpu
@pytest.mark.long
@real
def test_bf16_is_built_where_nothing_can_run_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As cogvideox-5b and wan2.1 are: the whole pipeline, and it says that what was built was not verified."""
    from tiny import make_variant

    from lemica_trt.compiler import bundle_verify, work_commands
    from lemica_trt.compiler.requests import BuildRequest
    from lemica_trt.evaluate.step_timer import runnable_backend

    def no_driver(*_: Any, **__: Any) -> None:
        raise MissingDependencyError("no CUDA driver")

    monkeypatch.setattr("lemica_trt.runtime.pipeline.open_backend", no_driver)
    profile = make_variant("wan", tmp_path / "model", layers=1)
    shape = msgspec.structs.replace(profile.shape, max_batch=1)
    profile = msgspec.structs.replace(profile, dtype="bf16", shape=shape)
    request = BuildRequest(budgets=(2,), methods=("uniform",), backends=("tensorrt-rtx",), verify_samples=1)
    told = RecordingReporter()
    bundle, report, unverified, *_ = work_commands.build(profile, tmp_path / "bundle", request, told)
    assert report is None and unverified == {"tensorrt-rtx": "no CUDA driver"}
    with pytest.raises(MissingDependencyError, match=r"expected engines that run .* tensorrt-rtx: no CUDA driver"):
        bundle_verify.verify(bundle, str(tmp_path / "model"), 1, None, None, told)
    monkeypatch.setattr("lemica_trt.runtime.pipeline.open_backend", MagicMock())
    assert runnable_backend(bundle) == ("tensorrt-rtx", {})
    bundle.check()
    (entry,) = bundle.manifest.engines
    assert set(entry.files) == {graph.role for graph in bundle.manifest.graphs.graphs}
    assert set(entry.builds["full"].engine_precisions or {}) <= {"bf16", "fp32"}
    assert all(path.startswith("engines/tensorrt-rtx-") for path in entry.files.values())


@pytest.mark.cpu
@real
def test_one_command_builds_for_two_backends(
    built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """From the work folder of an earlier build; ONNX Runtime stays the preferred backend."""
    from command import lemica, result_of

    work = tmp_path / "work"
    shutil.copytree(built[0].with_name("bundle.work"), work)
    both = ("--backend", "onnxruntime", "--backend", "tensorrt-rtx", "--builder-optimization-level", "0")
    done = lemica("engine", work, *both, "--output", tmp_path / "bundle", "--json")
    assert done.returncode == 0, done.stderr
    (bucket,) = result_of(done.stdout)["buckets"].values()
    engines = msgspec.convert(bucket["engines"], list[EngineEntry])
    assert [entry.key.backend for entry in engines] == ["onnxruntime", "tensorrt-rtx"]
    assert set(engines[0].builds) == {"full", "text_encoder"} and isinstance(engines[1].builds["full"], EngineBuild)
    assert engines[0].key.graphs_digest == engines[1].key.graphs_digest
    refused = lemica("engine", work, "--backend", "tensorrt-rtx", "--version-compatible", "--output", tmp_path / "b")
    assert refused.returncode == 2 and "--version-compatible" in refused.stderr
    assert not (tmp_path / "b").exists()


@pytest.mark.null
def test_the_worker_needs_no_torch() -> None:
    """Whatever the machine has: the process that builds holds none of it."""
    script = "import sys, lemica_trt.backends.tensorrt.worker; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    heavy = {"torch", "onnx", "onnxruntime", "tensorrt", "tensorrt_rtx", "rich", "numpy"}
    assert not heavy & set(done.stdout.split())
