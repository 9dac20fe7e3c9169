"""The backend interface on PyTorch modules: the loop drives the same rows as on engines.

The modules are the caller's (`Settings.modules`); a buffer is a tensor. On CUDA, calls are captured as CUDA graphs as
`Capture` says, once their modules have run: the first run initialises libraries and chooses kernels, which no capture
may do. All graphs of a backend share one pool of memory, since one thread runs them one after the other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from lemica_trt.backends.base import (
    Array,
    Buffer,
    Call,
    InOrder,
    Settings,
    check_binding,
    check_upload,
)
from lemica_trt.backends.options import options_from_key
from lemica_trt.backends.torch.options import TorchOptions
from lemica_trt.core.errors import EngineError, MissingDependencyError
from lemica_trt.core.text import first_line
from lemica_trt.ir.engine import EngineKey
from lemica_trt.ir.graphs import GraphSpec, TensorDType

Module = Callable[[dict[str, Tensor]], dict[str, Tensor]]
"""Takes and returns tensors by the names in the `GraphSpec`."""

TORCH_DTYPES: dict[TensorDType, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int64": torch.int64,
    "int32": torch.int32,
    "uint8": torch.uint8,
}


def open_backend(key: EngineKey, settings: Settings) -> TorchBackend:
    """See `backends.base.open_backend`; `key.target` is the type of the device, `cpu` or `cuda`.

    Raises:
        MissingDependencyError: PyTorch sees no such GPU.
    """
    cuda = key.target == "cuda"
    if cuda and settings.device >= torch.cuda.device_count():
        raise MissingDependencyError(
            f"expected an NVIDIA GPU {settings.device}, this PyTorch ({torch.__version__}) sees "
            f"{torch.cuda.device_count()}",
            fix="check nvidia-smi and that PyTorch was installed with CUDA, or use the device cpu",
        )
    return TorchBackend(
        torch.device("cuda", settings.device) if cuda else torch.device("cpu"),
        settings,
        cast(TorchOptions, options_from_key(key)),
    )


class TorchBuffer:
    """A tensor."""

    def __init__(self, tensor: Tensor, dtype: TensorDType) -> None:
        self.tensor = tensor
        self.dtype = dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def numbers(self) -> Tensor:
        """The tensor in the dtype that numpy knows: bf16 is its bits (`NUMPY_DTYPES`)."""
        return self.tensor.view(torch.uint16) if self.dtype == "bf16" else self.tensor


class Step:
    """A module with tensors for its inputs and outputs."""

    def __init__(self, module: Module, graph: GraphSpec, buffers: Mapping[str, Buffer]) -> None:
        self.module = module
        self._graph = graph
        self._tensors = {name: cast(TorchBuffer, buffer).tensor for name, buffer in buffers.items()}

    def enqueue(self) -> None:
        """Run the module and copy what it returns into the output tensors.

        Raises:
            EngineError: it failed.
        """
        with torch.no_grad(), _engine_errors(f"PyTorch failed in the {self._graph.role} graph"):
            results = self.module({spec.name: self._tensors[spec.name] for spec in self._graph.inputs})
            for spec in self._graph.outputs:
                self._tensors[spec.name].copy_(results[spec.name])


class TorchCall:
    """Steps that run one after the other: enqueued at first, captured as one CUDA graph when their modules have run,
    and replayed from then on."""

    def __init__(self, backend: TorchBackend, steps: Sequence[Step], *, capture: bool) -> None:
        self.steps = tuple(steps)
        self._backend = backend
        self._capture = capture
        self._graph: torch.cuda.CUDAGraph | None = None

    def run(self) -> None:
        backend = self._backend
        with backend.current_device():
            modules = {step.module for step in self.steps}
            if self._capture and self._graph is None and modules <= backend.warm:
                graph = torch.cuda.CUDAGraph()
                torch.cuda.synchronize()
                with _engine_errors("the plan cannot be captured"), torch.cuda.graph(graph, pool=backend.pool):
                    self._enqueue()
                self._graph = graph
            if self._graph is None:
                self._enqueue()
                backend.warm |= modules
            else:
                self._graph.replay()

    def _enqueue(self) -> None:
        for step in self.steps:
            step.enqueue()


class TorchEngine:
    """A module."""

    def __init__(self, backend: TorchBackend, module: Module, graph: GraphSpec) -> None:
        self._backend = backend
        self._module = module
        self._graph = graph

    def bind(self, buffers: Mapping[str, Buffer], *, once: bool = False) -> TorchCall:
        check_binding(self._graph, buffers)
        capture = self._backend.capture != "none" and not once
        return TorchCall(self._backend, [Step(self._module, self._graph, buffers)], capture=capture)


class TorchBackend:
    """PyTorch on one device.

    Args:
        device: of all tensors; the modules' parameters must be there.
        settings: `modules` and `capture`; on a CPU nothing is captured.
        options: how modules are run.

    Attributes:
        warm: modules that have run once.
    """

    def __init__(self, device: torch.device, settings: Settings, options: TorchOptions) -> None:
        self._device = device
        self._modules = settings.modules
        self._options = options
        cuda = device.type == "cuda"
        self.capture = settings.capture if cuda else "none"
        self.pool: Any = torch.cuda.graph_pool_handle() if cuda else None
        self.warm: set[Module] = set()

    def empty(self, shape: tuple[int, ...], dtype: TensorDType) -> TorchBuffer:
        with _engine_errors(f"cannot allocate {dtype} {list(shape)}"):
            return TorchBuffer(torch.empty(shape, dtype=TORCH_DTYPES[dtype], device=self._device), dtype)

    def upload(self, array: Array, buffer: Buffer) -> None:
        check_upload(array, buffer)
        cast(TorchBuffer, buffer).numbers.copy_(torch.from_numpy(np.require(array, requirements=["C", "W"])))

    def download(self, buffer: Buffer) -> Array:
        return np.array(cast(TorchBuffer, buffer).numbers.cpu().numpy())

    def load(self, graph: GraphSpec, path: Path) -> TorchEngine:
        """The module of a graph; there is no file to load.

        Raises:
            EngineError: the caller gave no such module.
        """
        if graph.role not in self._modules:
            raise EngineError(
                f"expected a module for the {graph.role} graph, got: {', '.join(sorted(self._modules)) or 'none'}",
                fix="pass it in Settings.modules",
            )
        module = self._modules[graph.role]
        return TorchEngine(self, torch.compile(module) if self._options.compile else module, graph)

    def join(self, calls: Sequence[Call]) -> Call:
        if self.capture != "plan":
            return InOrder(calls)
        return TorchCall(self, [step for call in calls for step in cast(TorchCall, call).steps], capture=True)

    def synchronize(self) -> None:
        if self._device.type == "cuda":
            with _engine_errors("the GPU failed"):
                torch.cuda.synchronize(self._device)

    def device_memory(self) -> int | None:
        if self._device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    def current_device(self) -> contextlib.AbstractContextManager[Any]:
        """While it is open, what is enqueued goes to this device: CUDA keeps one for each thread."""
        return torch.cuda.device(self._device) if self._device.type == "cuda" else contextlib.nullcontext()


@contextlib.contextmanager
def _engine_errors(what: str) -> Iterator[None]:
    """Turn what PyTorch raises into one line."""
    try:
        yield
    except EngineError:
        raise
    except (RuntimeError, ValueError, TypeError, KeyError) as error:  # out of memory is a RuntimeError
        raise EngineError(f"{what}: {first_line(error)}") from None
