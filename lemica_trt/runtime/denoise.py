"""The denoising loop: the rows of a step plan, on engines.

Earlier latents, outputs and residuals live in rings of buffers; a row reads the slots before its own and writes its
own, so that nothing is ever moved: only which buffer is bound to which name rotates. All of that is known before the
first request. It is prepared once for each plan, batch size and length of texts (`_Program`): buffers, coefficients on
the device, one bound `Call` a row. A request uploads noise, prompt embeddings and guidance, runs the calls, downloads
the result. Rows between which the host has nothing to do are one call: a whole plan, unless somebody listens or fresh
noise is drawn.

Positions before the first row – x_{−2}, m_{−1}, a residual of a full row that has not been – are bound to buffers of
zeros, so that a request never sees what an earlier one left.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from lemica_trt.backends.base import NUMPY_DTYPES, Array, Backend, Buffer, Call, Engine, decode, encode
from lemica_trt.core.errors import InputError, UsageError
from lemica_trt.ir.graphs import COMBINE, TERM, GraphSet, Role, TensorDType, TensorSpec
from lemica_trt.ir.plan import StepPlan, check_plan, coefficient_vector
from lemica_trt.runtime.conditions import condition_shapes

PREPARED_PROGRAMS = 16
"""How many (plan, batch, lengths of texts) stay prepared; the one used longest ago goes first."""


_Shape = tuple[int, ...]


class Cancelled(Exception):
    """Raise it in `on_step` to end a request between two rows; it passes through to the caller."""


@dataclass(frozen=True)
class RowDone:
    """A row has run.

    Attributes:
        index, rows: rows 0 … index of `rows` are done.
        step: the denoising step that the row stands for.
        full: whether it computed everything.
        variant: what ran; None: the DiT did not.
        seconds: wall-clock time of the row, waiting for the device included.
    """

    index: int
    rows: int
    step: int
    full: bool
    variant: str | None
    seconds: float


OnStep = Callable[[RowDone], None]
"""Called after each row; what it raises ends the request and passes through."""

DrawNoise = Callable[[], Array]
"""Fresh standard normal noise, float32 [b, *latent_shape]; called once for each draw of each row, in order."""


class _Ring:
    """Slots for a history; positions before `first` are zeros."""

    def __init__(self, slots: tuple[Buffer, ...], zeros: Buffer, first: int) -> None:
        self._slots = slots
        self._zeros = zeros
        self._first = first

    def __getitem__(self, position: int) -> Buffer:
        return self._zeros if position < self._first else self._slots[position % len(self._slots)]


@dataclass(frozen=True)
class _Buffers:
    """Everything that requests of one batch size share."""

    latents: _Ring
    outputs: _Ring
    guidance_terms: _Ring
    caches: dict[str, _Ring]
    zeros: Buffer
    noise: Buffer | None


@dataclass(frozen=True)
class _Program:
    """A plan bound to buffers of one batch size and length of texts.

    Attributes:
        conditions: by name.
        rows: index of each row, and its call.
        spans: index of the first row of each span of rows that run without the host, and its call.
    """

    buffers: _Buffers
    conditions: dict[str, Buffer]
    rows: tuple[tuple[int, Call], ...]
    spans: tuple[tuple[int, Call], ...]
    guidance: dict[tuple[float, float], Buffer]
    result: Buffer


class Denoiser:
    """Runs plans on the step engines of one bundle.

    A denoiser holds buffers and therefore runs one request at a time: a second thread waits. For parallel requests use
    one denoiser and backend a thread, or batch.

    Args:
        backend: where the engines were loaded.
        graphs: the bundle's graphs; `layout` is the contract.
        engines: by name of the graph.
    """

    def __init__(self, backend: Backend, graphs: GraphSet, engines: Mapping[Role, Engine]) -> None:
        self._backend = backend
        self._graphs = graphs
        self._engines = engines
        self._lock = threading.RLock()
        self._running = False
        self._buffers: dict[int, _Buffers] = {}
        self._programs: OrderedDict[tuple[StepPlan, tuple[_Shape, ...]], _Program] = OrderedDict()
        self._conditions: dict[tuple[_Shape, ...], dict[str, Buffer]] = {}

    def run(
        self,
        plan: StepPlan,
        conditions: Mapping[str, Array],
        noise: Array,
        guidance: Array | None = None,
        *,
        draw: DrawNoise | None = None,
        on_step: OnStep | None = None,
    ) -> Array:
        """Denoise one batch.

        Args:
            plan: any plan that fits the graphs.
            conditions: numbers, by the names and of the shapes of the layout's `conditions`; first dimension R = 2b
                under guidance, unconditional branches first.
            noise: float32 [b, *latent_shape], the initial noise x_{−1}.
            guidance: the guidance scale of each request, [b]; None exactly where the layout is not guided.
            draw: fresh noise; needed exactly by stochastic plans.
            on_step: progress, timing and cancellation. With it the loop waits for the device after every row.

        Returns:
            float32 [b, *latent_shape], the latents of the last row.

        Raises:
            InputError: an array has another shape, or numbers that are not finite; or the plan does not fit.
            UsageError: `guidance` or `draw` missing or superfluous.
            EngineError: an engine failed.
        """
        with self._exclusively():
            return self._backend.download(self._run(plan, conditions, noise, guidance, draw, on_step))

    def run_on_device(
        self,
        plan: StepPlan,
        conditions: Mapping[str, Array],
        noise: Array,
        guidance: Array | None = None,
        *,
        draw: DrawNoise | None = None,
    ) -> Buffer:
        """As `run`, but the latents stay where they are and nobody waits for them.

        Returns:
            fp32 [b, *latent_shape], good until the denoiser's next request. A buffer of TensorRT's backend has
            `__cuda_array_interface__`, with the stream that its reader must wait for.
        """
        with self._exclusively():
            return self._run(plan, conditions, noise, guidance, draw, None)

    @contextmanager
    def _exclusively(self) -> Iterator[None]:
        """Other threads wait; a callback of the running request would wait for itself, and is refused."""
        with self._lock:
            if self._running:
                raise UsageError("on_step cannot denoise on the pipeline that called it", fix="load another one for it")
            self._running = True
            try:
                yield
            finally:
                self._running = False

    def _run(
        self,
        plan: StepPlan,
        conditions: Mapping[str, Array],
        noise: Array,
        guidance: Array | None,
        draw: DrawNoise | None,
        on_step: OnStep | None,
    ) -> Buffer:
        """Check, upload, run all rows; the buffer of the last row's latents. Under the lock."""
        layout = self._graphs.layout
        batch = len(noise)
        if not 1 <= batch <= self._graphs.max_batch:
            raise InputError(f"the batch must be 1 … {self._graphs.max_batch}, got {batch}")
        if (guidance is not None) != layout.guided:
            raise UsageError(f"guidance must be {'given' if layout.guided else 'absent'}: see the bundle's layout")
        if plan.stochastic and draw is None:
            raise UsageError(f"plan {plan.name} draws noise at its steps, but got no source of it")
        shapes = ((batch, *layout.latent_shape), *condition_shapes(layout, conditions, batch))
        program = self._program(plan, batch, shapes)
        buffers = program.buffers
        self._upload("noise", noise, buffers.latents[-1])
        for name, buffer in program.conditions.items():
            self._upload(name, conditions[name], buffer)
        if guidance is not None:
            for (offset, factor), buffer in program.guidance.items():
                self._upload("guidance", offset + factor * np.asarray(guidance, np.float64), buffer)
        draws: deque[Array] = deque(maxlen=plan.noise_history)  # newest first
        for index, call in program.spans if on_step is None else program.rows:
            start = perf_counter()
            row = plan.rows[index]
            if draw is not None:
                draws.extendleft(draw() for _ in range(row.draws))
            if row.noise and buffers.noise is not None:
                self._upload("noise", _mixed(row.noise_weights, draws), buffers.noise)
            call.run()
            if on_step is not None:
                self._backend.synchronize()
                on_step(RowDone(index, len(plan.rows), row.step, row.full, row.variant, perf_counter() - start))
        return program.result

    def _upload(self, name: str, array: Array, buffer: Buffer) -> None:
        if array.shape != buffer.shape:
            raise InputError(f"{name} must have shape {list(buffer.shape)}, got {list(array.shape)}")
        with np.errstate(over="ignore"):
            data = encode(array, buffer.dtype)
        if not np.isfinite(decode(data, buffer.dtype)).all():
            raise InputError(
                f"{name} must be finite in {buffer.dtype}", fix="check the input, or build with bf16 or fp32"
            )
        self._backend.upload(data, buffer)

    def _program(self, plan: StepPlan, batch: int, shapes: tuple[_Shape, ...]) -> _Program:
        key = (plan, shapes)
        if key not in self._programs:
            self._programs[key] = self._prepare(plan, batch, shapes)
            if len(self._programs) > PREPARED_PROGRAMS:
                self._backend.synchronize()  # it may be running
                self._programs.popitem(last=False)
                kept = {of for _, of in self._programs}
                self._conditions = {of: buffers for of, buffers in self._conditions.items() if of in kept}
        self._programs.move_to_end(key)
        return self._programs[key]

    def _prepare(self, plan: StepPlan, batch: int, shapes: tuple[_Shape, ...]) -> _Program:
        """Allocate what is missing, upload the coefficients, bind every row."""
        check_plan(plan, self._graphs)
        layout = self._graphs.layout
        buffers, conditions = self._allocate(batch), self._allocate_conditions(shapes)
        guidance: dict[tuple[float, float], Buffer] = {}
        calls = []
        written = dict.fromkeys(buffers.caches, 0)  # rows before this one that wrote each cache slot
        for i, row in enumerate(plan.rows):
            role = row.variant or COMBINE
            graph = self._graphs.graph(role)
            tensors = {**conditions, "coefficients": self._constant(coefficient_vector(row, layout))}
            tensors.update({f"latents_{j}": buffers.latents[i - 1 - j] for j in range(layout.latent_history)})
            tensors.update({f"outputs_{k}": buffers.outputs[i - 1 - k] for k in range(layout.output_history)})
            tensors.update({"latents": buffers.latents[i], "output": buffers.outputs[i]})
            if layout.guidance_history:
                terms = buffers.guidance_terms
                tensors.update({f"guidance_terms_{k}": terms[i - 1 - k] for k in range(layout.guidance_history)})
                tensors[TERM] = terms[i]
            if buffers.noise is not None:
                tensors["noise"] = buffers.noise if row.noise else buffers.zeros
            if layout.guided and row.variant is not None:
                if row.guidance not in guidance:
                    guidance[row.guidance] = self._backend.empty((batch,), "fp32")
                tensors["guidance"] = guidance[row.guidance]
            for slot in layout.caches:
                ring, count = buffers.caches[slot.name], written[slot.name]
                tensors[slot.name] = ring[count]
                tensors.update({f"{slot.name}_{k}": ring[count - 1 - k] for k in range(slot.depth)})
            if role not in self._engines:
                raise InputError(
                    f"plan {plan.name} needs the {role} graph, no engine was built of it", fix="rebuild the bundle"
                )
            names = [tensor.name for tensor in (*graph.inputs, *graph.outputs)]
            unknown = sorted(set(names) - set(tensors))
            if unknown:
                raise InputError(f"the {role} graph has tensors that the step layout does not: {', '.join(unknown)}")
            calls.append(self._engines[role].bind({name: tensors[name] for name in names}))
            for name in layout.variant(row.variant).writes if row.variant is not None else ():
                written[name] += 1
        starts = [i for i, row in enumerate(plan.rows) if i == 0 or row.draws or row.noise]
        spans = [(start, self._backend.join(calls[start:end])) for start, end in zip(starts, [*starts[1:], None])]
        result = buffers.latents[len(plan.rows) - 1]
        return _Program(buffers, conditions, tuple(enumerate(calls)), tuple(spans), guidance, result)

    def _allocate_conditions(self, shapes: tuple[_Shape, ...]) -> dict[str, Buffer]:
        """Buffers that all plans share which run on conditions of these shapes."""
        if shapes not in self._conditions:
            self._conditions[shapes] = {
                spec.name: self._backend.empty(shape, spec.dtype)
                for spec, shape in zip(self._graphs.layout.conditions, shapes[1:])
            }
        return self._conditions[shapes]

    def _allocate(self, batch: int) -> _Buffers:
        if batch not in self._buffers:
            layout = self._graphs.layout
            terms = layout.guidance_history + 1 if layout.guidance_history else 0
            shape = (batch, *layout.latent_shape)
            zeros = self._zeros(shape, "fp32")
            caches = {}
            for slot in layout.caches:
                tensor = self._written(slot.name)
                kept = (tensor.at(batch)[0], *_static(tensor))
                # A row that reads a slot and writes it must not overwrite what it reads: one more than the depth then.
                extra = any(slot.name in v.reads and slot.name in v.writes for v in layout.variants)
                # Rows with fewer writers before them than the slot is deep read zeros.
                before = self._zeros(kept, tensor.dtype) if slot.depth > 1 else zeros
                caches[slot.name] = _Ring(self._slots(slot.depth + extra, kept, tensor.dtype), before, 0)
            self._buffers[batch] = _Buffers(
                latents=_Ring(self._slots(layout.latent_history + 1, shape, "fp32"), zeros, -1),
                outputs=_Ring(self._slots(layout.output_history + 1, shape, "fp32"), zeros, 0),
                guidance_terms=_Ring(self._slots(terms, shape, "fp32"), zeros, 0),
                caches=caches,
                zeros=zeros,
                noise=self._backend.empty(shape, "fp32") if layout.stochastic else None,
            )
        return self._buffers[batch]

    def _written(self, slot: str) -> TensorSpec:
        """The output of a graph that fills a cache slot."""
        for variant in self._graphs.layout.variants:
            if slot in variant.writes:
                outputs = self._graphs.graph(variant.name).outputs
                return next(tensor for tensor in outputs if tensor.name == slot)
        raise InputError(f"no graph writes cache slot {slot}", fix="rebuild the bundle")

    def _slots(self, count: int, shape: tuple[int, ...], dtype: TensorDType) -> tuple[Buffer, ...]:
        return tuple(self._backend.empty(shape, dtype) for _ in range(count))

    def _zeros(self, shape: tuple[int, ...], dtype: TensorDType) -> Buffer:
        buffer = self._backend.empty(shape, dtype)
        self._backend.upload(np.zeros(shape, NUMPY_DTYPES[dtype]), buffer)
        return buffer

    def _constant(self, array: Array) -> Buffer:
        buffer = self._backend.empty(array.shape, "fp32")
        self._backend.upload(array, buffer)
        return buffer


def _mixed(weights: tuple[float, ...], draws: Iterable[Array]) -> Array:
    """Σ_k weights[k]·draws[k], float32; a single draw is itself."""
    total: Array | None = None
    for weight, z in zip(weights, draws):
        total = np.float32(weight) * z if total is None else total + np.float32(weight) * z
    assert total is not None
    return total


def _static(tensor: TensorSpec) -> tuple[int, ...]:
    """The shape of a tensor without batch.

    Raises:
        InputError: there are other symbolic dimensions.
    """
    rest = tuple(size for size in tensor.shape[1:] if isinstance(size, int))
    if len(rest) != len(tensor.shape) - 1:
        raise InputError(f"{tensor.name} must have a fixed shape except for the batch, got {list(tensor.shape)}")
    return rest
