"""What every backend must be; backends are found by listing the folder, so that a new one is in here by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import toy
from test_loop import inputs_of, noises
from toy_backends import OPENERS, Opened, full_layout, full_plan, load_steps

from lemica_trt import backends
from lemica_trt.backends.base import NUMPY_DTYPES, Capture, Settings, decode, encode
from lemica_trt.backends.build import build, check, estimate
from lemica_trt.backends.options import (
    Options,
    backend_names,
    builder_names,
    option_fields,
    options_class,
    options_from,
    options_from_key,
    options_table,
)
from lemica_trt.core.errors import EngineError, InputError, LemicaError, UnsupportedError, UsageError
from lemica_trt.core.values import json_bytes, value_from_json
from lemica_trt.ir.engine import QUANTIZE, EngineKey
from lemica_trt.ir.graphs import GraphSet, StepLayout
from lemica_trt.runtime.denoise import Denoiser

every = pytest.mark.parametrize("backend", backend_names())


# ---------------------------------------------------------------- what a folder declares


@pytest.mark.null
def test_every_folder_is_a_vendor() -> None:
    folders = {path.parent.name for path in Path(backends.__path__[0]).glob("*/__init__.py")}
    named = {options_class(name).__module__.split(".")[-2] for name in backend_names()}
    assert named == folders and len(set(backend_names())) == len(backend_names())
    for folder in folders:
        files = {path.stem for path in (Path(backends.__path__[0]) / folder).glob("*.py")}
        assert {"__init__", "options", "run"} <= files, folder
    assert set(OPENERS) == set(backend_names())


@pytest.mark.null
@every
def test_options_are_declared_once_and_hold(backend: str) -> None:
    fields = option_fields([backend])
    assert fields and issubclass(options_class(backend), Options)
    for field in fields.values():
        assert field.help and not field.help.endswith(".") and field.backends == (backend,)
        assert not field.choices or field.default in field.choices
        assert f"`{field.flag}`" in options_table([backend])
    assert options_from(backend, {}) == options_class(backend)()
    assert options_from(backend, {name: field.default for name, field in fields.items()}) == options_class(backend)()


@pytest.mark.null
@every
def test_unknown_options_and_wrong_values_are_refused_in_one_line(backend: str) -> None:
    with pytest.raises(UsageError, match=f"{backend} has no option --no-such → use one of: --"):
        options_from(backend, {"no_such": 1})
    for name, field in option_fields([backend]).items():
        wrong: list[Any] = ["no such choice"] if field.choices else [1.5, None]
        wrong += [field.minimum - 1] if field.minimum is not None else []
        wrong += [field.maximum + 1] if field.maximum is not None else []
        wrong += [True] if field.type is int else ["true", 1] if field.type is bool else [3]
        for value in wrong:
            with pytest.raises(UsageError, match=f"^{backend}: {field.flag} must be ") as caught:
                options_from(backend, {name: value})
            assert "\n" not in str(caught.value)


@pytest.mark.null
def test_an_option_of_two_backends_is_one_flag() -> None:
    """One help text, one default, one set of values: the command line has one flag for both."""
    shared = {name: field for name, field in option_fields(backend_names()).items() if len(field.backends) > 1}
    assert shared
    for name, field in shared.items():
        for backend in field.backends:
            assert replace(option_fields([backend])[name], backends=field.backends) == field


@pytest.mark.null
@every
def test_a_key_holds_all_options(backend: str) -> None:
    options = options_from(backend, {})
    key = EngineKey(
        backend=backend, version="1", target="x", dtype="fp32", graphs_digest="0" * 64, options=options.as_dict()
    )
    assert set(key.options) == set(option_fields([backend])) - {QUANTIZE}  # named only where something is quantised
    again = value_from_json(EngineKey, json_bytes(key), where="key")
    assert again == key and options_from_key(again) == options
    assert options_from_key(msgspec.structs.replace(key, options={})) == options, "of an older version"
    with pytest.raises(UnsupportedError, match=r"does not know: .*--newer.* → pip install --upgrade"):
        options_from_key(msgspec.structs.replace(key, options={**key.options, "newer": 1}))


@pytest.mark.null
@every
def test_building_is_answered_before_any_work(backend: str, tmp_path: Path) -> None:
    if backend not in builder_names():
        for refused in (
            lambda: check(backend, "fp32"),
            lambda: estimate(backend, 0),
            lambda: build(backend, toy.graphs_of(toy.layout_of()), tmp_path, tmp_path),
        ):
            with pytest.raises(
                UsageError, match=rf"{backend} .* builds no engines → use --backend {builder_names()[0]}"
            ):
                refused()
        return
    small, large = estimate(backend, 1 << 20), estimate(backend, 1 << 30)
    assert 0 < small.memory < large.memory and (large.seconds is None or large.seconds > 1)
    try:
        check(backend, "fp32")
    except LemicaError as error:  # what is missing here
        assert error.fix and "\n" not in str(error)
    with pytest.raises(UsageError, match="no option --no-such"):
        check(backend, "fp32", {"no_such": 1})


# ---------------------------------------------------------------- how it runs


class Toy:
    """The toy graphs on a backend."""

    def __init__(self, backend: str, folder: Path, layout: StepLayout | None = None, capture: Capture = "plan") -> None:
        self.layout = layout or toy.layout_of()
        self.graphs: GraphSet = toy.graphs_of(self.layout, data_file=True)
        self.opened: Opened = OPENERS[backend](self.graphs, folder, Settings(capture=capture))
        self.backend = self.opened.backend

    def load(self, role: str) -> Any:
        return self.backend.load(self.graphs.graph(role), self.opened.files[role])  # type: ignore[arg-type]

    def arrays(self, role: str, batch: int = 2) -> dict[str, Any]:
        """Random inputs of a graph."""
        random, sizes = np.random.default_rng(batch), {"batch": batch, "2*batch": 2 * batch}
        return {
            spec.name: random.standard_normal([n if isinstance(n, int) else sizes[n] for n in spec.shape]).astype("f4")
            for spec in self.graphs.graph(role).inputs  # type: ignore[arg-type]
        }

    def buffers(self, role: str, arrays: dict[str, Any]) -> dict[str, Any]:
        """Inputs uploaded, outputs allocated."""
        graph, batch = self.graphs.graph(role), len(arrays["latents_0"])  # type: ignore[arg-type]
        sizes = {"batch": batch, "2*batch": 2 * batch}
        found = {}
        for spec in (*graph.inputs, *graph.outputs):
            shape = tuple(n if isinstance(n, int) else sizes[n] for n in spec.shape)
            found[spec.name] = self.backend.empty(shape, spec.dtype)
            if spec.name in arrays:
                self.backend.upload(arrays[spec.name], found[spec.name])
        return found

    def check(self, role: str, arrays: dict[str, Any], buffers: dict[str, Any]) -> None:
        """The outputs are those of the graph."""
        for name, expected in toy.step(role, self.layout, arrays).items():
            np.testing.assert_allclose(self.backend.download(buffers[name]), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.cpu
@every
def test_arrays_come_back_as_they_went(backend: str, tmp_path: Path) -> None:
    device = Toy(backend, tmp_path).backend
    for dtype, kind in NUMPY_DTYPES.items():
        try:
            buffers = [device.empty((3, 5), dtype) for _ in range(2)]
        except UnsupportedError as error:
            assert dtype == "bf16" and error.fix
            continue
        assert buffers[0].shape == (3, 5) and buffers[0].dtype == dtype
        for number, buffer in enumerate(buffers):
            array = encode(np.arange(15.0).reshape(3, 5) + number, dtype)
            device.upload(array, buffer)
            array[...] = 0  # it may change at once
        for number, buffer in enumerate(buffers):
            found = device.download(buffer)
            assert found.dtype == kind
            np.testing.assert_array_equal(decode(found, dtype), np.arange(15.0).reshape(3, 5) + number)
            found[...] = 0  # a copy
            np.testing.assert_array_equal(decode(device.download(buffer), dtype)[0, 1], 1 + number)
    buffer = device.empty((2, 3), "fp32")
    fixed = np.arange(6, dtype=np.float32)[:, None] * np.ones(2, np.float32)
    fixed.flags.writeable = False
    device.upload(fixed.reshape(2, 3, 2)[..., 0], buffer)  # neither contiguous nor writable
    np.testing.assert_array_equal(device.download(buffer), np.arange(6).reshape(2, 3))
    for wrong in (np.zeros((3, 2), np.float32), np.zeros((2, 3)), np.zeros((2, 3), np.float16)):
        with pytest.raises(EngineError, match=r"expected fp32 \[2, 3\], got "):
            device.upload(wrong, buffer)
    device.synchronize()


@pytest.mark.cpu
@every
@pytest.mark.parametrize("once", [False, True])
def test_a_bound_call_reads_its_inputs_whenever_it_runs(backend: str, once: bool, tmp_path: Path) -> None:
    case = Toy(backend, tmp_path)
    for role in ("combine", "full", "skip"):
        engine = case.load(role)
        for batch in (1, 2):
            arrays = case.arrays(role, batch)
            buffers = case.buffers(role, arrays)
            call = engine.bind(buffers, once=once)
            for _ in range(1 if once else 3):
                call.run()
                case.check(role, arrays, buffers)
                arrays["latents_0"] = arrays["latents_0"] + 1
                case.backend.upload(arrays["latents_0"], buffers["latents_0"])


@pytest.mark.cpu
@every
def test_buffers_that_do_not_fit_are_refused(backend: str, tmp_path: Path) -> None:
    case = Toy(backend, tmp_path)
    engine, arrays = case.load("combine"), case.arrays("combine")
    good = case.buffers("combine", arrays)
    other = case.backend.empty((3, *toy.LATENT_SHAPE), "fp32")
    for changes, message in (
        ({"output": None}, "expected buffers for"),
        ({"latents": other}, "latents must be fp32"),
        ({"coefficients": case.backend.empty((1,), "fp32")}, "coefficients must be fp32"),
        ({"latents": case.backend.empty(good["latents"].shape, "fp16")}, "latents must be fp32"),
        ({"latents": good["latents_0"]}, "output latents is bound twice"),
        ({"latents": good["output"]}, "output latents is bound twice"),
    ):
        bad = {name: buffer for name, buffer in {**good, **changes}.items() if buffer is not None}
        with pytest.raises(EngineError, match=message):
            engine.bind(bad)
    shared = {**good, "latents_0": good["outputs_0"]}  # two inputs may share
    engine.bind(shared).run()
    case.check("combine", {**arrays, "latents_0": arrays["outputs_0"]}, shared)


@pytest.mark.cpu
@every
@pytest.mark.parametrize("capture", ["plan", "step", "none"])
def test_joined_calls_run_in_order(backend: str, capture: Capture, tmp_path: Path) -> None:
    """The second reads what the first writes; every way of launching, first run and later ones."""
    case = Toy(backend, tmp_path, capture=capture)
    engine, arrays = case.load("combine"), case.arrays("combine")
    first = case.buffers("combine", arrays)
    second = {**case.buffers("combine", {**arrays}), "latents_0": first["latents"]}
    joined = case.backend.join([engine.bind(first), engine.bind(second)])
    for number in range(3):
        arrays["latents_0"] = arrays["latents_0"] + number
        case.backend.upload(arrays["latents_0"], first["latents_0"])
        joined.run()
        between = toy.step("combine", case.layout, arrays)["latents"]
        case.check("combine", {**arrays, "latents_0": between}, second)


@pytest.mark.cpu
@every
def test_what_cannot_be_loaded_is_one_line(backend: str, tmp_path: Path) -> None:
    case = Toy(backend, tmp_path)
    graph = case.graphs.graph("full")
    broken = tmp_path / "broken"
    broken.write_bytes(b"no engine")
    unknown = msgspec.structs.replace(graph, role="text_encoder", inputs=graph.outputs)
    with pytest.raises((EngineError, InputError)) as caught:
        if backend == "torch":  # there is no file that could be broken
            OPENERS[backend](msgspec.structs.replace(case.graphs, graphs=(graph,)), tmp_path, Settings()).backend.load(
                unknown, broken
            )
        else:
            case.backend.load(graph, broken)
    assert "\n" not in str(caught.value)


@pytest.mark.cpu
@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("capture", ["plan", "step", "none"])
def test_backends_agree_on_a_plan(guided: bool, capture: Capture, tmp_path: Path) -> None:
    """With the plan as its documentation reads, hence with each other; batch sizes in turn."""
    layout, plan = full_layout(guided=guided), full_plan(guided=guided)
    for backend in backend_names():
        case = Toy(backend, tmp_path / backend, layout, capture)
        denoiser = Denoiser(case.backend, case.graphs, load_steps(case.opened, case.graphs))
        for batch in (1, 3, 1, 2, 3):
            inputs = inputs_of(layout, batch, seed=batch)
            expected = toy.interpret(plan, layout, **inputs, draw=noises(batch))
            found = denoiser.run(plan, **inputs, draw=noises(batch))
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6, err_msg=backend)
