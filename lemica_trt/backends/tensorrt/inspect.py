"""The checks of a build: is the network, and then the engine, what was asked for?

Before the build: inputs and outputs of the parsed network are those of the `GraphSpec`, and the layers that compute
(matrix products, convolutions, attention) of the DiT are mostly in the dtype asked for. After it the same of the
finished engine, and it computes in no dtype that its network does not: TensorRT's is loaded and inspected on the GPU
that it is for; that of TensorRT for RTX need not be for this machine, its file is read (see `program`). A failure of
either is an error, and the engine is not kept.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lemica_trt.backends.tensorrt.program import Layers
from lemica_trt.backends.tensorrt.protocol import BuildJob, WorkerError, is_out_of_memory
from lemica_trt.backends.tensorrt.vendor import DTYPES, QUANTIZED
from lemica_trt.core.files import mapped
from lemica_trt.ir.engine import NONE
from lemica_trt.ir.graphs import GraphSpec, TensorSpec

if TYPE_CHECKING:
    import tensorrt  # the names of types: which library's module it is, `worker.load_vendor` decides

COMPUTING_LAYERS = ("MATRIX_MULTIPLY", "CONVOLUTION", "DECONVOLUTION", "EINSUM", "ATTENTION_OUTPUT")
"""`LayerType`s that do a network's work."""

ATTENTION_LAYERS = ("SOFTMAX", "ATTENTION_OUTPUT")
"""`LayerType`s of which every attention has one: in parts (ONNX opset 20), or whole (opset 23)."""

_ENGINE_DTYPES = {"Float": "fp32", "FP32": "fp32", "Half": "fp16", "FP16": "fp16", "BFloat16": "bf16", "BF16": "bf16"}
_ENGINE_COMPUTING = re.compile(r"gemm|gemv|matmul|matrixmultiply|conv|mha|attention", re.IGNORECASE)
_FUSED_ATTENTION = re.compile(r"_f?mha|flash_?att", re.IGNORECASE)
_PEAK = re.compile(r"Peak memory usage of TRT CPU/GPU memory allocators: CPU \d+ MiB, GPU (\d+) MiB")


class Log:
    """Keeps of a vendor's log what is needed when something goes wrong, and the peak of GPU memory.

    Attributes:
        logger: the vendor's object.
        device_peak: bytes; None until told, and where it is nothing.
    """

    def __init__(self, trt: Any) -> None:
        self.device_peak: int | None = None
        self._errors: list[str] = []

        class Logger(trt.ILogger):  # type: ignore[misc]
            def log(logger, severity: Any, msg: str) -> None:
                self._take(severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR), msg)

        self.logger = Logger()

    def failure(self, otherwise: str) -> WorkerError:
        """What to raise: the first error, which the others follow from, or `otherwise` where there was none."""
        memory = any(is_out_of_memory(error) for error in self._errors)
        return WorkerError("memory" if memory else "build", one_line(self._errors[0]) if self._errors else otherwise)

    def _take(self, is_error: bool, message: str) -> None:
        if is_error:
            self._errors.append(message)
        elif (match := _PEAK.search(message)) and int(match[1]):
            self.device_peak = int(match[1]) << 20


def one_line(text: str) -> str:
    """A vendor's message without line breaks and without where in its sources it came from."""
    return " ".join(re.sub(r"\s*\(?In \S+ at \S+:\d+\)?|\[\w+\.cpp::\w+::\d+\]", "", text).split())


Interface = Mapping[str, tuple[str, tuple[int, ...]]]
"""Tensor name → dtype, shape; −1 for a dimension that is free."""


def check_interface(graph: GraphSpec, inputs: Interface, outputs: Interface) -> None:
    """Raise WorkerError unless these are the inputs and outputs of the graph."""
    for side, specs, got in (("input", graph.inputs, inputs), ("output", graph.outputs, outputs)):
        expected = {spec.name: (spec.dtype, _free(spec)) for spec in specs}
        if expected != got:
            name = next(name for name in {**expected, **got} if expected.get(name) != got.get(name))
            raise WorkerError(
                "build",
                f"expected {side} {name} {_describe(expected.get(name))}, it is {_describe(got.get(name))}",
            )


def check_precisions(job: BuildJob, precisions: Mapping[str, int]) -> None:
    """Raise WorkerError unless the DiT computes mostly in the dtype asked for.

    What is around the trunk may be mostly fp32 (`_keep_in_fp32_modules` of Wan): where part of it runs, some is enough.
    """
    total = sum(precisions.values())
    asked = sum(precisions.get(dtype, 0) for dtype in (job.dtype, job.options.quantize))
    if total and ((job.graph.dit == "whole" and 2 * asked <= total) or (job.graph.dit == "part" and not asked)):
        raise WorkerError("build", f"{job.dtype} was asked for, its layers compute in {_counts(precisions)}")


def network_interface(network: tensorrt.INetworkDefinition) -> tuple[Interface, Interface]:
    """Inputs and outputs of a parsed network."""
    inputs: list[tensorrt.ITensor] = [network.get_input(index) for index in range(network.num_inputs)]
    outputs: list[tensorrt.ITensor] = [network.get_output(index) for index in range(network.num_outputs)]
    sides = [
        {tensor.name: (_dtype(tensor.dtype), tuple(tensor.shape)) for tensor in side} for side in (inputs, outputs)
    ]
    return sides[0], sides[1]


class NetworkStats(NamedTuple):
    """What a network computes.

    Attributes:
        precisions: dtype → computing layers whose result has it. In a strongly typed network that is what they
            compute in, but for those that multiply what was just dequantised: they count as what that was before.
        attentions: how many attentions there are, whole or in parts: each has one softmax.
    """

    precisions: dict[str, int]
    attentions: int


def network_stats(trt: Any, network: tensorrt.INetworkDefinition) -> NetworkStats:
    """What a parsed network computes."""
    computing = {getattr(trt.LayerType, name) for name in COMPUTING_LAYERS}
    attention = {getattr(trt.LayerType, name) for name in ATTENTION_LAYERS}
    found: Counter[str] = Counter()
    attentions = 0
    dequantized: dict[str, str] = {}
    for index in range(network.num_layers):
        layer: tensorrt.ILayer = network.get_layer(index)
        attentions += layer.type in attention
        result: tensorrt.ITensor = layer.get_output(0)
        given: tensorrt.ITensor | None = layer.get_input(0)
        if layer.type == trt.LayerType.DEQUANTIZE and given is not None:
            dequantized[result.name] = QUANTIZED.get(given.dtype.name, str(given.dtype.name))
        if layer.type in computing:
            found[dequantized.get("" if given is None else given.name, _dtype(result.dtype))] += 1
    return NetworkStats(dict(found), attentions)


def check_layers(job: BuildJob, network: Mapping[str, int], engine: Layers) -> None:
    """Raise WorkerError unless the engine computes in what its network does, and the DiT in what was asked for.

    A tenth may be otherwise: a matrix product with the cast behind it in one kernel counts by the dtype of the cast.
    Of quantised layers TensorRT tells the results only.
    """
    known = {*network, *([] if job.options.quantize == NONE else [job.dtype])}
    strange = sum(count for dtype, count in engine.precisions.items() if dtype not in known)
    if 10 * strange > sum(engine.precisions.values()):
        raise WorkerError(
            "build", f"the network computes in {_counts(network)}, its engine in {_counts(engine.precisions)}"
        )
    told = job.module == "tensorrt_rtx" and bool(engine.precisions)
    if told and job.options.quantize in network and job.options.quantize not in engine.precisions:
        raise WorkerError("build", f"no layer of the engine is in {job.options.quantize}: {_counts(engine.precisions)}")
    check_precisions(job, engine.precisions)


def inspect_engine(trt: Any, log: Log, job: BuildJob) -> Layers | None:
    """Load the engine, compare its inputs and outputs with the graph's, and count what it runs.

    Returns:
        None where the engine was built to tell nothing of its layers.

    Raises:
        WorkerError: it does not load, or is something else.
    """
    runtime: tensorrt.Runtime = trt.Runtime(log.logger)
    runtime.engine_host_code_allowed = False
    with mapped(Path(job.engine)) as data:
        engine: tensorrt.ICudaEngine | None = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise log.failure("the new engine does not load")
    names: list[str] = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    sides: dict[bool, dict[str, tuple[str, tuple[int, ...]]]] = {True: {}, False: {}}
    for name in names:
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        sides[is_input][name] = (_dtype(engine.get_tensor_dtype(name)), tuple(engine.get_tensor_shape(name)))
    check_interface(job.graph, sides[True], sides[False])
    if job.options.profiling_verbosity != "detailed":
        return None
    inspector: tensorrt.EngineInspector = engine.create_engine_inspector()
    return engine_layers(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def engine_layers(information: str) -> Layers | None:
    """What the engine inspector's JSON says; None where it names no layer with its outputs.

    A layer's dtype is that of its first output. Kernels of fused attention have `mha` in their names
    (github.com/NVIDIA/TensorRT/issues/3243).
    """
    found: Counter[str] = Counter()
    fused = told = 0
    for layer in json.loads(information).get("Layers", ()):
        if not isinstance(layer, dict) or not layer.get("Outputs"):
            continue
        told += 1
        names = " ".join(str(layer.get(key, "")) for key in ("Name", "LayerType", "TacticName"))
        fused += bool(_FUSED_ATTENTION.search(names))
        words = re.findall(r"\w+", str(layer["Outputs"][0].get("Format/Datatype", "")))
        dtype = next((_ENGINE_DTYPES[word] for word in words if word in _ENGINE_DTYPES), None)
        if dtype is not None and _ENGINE_COMPUTING.search(names):
            found[dtype] += 1
    return Layers(dict(found), fused) if told else None


def _free(spec: TensorSpec) -> tuple[int, ...]:
    return tuple(dim if isinstance(dim, int) else -1 for dim in spec.shape)


def _dtype(member: tensorrt.DataType) -> str:
    return DTYPES.get(member.name, str(member.name))


def _describe(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if tensor is None else f"{tensor[0]} {list(tensor[1])}"


def _counts(precisions: Mapping[str, int]) -> str:
    return ", ".join(f"{dtype} ({count})" for dtype, count in sorted(precisions.items())) or "nothing"
