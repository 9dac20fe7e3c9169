"""ONNX Runtime: the engine is the ONNX file, or one with each attention as one operator of ONNX Runtime; what else is
built is the certainty that they load, and with what.

No optimised model is written: it would hold for one ONNX Runtime version and CPU only, and loading is fast. A graph of
the engine's own lies in `engines/onnxruntime-KEY/`; external data it shares with the exported one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from lemica_trt.backends.build import ENGINES_FOLDER, Estimate, Observed, graphs_digest
from lemica_trt.backends.machine import has_vnni
from lemica_trt.backends.onnx_file import require_plain
from lemica_trt.backends.onnx_weights import ChangedGraph
from lemica_trt.backends.onnxruntime.attention import ATTENTION, write_fused
from lemica_trt.backends.onnxruntime.options import OrtOptions
from lemica_trt.backends.qdq import Kind
from lemica_trt.core.errors import EngineError, MissingDependencyError, UnsupportedError, UsageError, install_command
from lemica_trt.core.text import first_line
from lemica_trt.core.threads import usable_threads
from lemica_trt.ir.engine import NONE, EngineBuild, EngineEntry, EngineKey
from lemica_trt.ir.graphs import GraphSet, GraphSpec, Role
from lemica_trt.ir.profile import DType

if TYPE_CHECKING:
    from lemica_trt.core.progress import Reporter

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}

OPTIMIZATION_LEVELS = {
    "disabled": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "all": "ORT_ENABLE_ALL",
}

DTYPES = {
    "tensor(float)": "fp32",
    "tensor(float16)": "fp16",
    "tensor(bfloat16)": "bf16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(uint8)": "uint8",
}

OLDEST = "1.24.1" if sys.version_info >= (3, 11) else "1.20"
"""The lowest version that pyproject.toml allows on this Python."""

PACKAGES = {"cpu": "onnxruntime", "cuda": "onnxruntime-gpu"}
"""Provider → what to install."""

PROCESS_BYTES = 60_000_000
"""Memory of a process that has imported ONNX Runtime; measured on Linux."""


class OrtBuilder:
    """See `backends.build.Builder`."""

    def check(self, dtype: DType, options: OrtOptions) -> None:
        """Refuse bf16, a provider that is not in this ONNX Runtime, and --quantize of what is not fp32 on the CPU."""
        if dtype == "bf16":
            raise UnsupportedError(
                "ONNX Runtime does not run bf16 graphs",
                fix="build with --dtype fp32 (or fp16, where the model stands it), "
                "or for --backend tensorrt-rtx or tensorrt",
            )
        require_provider(import_onnxruntime(), options)
        if options.quantize != NONE and (options.provider != "cpu" or dtype != "fp32"):
            raise UnsupportedError(
                f"--quantize {options.quantize} is of fp32 graphs on the CPU, got {dtype} on {options.provider}",
                fix="build the bundle with --dtype fp32, for --provider cpu; or leave it out",
            )

    def estimate(self, weights: int) -> Estimate:
        """A graph is loaded once: its file and ONNX Runtime's own copy."""
        return Estimate(seconds=None, memory=PROCESS_BYTES + 2 * weights)

    def build(self, graphs: GraphSet, root: Path, out: Path, options: OrtOptions, reporter: Reporter) -> EngineEntry:
        """Fuse attention, and load every graph once, so that one that does not load is found now.

        Raises:
            UsageError: quantised engines are asked for, which `quantize` makes of what is built here.
            InputError: a graph asks for what no export does, see `onnx_file`.
        """
        self.check(graphs.dtype, options)
        if options.quantize != NONE:
            raise UsageError("--quantize: engines are quantised once they are built", fix="use backends.build.quantize")
        key = EngineKey(
            backend="onnxruntime",
            version=import_onnxruntime().__version__,
            target=options.provider,
            dtype=graphs.dtype,
            graphs_digest=graphs_digest(graphs, root),
            options=options.as_dict(),
        )
        folder = f"{ENGINES_FOLDER}/{key.backend}-{key.digest[:16]}"
        files: dict[Role, str] = {}
        builds: dict[Role, EngineBuild] = {}
        for graph in graphs.graphs:
            source, file = root / graph.file, f"{folder}/{graph.role}.onnx"
            require_plain(graph, source)
            found = write_fused(source, out / file, options.provider)
            files[graph.role] = file if found.fused else graph.file
            if found.total:
                builds[graph.role] = EngineBuild(attentions=found.total, fused_attention=found.fused)
                reporter.note(f"{graph.role}: {found.fused} of {found.total} attentions fused")
            open_session(graph, out / file if found.fused else source, options, data=source.parent)
        return EngineEntry(key=key, files=files, builds=builds)

    def require_quantizable(self, graphs: GraphSet, root: Path) -> None:
        """See `backends.build.require_quantizable`."""
        from lemica_trt.backends.onnxruntime.quantize import require_quantizable

        require_quantizable(graphs, root)

    def quantize(
        self,
        entry: EngineEntry,
        graphs: GraphSet,
        root: Path,
        out: Path,
        options: OrtOptions,
        observed: Mapping[Role, Observed],
        reporter: Reporter,
    ) -> EngineEntry:
        """See `backends.build.quantize`."""
        from lemica_trt.backends.onnxruntime.quantize import observed_digest, write_quantized

        self.check(graphs.dtype, options)
        if options.quantize == "none":
            raise UsageError("expected options with --quantize", fix="use backends.build.build")
        key = msgspec.structs.replace(entry.key, options=options.as_dict(), observed=observed_digest(observed))
        folder = f"{ENGINES_FOLDER}/{key.backend}-{key.digest[:16]}"
        files, builds, sources = dict(entry.files), dict(entry.builds), dict[Role, str]()
        for role, found in sorted(observed.items()):
            graph, file = graphs.graph(role), f"{folder}/{role}.onnx"
            source = (root if entry.files[role] == graph.file else out) / entry.files[role]
            data, threads = (root / graph.file).parent, options.threads or usable_threads()
            layers, error = write_quantized(
                options.quantize, source, out / file, data, found, threads, reporter, symmetric=False
            )
            open_session(graph, out / file, options, data=data)
            files[role], sources[role] = file, entry.files[role]
            builds[role] = msgspec.structs.replace(builds.get(role, EngineBuild()), layers=layers, error=error)
        return EngineEntry(key=key, files=files, builds=builds, sources=sources)


BUILDERS = {"onnxruntime": OrtBuilder()}


def import_onnxruntime() -> Any:
    """The onnxruntime module.

    Raises:
        MissingDependencyError: it is not installed.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # from 1.31 on it writes a device id and calls home
    try:
        import onnxruntime  # noqa: TID251
    except ImportError as error:
        raise MissingDependencyError(
            f"the onnxruntime backend needs the package onnxruntime, got: {error}",
            fix=install_command("onnxruntime"),
        ) from None
    return onnxruntime


def open_session(
    graph: GraphSpec,
    path: Path,
    options: OrtOptions,
    device: int = 0,
    *,
    data: Path | None = None,
    changed: ChangedGraph | None = None,
) -> Any:
    """An `onnxruntime.InferenceSession` of one graph, on exactly the provider asked for.

    Args:
        graph: what the file must declare.
        path: the ONNX file.
        options: how it is loaded.
        device: which GPU, for the provider `cuda`.
        data: folder of its external data; None: where a bundle has it.
        changed: the file, checked, with other weights; its arrays must live as long as the session.

    Raises:
        MissingDependencyError: the provider is not in this build of ONNX Runtime, or its libraries do not load.
        UnsupportedError: this ONNX Runtime is older than the graph's opset.
        InputError: the file asks for what no export does, see `onnx_file`.
        EngineError: the file does not load, or is not the graph described.
    """
    if changed is None:
        require_plain(graph, path, (ATTENTION,))
    ort = import_onnxruntime()
    wanted = require_provider(ort, options)
    settings = ort.SessionOptions()
    settings.graph_optimization_level = getattr(ort.GraphOptimizationLevel, OPTIMIZATION_LEVELS[options.optimization])
    settings.intra_op_num_threads = options.threads or usable_threads()  # its own 0 also pins threads to cores
    settings.inter_op_num_threads = 1
    # Each graph's session has threads of its own; by default they spin between two calls, against the graph that runs.
    settings.add_session_config_entry("session.intra_op.allow_spinning", "0")
    settings.add_session_config_entry("session.load_model_format", "ONNX")  # what was checked, whatever it is called
    if options.quantize != "none":
        compute_as_written(settings, options.quantize)
    settings.log_severity_level = 4  # what it prints is in the exception, too
    try:
        chosen = (wanted, {"device_id": device}) if options.provider == "cuda" else wanted
        source = _source(ort, graph, path, data, settings, changed)
        session = ort.InferenceSession(source, settings, providers=[chosen])
    except Exception as error:  # onnxruntime raises many unrelated classes
        if "ValidateOpsetForDomain" in str(error):
            raise UnsupportedError(
                f"onnxruntime {ort.__version__} does not know the operators of {graph.file}, ONNX opset {graph.opset}",
                fix=f"pip install --upgrade {PACKAGES[options.provider]}, or rebuild the bundle with --opset 20",
            ) from None
        raise EngineError(f"ONNX Runtime cannot load {graph.file}: {first_line(error)}") from None
    if wanted not in session.get_providers():
        raise MissingDependencyError(
            f"{wanted} is in this onnxruntime but does not start; got {', '.join(session.get_providers())}",
            fix="check the CUDA and cuDNN libraries that onnxruntime-gpu names for this version",
        )
    _require_described(session, graph)
    return session


def _require_described(session: Any, graph: GraphSpec) -> None:
    """Raise EngineError unless a session has the inputs and outputs of a graph."""
    found = (*session.get_inputs(), *session.get_outputs())
    declared = {tensor.name: (DTYPES.get(tensor.type), *tensor.shape) for tensor in found}
    described = {tensor.name: (tensor.dtype, *tensor.shape) for tensor in (*graph.inputs, *graph.outputs)}
    if declared != described:
        name = next(name for name in (*declared, *described) if declared.get(name) != described.get(name))
        raise EngineError(
            f"{graph.file} is not the graph described: expected {name} {described.get(name)}, got {declared.get(name)}",
            fix="rebuild the bundle",
        )


def compute_as_written(settings: Any, kind: Kind) -> None:
    """Have quantised layers computed as their graph says.

    int8: weights are read as uint8 where the CPU has no VNNI: there sums of two products of uint8 with int8 are held in
    16 bits, which is too few (ONNX Runtime pull request 12088). With VNNI it would only take longer.

    fp8: products are in fp32. ONNX Runtime 1.31 would fuse them as if they were of integers, and refuse the result.

    Args:
        settings: `onnxruntime.SessionOptions`.
        kind: what linear layers are quantised to.
    """
    if kind == "fp8":
        settings.add_session_config_entry("session.disable_quant_qdq", "1")
    elif not has_vnni():
        settings.add_session_config_entry("session.x64quantprecision", "1")


def data_folder(graph: GraphSpec, path: Path) -> Path:
    """Where a bundle has the external data of a graph.

    Args:
        path: the ONNX file: the exported one, or one of an engine's own.
    """
    own = path.parent.parent.name == ENGINES_FOLDER
    return (path.parent.parent.parent / graph.file).parent if own else path.parent


def _source(
    ort: Any, graph: GraphSpec, path: Path, data: Path | None, settings: Any, changed: ChangedGraph | None
) -> str | bytes:
    """What a session is made of: the file, or its content where its external data lie in another folder or it was
    changed."""
    data = data or data_folder(graph, path)
    if changed is None and (data == path.parent or not graph.data_files):
        return str(path)
    if graph.data_files:
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(data))
    if changed is None:
        return path.read_bytes()
    if changed.external:
        values = [ort.OrtValue.ortvalue_from_numpy(array) for array in changed.external.values()]
        settings.add_external_initializers(list(changed.external), values)
    return changed.content


def require_provider(ort: Any, options: OrtOptions) -> str:
    """ONNX Runtime's name of the provider asked for.

    Raises:
        MissingDependencyError: this ONNX Runtime does not have it.
    """
    wanted = PROVIDERS[options.provider]
    if wanted not in ort.get_available_providers():
        raise MissingDependencyError(
            f"this onnxruntime ({ort.__version__}) has no {wanted}",
            fix="pip uninstall onnxruntime && pip install onnxruntime-gpu" if options.provider == "cuda" else None,
        )
    return wanted
