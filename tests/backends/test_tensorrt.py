"""The TensorRT executor on the null device: everything but the vendor's own code."""

from __future__ import annotations

import enum
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import toy
from test_loop import inputs_of, noises
from toy_backends import full_layout, full_plan

from lemica_trt.backends.base import Capture, Settings, decode, encode, open_backend
from lemica_trt.backends.tensorrt import cuda
from lemica_trt.backends.tensorrt.run import TensorRTBackend, import_vendor
from lemica_trt.backends.tensorrt.vendor import VENDORS
from lemica_trt.core.errors import EngineError, InputError, MissingDependencyError, UnsupportedError
from lemica_trt.ir.engine import EngineKey
from lemica_trt.ir.graphs import GraphSet, StepLayout
from lemica_trt.runtime.denoise import Cancelled, Denoiser, RowDone
from lemica_trt.testing import null
from lemica_trt.testing.null import NullDevice, NullPlan, null_vendor, write_engine

pytestmark = pytest.mark.cpu

ACTIVATIONS = {"combine": 0, "skip": 4096, "full": 70_000, "text_encoder": 512, "vae_decoder": 100_000}

CAPTURES: tuple[Capture, ...] = ("plan", "step", "none")


def key_of(backend: str = "tensorrt-rtx", **changes: Any) -> EngineKey:
    key = EngineKey(backend=backend, version=null.VERSION, target="sm_89", dtype="fp32", graphs_digest="0" * 64)
    return msgspec.structs.replace(key, **changes)


class Machine:
    """Toy graphs as null engines in a folder, and a backend that runs them."""

    def __init__(
        self,
        folder: Path,
        layout: StepLayout | None = None,
        *,
        key: EngineKey | None = None,
        device: NullDevice | None = None,
        **settings: Any,
    ) -> None:
        self.layout = layout or toy.layout_of()
        self.graphs: GraphSet = toy.graphs_of(self.layout)
        self.folder = folder
        if not (folder / "onnx").is_dir():
            toy.write_onnx(self.graphs, folder)
        self.device = device or NullDevice()
        settings.setdefault("rebuild", lambda: "lemica-trt build --model toy")
        self.backend = TensorRTBackend(null_vendor(self.device), self.device, key or key_of(), Settings(**settings))

    def plan(self, role: str, **changes: Any) -> NullPlan:
        plan = NullPlan(
            graph=self.graphs.graph(role),  # type: ignore[arg-type]
            onnx=str(self.folder / f"onnx/{role}.onnx"),
            profiles=({"batch": (1, 1), "2*batch": (2, 2)}, {"batch": (1, 3), "2*batch": (1, 6)}),
            activations=ACTIVATIONS[role],
        )
        return msgspec.structs.replace(plan, **changes)

    def load(self, role: str, **changes: Any) -> Any:
        path = self.folder / f"engines/{role}.engine"
        write_engine(self.plan(role, **changes), path)
        return self.backend.load(self.graphs.graph(role), path)  # type: ignore[arg-type]

    def denoiser(self, **changes: Any) -> Denoiser:
        engines = {role: self.load(role, **changes) for role in ("full", "skip", "combine")}
        return Denoiser(self.backend, self.graphs, engines)  # type: ignore[arg-type]

    def buffers(self, role: str, batch: int) -> dict[str, Any]:
        graph = self.graphs.graph(role)  # type: ignore[arg-type]
        sizes = {"batch": batch, "2*batch": 2 * batch}
        return {
            spec.name: self.backend.empty(tuple(n if isinstance(n, int) else sizes[n] for n in spec.shape), spec.dtype)
            for spec in (*graph.inputs, *graph.outputs)
        }

    def request(self, start: int) -> list[str]:
        """What the device did since `start`, without sizes."""
        return [entry.split()[0] for entry in self.device.log[start:]]


@pytest.mark.parametrize("vendor", VENDORS)
@pytest.mark.parametrize("capture", CAPTURES)
def test_the_loop_is_the_plan(tmp_path: Path, vendor: str, capture: Capture) -> None:
    """Every way of launching, several batch sizes in turn, with and without somebody who listens: one result."""
    layout = full_layout()
    machine = Machine(tmp_path, layout, key=key_of(vendor), capture=capture)
    denoiser, plan = machine.denoiser(), full_plan()
    for batch, listens in ((1, False), (3, False), (1, True), (3, False), (2, True), (1, False), (2, False)):
        inputs = inputs_of(layout, batch, seed=batch)
        rows: list[RowDone] = []
        found = denoiser.run(plan, **inputs, draw=noises(batch), on_step=rows.append if listens else None)
        expected = toy.interpret(plan, layout, **inputs, draw=noises(batch))
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6)
        assert [row.index for row in rows] == (list(range(len(plan.rows))) if listens else [])


def test_a_warm_request_is_uploads_one_launch_one_download(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    denoiser, plan, inputs = machine.denoiser(), toy.euler_plan("fsfsrfss"), inputs_of(machine.layout, 1)
    first = denoiser.run(plan, **inputs)
    assert machine.request(0).count("execute") == 9, "the first request warms the contexts up"
    start = len(machine.device.log)
    denoiser.run(plan, **inputs)
    assert f"capture {len(plan.rows)}" in machine.device.log[start:]
    start = len(machine.device.log)
    np.testing.assert_array_equal(denoiser.run(plan, **inputs), first)
    assert machine.request(start) == ["copy_in"] * 3 + ["launch", "copy_out", "synchronize"]
    assert f"launch {len(plan.rows)}" in machine.device.log[start:]

    start = len(machine.device.log)
    other = toy.euler_plan("fs", name="other")
    denoiser.run(other, **inputs)
    assert "execute" not in machine.request(start), "its contexts are warm: the first request of a plan is captured"


def test_steps_are_launched_one_by_one_where_somebody_listens(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    denoiser, plan, inputs = machine.denoiser(), toy.euler_plan("fsfs"), inputs_of(machine.layout, 2)
    expected = denoiser.run(plan, **inputs)
    for _ in range(2):
        start = len(machine.device.log)
        found = denoiser.run(plan, **inputs, on_step=lambda row: None)
        np.testing.assert_array_equal(found, expected)
    assert machine.request(start)[3:] == ["launch", "synchronize"] * 5 + ["copy_out", "synchronize"]

    def cancel(row: RowDone) -> None:
        raise Cancelled

    start = len(machine.device.log)
    with pytest.raises(Cancelled):
        denoiser.run(plan, **inputs_of(machine.layout, 2, seed=3), on_step=cancel)
    assert machine.request(start).count("launch") == 1
    np.testing.assert_array_equal(denoiser.run(plan, **inputs), expected)


def test_nothing_is_captured_where_it_is_not_wanted_or_cannot_be(tmp_path: Path) -> None:
    layout = toy.layout_of()
    plain = Machine(tmp_path, layout, capture="none")
    streamed = Machine(tmp_path, layout)
    for machine, changes in ((plain, {}), (streamed, {"streamed": 1000})):
        denoiser, inputs = machine.denoiser(**changes), inputs_of(layout, 1)
        for _ in range(3):
            denoiser.run(toy.euler_plan("fsf"), **inputs)
        assert machine.request(0).count("execute") == 3 * 4
        assert "capture" not in machine.request(0)


def test_fresh_noise_splits_a_plan(tmp_path: Path) -> None:
    layout = full_layout()
    machine = Machine(tmp_path, layout)
    denoiser, plan, inputs = machine.denoiser(), full_plan(), inputs_of(layout, 1)
    for _ in range(3):
        start = len(machine.device.log)
        denoiser.run(plan, **inputs, draw=noises(1))
    assert [entry for entry in machine.device.log[start:] if entry.startswith("launch")] == [
        "launch 3", "launch 2", "launch 2",
    ]  # fmt: skip


def test_contexts_share_one_block(tmp_path: Path) -> None:
    """The larger size, allocated once; when an engine needs more, the block moves and graphs are captured again."""
    machine = Machine(tmp_path)
    denoiser, plan, inputs = machine.denoiser(), toy.euler_plan("fsf"), inputs_of(machine.layout, 1)
    expected = denoiser.run(plan, **inputs)
    denoiser.run(plan, **inputs)
    sizes = list(ACTIVATIONS.values())
    assert [size for size in sizes if f"allocate {size}" in machine.device.log] == [ACTIVATIONS["full"]]
    machine.load("vae_decoder").bind(machine.buffers("vae_decoder", 1))
    assert f"allocate {ACTIVATIONS['vae_decoder']}" in machine.device.log
    start = len(machine.device.log)
    np.testing.assert_array_equal(denoiser.run(plan, **inputs), expected)
    assert f"capture {len(plan.rows)}" in machine.device.log[start:]


def test_memory_comes_back(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    before = machine.device.memory_info().free
    denoiser = machine.denoiser()
    for batch in (1, 2):
        for _ in range(2):
            denoiser.run(toy.euler_plan("fsf"), **inputs_of(machine.layout, batch))
    assert machine.device.memory_info().free < before
    free, total = machine.device.memory_info()
    assert machine.backend.device_memory() == total - free > 0
    machine.backend.synchronize()
    del denoiser
    assert machine.device.memory_info().free == before - ACTIVATIONS["full"]


def test_arrays_may_change_after_upload_and_buffers_show_themselves(tmp_path: Path) -> None:
    backend = Machine(tmp_path).backend
    buffers = [backend.empty((5, 7), "bf16") for _ in range(3)]
    for number, buffer in enumerate(buffers):
        array = encode(np.full((5, 7), number + 0.5), "bf16")
        backend.upload(array, buffer)
        array[...] = 0
    for number, buffer in enumerate(buffers):
        np.testing.assert_array_equal(decode(backend.download(buffer), "bf16"), np.full((5, 7), number + 0.5))
    interface = buffers[1].__cuda_array_interface__
    assert interface["data"] == (buffers[1].address, False)
    assert (interface["shape"], interface["typestr"], interface["version"]) == ((5, 7), "<u2", 3)
    assert backend.empty((), "fp32").shape == ()
    with pytest.raises(EngineError, match=r"expected bf16 \[5, 7\], got float32 \[5, 7\]"):
        backend.upload(np.zeros((5, 7), np.float32), buffers[0])


def test_results_may_stay_on_the_device(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    denoiser, plan, inputs = machine.denoiser(), toy.euler_plan("fsf"), inputs_of(machine.layout, 1)
    expected = denoiser.run(plan, **inputs)
    denoiser.run(plan, **inputs_of(machine.layout, 1, seed=9))
    start = len(machine.device.log)
    buffer = denoiser.run_on_device(plan, **inputs)
    assert "synchronize" not in machine.request(start) and "copy_out" not in machine.request(start)
    assert buffer.shape == expected.shape
    np.testing.assert_array_equal(machine.backend.download(buffer), expected)


def test_any_thread_may_run(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    denoiser, plan, inputs = machine.denoiser(), toy.euler_plan("fsf"), inputs_of(machine.layout, 1)
    expected = denoiser.run(plan, **inputs)
    found = []
    for _ in range(2):
        thread = threading.Thread(target=lambda: found.append(denoiser.run(plan, **inputs)))
        thread.start()
        thread.join()
    np.testing.assert_array_equal(found, [expected] * 2)


def test_what_rtx_compiled_is_kept(tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def run(**settings: Any) -> Any:
        machine = Machine(tmp_path, **settings)
        machine.denoiser().run(toy.euler_plan("fs"), **inputs_of(machine.layout, 1))
        return machine

    run(cache=cache)
    files = sorted(path.name for path in (cache / "engines").iterdir())
    assert files == ["combine-sm_89.bin", "full-sm_89.bin", "skip-sm_89.bin"]
    file = cache / "engines/full-sm_89.bin"
    good, written = file.read_bytes(), file.stat().st_mtime_ns
    assert good.endswith(b'["full"]')
    run(cache=cache)
    assert file.stat().st_mtime_ns == written, "nothing new was compiled"
    for damaged in (b"", good[:-1] + b"!", b"\0" * 40):
        file.write_bytes(damaged)
        run(cache=cache)
        assert file.read_bytes() == good
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    run(cache=blocked)
    run(key=key_of("tensorrt"), cache=tmp_path / "none")
    assert not (tmp_path / "none").exists()


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": "sm_90"}, r"built for sm_90, here is sm_89 \(null\)"),
        ({"target": "sm_75,sm_86"}, r"built for sm_75,sm_86, here is sm_89"),
        ({"target": "sm_90+"}, r"built for sm_90\+, here is sm_89"),
        ({"driver": "13.1"}, r"built for a driver for CUDA 13.1 or newer, here is one for CUDA 13.0"),
    ],
)
def test_engines_of_another_machine_name_the_rebuild(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message + r".* → lemica-trt build --model toy$") as caught:
        Machine(tmp_path, key=key_of("tensorrt", **changes))
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("backend", "changes"),
    [
        ("tensorrt", {"target": "sm_80+"}),
        ("tensorrt", {"target": "sm_75,sm_89", "driver": "12.9"}),
        ("tensorrt-rtx", {"target": "sm_75"}),  # what RTX says of the file decides
    ],
)
def test_engines_that_fit_are_taken(tmp_path: Path, backend: str, changes: dict[str, Any]) -> None:
    Machine(tmp_path, key=key_of(backend, **changes)).load("full")


def module_of(version: str | None) -> SimpleNamespace | None:
    """A vendor's module of a version; None: importing it fails."""
    return None if version is None else SimpleNamespace(__version__=version)


@pytest.mark.parametrize(
    ("compatible", "full", "lean", "chosen"),
    [
        (False, "1.0", "1.0", "tensorrt"),
        (True, "1.0", "1.0", "tensorrt"),
        (True, None, "1.0", "tensorrt_lean"),
        (True, "2.1", "1.0", "tensorrt_lean"),
        (False, None, "1.0", r"need the package tensorrt, got: .* → pip install tensorrt==1\.0$"),
        (False, "2.1", "1.0", r"built for tensorrt 1\.0, here is tensorrt 2\.1 → rebuild"),
        (True, None, None, r"tensorrt or tensorrt_lean, got: .* → pip install tensorrt-lean==1\.0$"),
        (True, "1.1", None, r"here is tensorrt 1\.1 → pip install tensorrt-lean==1\.0, or rebuild"),
        (True, "1.1", "0.9", r"here is tensorrt 1\.1 and tensorrt_lean 0\.9 → pip"),
    ],
)
def test_the_library_is_that_of_the_version_that_built(
    compatible: bool, full: str | None, lean: str | None, chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later one is none: an engine that holds no runtime of its own is for the version that built it."""
    modules = {"tensorrt": module_of(full), "tensorrt_lean": module_of(lean)}
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    key = key_of("tensorrt", version="1.0", options={"version_compatible": True} if compatible else {})
    if chosen in modules:
        assert import_vendor(key, Settings()) is modules[chosen]
    else:
        with pytest.raises((MissingDependencyError, UnsupportedError), match=chosen):
            import_vendor(key, Settings())


def test_rtx_is_asked_about_each_file(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    with pytest.raises(
        UnsupportedError,
        match=r"^full.engine is not valid here \(null, sm_89, CUDA 13.0\): UNSUPPORTED_CC → lemica-trt build",
    ):
        machine.load("full", targets=((9, 0),))
    (tmp_path / "engines/full.engine").write_bytes(b"half of an eng")
    with pytest.raises(EngineError, match=r"full.engine is not valid here .* MALFORMED_ENGINE → lemica-trt build"):
        machine.backend.load(machine.graphs.graph("full"), tmp_path / "engines/full.engine")


def test_files_that_are_no_such_engine(tmp_path: Path) -> None:
    machine = Machine(tmp_path, key=key_of("tensorrt"))
    path = tmp_path / "engines/full.engine"
    machine.load("full")
    whole = path.read_bytes()
    for content in (b"", whole[:-40], b"ftrt" * 100):
        path.write_bytes(content)
        with pytest.raises(EngineError, match=r"tensorrt: full.engine does not load: deserialize_cuda_engine: .* → "):
            machine.backend.load(machine.graphs.graph("full"), path)
    with pytest.raises(EngineError, match=r"described: expected trunk to be output fp32 \[-1, 8, 12\], got absent"):
        write_engine(machine.plan("skip"), path)
        machine.backend.load(machine.graphs.graph("full"), path)
    wide = msgspec.structs.replace(machine.graphs.graph("full"), inputs=machine.graphs.graph("skip").inputs)
    with pytest.raises(EngineError, match=r"expected trunk_0 to be input fp32 \[-1, 8, 12\], got absent"):
        machine.load("full")
        machine.backend.load(wide, path)


def test_shapes_outside_the_profiles(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    engine = machine.load("combine")
    engine.bind(machine.buffers("combine", 3))
    with pytest.raises(
        EngineError,
        match=r"the combine engine was built for latents_0 \[1, 2, 3, 4, 4\] … \[1, 2, 3, 4, 4\] or "
        r"\[1, 2, 3, 4, 4\] … \[3, 2, 3, 4, 4\], got \[4, 2, 3, 4, 4\] → lemica-trt build",
    ):
        engine.bind(machine.buffers("combine", 4))


def test_too_little_memory(tmp_path: Path) -> None:
    machine = Machine(tmp_path, device=NullDevice(memory=100_000))
    with pytest.raises(EngineError, match=r"not enough device memory: expected .* GiB for fp32 \[300, 300\], got 0.00"):
        machine.backend.empty((300, 300), "fp32")
    keep = machine.backend.empty((100, 100), "fp32")
    with pytest.raises(EngineError, match=r"expected 0.00 GiB for activations") as caught:
        machine.load("full").bind(machine.buffers("full", 1))
    assert caught.value.exit_code == 8 and caught.value.fix is not None
    np.testing.assert_array_equal(machine.backend.download(keep).shape, (100, 100))


def test_a_role_that_was_not_built(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    denoiser = Denoiser(machine.backend, machine.graphs, {"full": machine.load("full")})
    with pytest.raises(InputError, match="plan default needs the combine graph, no engine was built of it"):
        denoiser.run(toy.euler_plan("f"), **inputs_of(machine.layout, 1))


def test_a_vendor_that_refuses_is_quoted(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    call = machine.load("combine").bind(machine.buffers("combine", 1))
    misplaced = {name: SimpleNamespace(address=1) for name in call.bindings[0].buffers}
    broken = call.bindings[0]._replace(buffers=misplaced)
    with pytest.raises(EngineError, match=r"^tensorrt-rtx: the combine engine takes no address for latents_0: set_"):
        machine.backend.enqueue(broken)
    machine.backend.enqueue(call.bindings[0])
    machine.backend.synchronize()


def test_a_call_that_is_run_once_is_not_captured(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    engine, buffers = machine.load("combine"), machine.buffers("combine", 1)
    for _ in range(3):
        engine.bind(buffers, once=True).run()
    assert not any(entry.startswith("capture") for entry in machine.device.log)
    engine.bind(buffers).run()
    assert "capture 1" in machine.device.log


def test_a_failure_on_the_device_is_told_by_whoever_waits(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    engine, buffers = machine.load("combine"), machine.buffers("combine", 1)
    engine.bind(buffers).run()
    del buffers
    with pytest.raises(EngineError, match="illegal access"):
        machine.backend.synchronize()
    machine.backend.synchronize()


def test_what_a_driver_refuses_during_a_capture_the_null_device_refuses(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    device, call = machine.device, machine.load("combine").bind(machine.buffers("combine", 1))
    call.run()
    device.synchronize()
    event, graph = device.record(), device.capture(lambda: machine.backend.enqueue(call.bindings[0]))
    for what in (event.wait, graph.launch, device.synchronize, lambda: device.capture(list)):
        with pytest.raises(EngineError, match="while the stream is captured"):
            device.capture(what)
        device.synchronize()
    graph.launch()
    device.synchronize()


def test_without_a_driver_or_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each; the driver is looked for by the real cuda-core where it is installed."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(MissingDependencyError, match=r"engines for tensorrt need the package tensorrt, got: .* → pip"):
        open_backend(key_of("tensorrt"))
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", null_vendor(NullDevice()))
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(MissingDependencyError, match=r"needs cuda-core and cuda-bindings, got: .* → pip install cuda"):
        open_backend(key_of())


def test_the_device_that_was_asked_for_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    device, asked = NullDevice(), list[int]()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", null_vendor(device))
    monkeypatch.setattr(cuda, "CudaDevice", lambda index: (asked.append(index), device)[1])
    backend = open_backend(key_of(), Settings(device=3))
    assert asked == [3] and isinstance(backend, TensorRTBackend) and backend.device is device


def test_no_gpu_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    core = pytest.importorskip("cuda.core")
    try:
        core.Device(0).set_current()
    except Exception:  # what is wanted here
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", null_vendor(NullDevice()))
        with pytest.raises(MissingDependencyError, match="expected an NVIDIA GPU 0 and its driver, got: ") as caught:
            open_backend(key_of())
        assert "\n" not in str(caught.value) and caught.value.exit_code == 7
    else:
        pytest.skip("here is a GPU")


# ---------------------------------------------------------------- the null vendor is a part of the real one


def test_the_null_vendor_has_nothing_of_its_own() -> None:
    """Every public name and enum member of it exists in the real package, so that what runs on it can run there."""
    trt: Any = pytest.importorskip("tensorrt_rtx")
    vendor = vars(null_vendor(NullDevice()))
    classes = {**vendor, **{name: getattr(null, name) for name in ("ICudaEngine", "IExecutionContext")}}
    classes |= {name: getattr(null, name) for name in ("IRuntimeConfig", "IRuntimeCache")}
    ours = {"ICudaEngine": {"compute"}, "Runtime": {"device"}}
    checked = 0
    for name, kind in classes.items():
        real = getattr(trt, name)
        if isinstance(kind, type):
            members = kind.__members__ if issubclass(kind, enum.Enum) else vars(kind.__mro__[-2])
            for member in members:
                if not member.startswith("_") and member not in ours.get(name, ()):
                    assert hasattr(real, member), f"{name}.{member}"
                    checked += 1
    assert checked > 40


def test_the_executor_asks_of_cuda_core_what_it_has() -> None:
    core = pytest.importorskip("cuda.core")
    driver = pytest.importorskip("cuda.bindings.driver")
    for owner, names in (
        (core.Device, ("set_current", "create_stream", "allocate", "name", "compute_capability")),
        (core.Stream, ("handle", "sync", "record", "create_graph_builder")),
        (core.Buffer, ("handle", "size")),
        (core.Event, ("sync",)),
        (core.LegacyPinnedMemoryResource, ("allocate",)),
        (core.graph.GraphBuilder, ("begin_building", "end_building", "complete", "close")),
        (core.graph.Graph, ("launch", "upload")),
        (driver, ("cuDriverGetVersion", "cuMemGetInfo", "cuMemcpyAsync")),
    ):
        for name in names:
            assert hasattr(owner, name), f"{owner.__name__}.{name}"
