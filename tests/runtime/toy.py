"""A DiT of a few hundred numbers, in numpy and as ONNX files, behind the real `StepLayout`.

trunk input  h = reshape(in_scale·x, [R, 8, 12]) @ A + timestep·B + mean of prompt_embeds over the text
residual     r = tanh(h @ C)
output       u, c = reshape(h + r)          skip: r from the residual history
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lemica_trt.backends.base import NUMPY_DTYPES, InOrder, check_binding
from lemica_trt.core.errors import EngineError
from lemica_trt.ir.graphs import GraphSet, GraphSpec, StepLayout, TensorSpec, step_layout
from lemica_trt.ir.plan import PlanRow, StepPlan, trunk_reads
from lemica_trt.testing import interpreter
from lemica_trt.testing.values import plan_of

LATENT_SHAPE = (2, 3, 4, 4)
TOKENS, WIDTH, TEXT_LENGTH, VOCABULARY = 8, 12, 5, 11

_rng = np.random.default_rng(0)
A = (_rng.standard_normal((WIDTH, WIDTH)) * 0.2).astype(np.float32)
B = (_rng.standard_normal(WIDTH) * 0.1).astype(np.float32)
C = (_rng.standard_normal((WIDTH, WIDTH)) * 0.3).astype(np.float32)
TABLE = _rng.standard_normal((VOCABULARY, WIDTH)).astype(np.float32)

Arrays = Mapping[str, Any]


def layout_of(
    latents: int = 1,
    outputs: int = 1,
    residuals: int = 1,
    *,
    stochastic: bool = False,
    guided: bool = True,
    terms: int = 0,
) -> StepLayout:
    rows = "2*batch" if guided else "batch"
    return step_layout(
        latent_shape=LATENT_SHAPE,
        latent_history=latents,
        output_history=outputs,
        conditions=(TensorSpec(name="prompt_embeds", dtype="fp32", shape=(rows, TEXT_LENGTH, WIDTH)),),
        trunk_depth=residuals,
        stochastic=stochastic,
        guided=guided,
        guidance_history=terms,
    )


def graphs_of(layout: StepLayout, *, max_batch: int = 3, data_file: bool = False, mask: bool = False) -> GraphSet:
    """The description of all five graphs."""
    rows = "2*batch" if layout.guided else "batch"
    length = max(part.stop for part in layout.offsets.values())

    def tensor(name: str, *shape: int | str, dtype: str = "fp32") -> TensorSpec:
        return TensorSpec(name=name, dtype=dtype, shape=shape)  # type: ignore[arg-type]

    sample = ("batch", *LATENT_SHAPE)
    combine = [tensor(f"latents_{j}", *sample) for j in range(layout.latent_history)]
    combine += [tensor(f"outputs_{k}", *sample) for k in range(layout.output_history)]
    combine += [tensor(f"guidance_terms_{k}", *sample) for k in range(layout.guidance_history)]
    combine += [tensor("noise", *sample)] if layout.stochastic else []
    combine += [tensor("coefficients", length)]
    dit = combine + ([tensor("guidance", "batch")] if layout.guided else [])
    dit += [tensor("prompt_embeds", rows, TEXT_LENGTH, WIDTH)]
    skip = dit + [tensor(f"trunk_{k}", rows, TOKENS, WIDTH) for k in range(layout.depth("trunk"))]
    outputs = [tensor("latents", *sample), tensor("output", *sample)]
    outputs += [tensor("guidance_term", *sample)] if layout.guidance_history else []
    ids = [tensor("input_ids", "batch", TEXT_LENGTH, dtype="int64")]
    ids += [tensor("attention_mask", "batch", TEXT_LENGTH, dtype="int64")] if mask else []
    frames = [tensor("frames", "batch", 2, 4, 4, 3, dtype="uint8")]
    found = {
        "combine": (combine, outputs),
        "full": (dit, [*outputs, tensor("trunk", rows, TOKENS, WIDTH)]),
        "skip": (skip, outputs),
        "text_encoder": (ids, [tensor("prompt_embeds", "batch", TEXT_LENGTH, WIDTH)]),
        "vae_decoder": ([tensor("latents", *sample)], frames),
    }
    return GraphSet(
        dtype="fp32",
        layout=layout,
        max_batch=max_batch,
        graphs=tuple(
            GraphSpec(
                role=role,  # type: ignore[arg-type]
                file=f"onnx/{role}.onnx",
                inputs=tuple(inputs),
                outputs=tuple(results),
                opset=20,
                data_files=("onnx/full.data",) if data_file and role == "full" else (),
            )
            for role, (inputs, results) in sorted(found.items())
        ),
    )


# ---------------------------------------------------------------- the DiT in numpy


def embed(sample: Any, timestep: Any, prompt_embeds: Any) -> Any:
    """The trunk's input, [R, 8, 12]."""
    tokens = sample.reshape(len(sample), TOKENS, WIDTH)
    return tokens @ A + np.float32(timestep) * B + prompt_embeds.mean(axis=1, keepdims=True)


def residual_of(hidden: Any) -> Any:
    return np.tanh(hidden @ C)


def mix(weights: Any, arrays: list[Any]) -> Any:
    total = np.float32(weights[0]) * arrays[0]
    for weight, array in zip(weights[1:], arrays[1:]):
        total = total + np.float32(weight) * array
    return total


def guide(output: Any, guidance: Any) -> tuple[Any, Any]:
    """Output and guidance term."""
    unconditional, conditional = np.split(output, 2)
    scale, difference = guidance.reshape(-1, 1, 1, 1, 1), conditional - unconditional
    return unconditional + scale * difference, (scale - 1) * difference


def step(role: str, layout: StepLayout, inputs: Arrays) -> dict[str, Any]:
    """What the ONNX graph of a role computes."""
    part = {name: inputs["coefficients"][where] for name, where in layout.offsets.items()}
    history = {
        "latents": [inputs[f"latents_{j}"] for j in range(layout.latent_history)],
        "outputs": [inputs[f"outputs_{k}"] for k in range(layout.output_history)],
        "guidance_terms": [inputs[f"guidance_terms_{k}"] for k in range(layout.guidance_history)],
    }
    kept = layout.guidance_history > 0
    latents = mix(part["latents"], history["latents"]) + mix(part["outputs"], history["outputs"])
    if kept:
        latents = latents + mix(part["guidance_terms"], history["guidance_terms"])
    if layout.stochastic:
        latents = latents + part["noise"][0] * inputs["noise"]
    if role == "combine":
        term = {"guidance_term": mix(part["reuse"], history["guidance_terms"])} if kept else {}
        return {"latents": latents, "output": mix(part["reuse"], history["outputs"]), **term}
    sample = part["in_scale"][0] * latents
    hidden = embed(np.concatenate([sample] * (1 + layout.guided)), part["timestep"][0], inputs["prompt_embeds"])
    if role == "full":
        residual = residual_of(hidden)
    else:
        residual = mix(part["trunk"], [inputs[f"trunk_{k}"] for k in range(layout.depth("trunk"))])
    output = (hidden + residual).reshape(-1, *LATENT_SHAPE)
    output, term = guide(output, inputs["guidance"]) if layout.guided else (output, None)
    found = {"latents": latents, "output": output}
    if kept:
        found["guidance_term"] = term
    return found | ({"trunk": residual} if role == "full" else {})


class Dit:
    """The DiT of one request for `testing.interpreter`; arguments as of a request."""

    def __init__(self, layout: StepLayout, prompt_embeds: Any, guidance: Any) -> None:
        self.guided, self.prompt_embeds, self.guidance = layout.guided, prompt_embeds, guidance

    def full(self, row: PlanRow, sample: Any) -> tuple[Any, Any]:
        residual = residual_of(self._embed(row, sample))
        return self.head(row, sample, residual), residual

    def head(self, row: PlanRow, sample: Any, residual: Any) -> Any:
        return self._guided(row, sample, residual)[0]

    def guidance_term(self, row: PlanRow, sample: Any, residual: Any) -> Any:
        return self._guided(row, sample, residual)[1]

    def _guided(self, row: PlanRow, sample: Any, residual: Any) -> tuple[Any, Any]:
        output = (self._embed(row, sample) + residual).reshape(-1, *LATENT_SHAPE)
        if not self.guided:
            return output, None
        offset, factor = row.guidance
        return guide(output, (offset + factor * self.guidance).astype(np.float32))

    def _embed(self, row: PlanRow, sample: Any) -> Any:
        return embed(np.concatenate([sample] * (1 + self.guided)), row.timestep, self.prompt_embeds)


def interpret(
    plan: StepPlan, layout: StepLayout, conditions: Any, noise: Any, guidance: Any, draw: Callable[[], Any]
) -> Any:
    """The latents of a plan, float32, by the oracle."""
    return interpreter.interpret(plan, Dit(layout, conditions["prompt_embeds"], guidance), noise, lambda row: draw())[
        -1
    ][1]


# ---------------------------------------------------------------- a backend that records


class NullBuffer:
    def __init__(self, array: Any, dtype: str) -> None:
        self.array, self.dtype = array, dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)


class NullBackend:
    """`Backend` in numpy: undefined memory is NaN, every operation is recorded in `log`."""

    def __init__(self, graphs: GraphSet) -> None:
        self.graphs = graphs
        self.log: list[tuple[str, Any]] = []
        self.fail_at: int | None = None
        self.threads: set[int] = set()

    def engines(self) -> dict[Any, Any]:
        return {graph.role: self.load(graph, Path(graph.file)) for graph in self.graphs.graphs}

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        self.log.append(("empty", shape))
        kind = NUMPY_DTYPES[dtype]  # type: ignore[index]
        return NullBuffer(np.full(shape, np.nan if np.issubdtype(kind, np.floating) else 7, kind), dtype)

    def upload(self, array: Any, buffer: Any) -> None:
        assert array.shape == buffer.shape and array.dtype == buffer.array.dtype
        self.log.append(("upload", buffer))
        buffer.array[...] = array

    def download(self, buffer: Any) -> Any:
        self.log.append(("download", buffer))
        return buffer.array.copy()

    def load(self, graph: GraphSpec, path: Path) -> Any:
        return NullEngine(self, graph)

    def join(self, calls: Any) -> Any:
        return InOrder(calls)

    def synchronize(self) -> None:
        self.log.append(("synchronize", None))

    def device_memory(self) -> None:
        return None


class NullEngine:
    def __init__(self, backend: NullBackend, graph: GraphSpec) -> None:
        self.backend, self.graph = backend, graph

    def bind(self, buffers: Mapping[str, Any], *, once: bool = False) -> Any:
        check_binding(self.graph, buffers)
        self.backend.log.append(("bind", self.graph.role))
        return NullCall(self, dict(buffers))


class NullCall:
    def __init__(self, engine: NullEngine, buffers: dict[str, Any]) -> None:
        self.engine, self.buffers = engine, buffers

    def run(self) -> None:
        backend, graph = self.engine.backend, self.engine.graph
        inputs = {tensor.name: self.buffers[tensor.name] for tensor in graph.inputs}
        outputs = {tensor.name: self.buffers[tensor.name] for tensor in graph.outputs}
        assert not {id(buffer) for buffer in inputs.values()} & {id(buffer) for buffer in outputs.values()}
        assert len({id(buffer) for buffer in outputs.values()}) == len(outputs)
        runs = sum(kind == "run" for kind, _ in backend.log)
        backend.log.append(("run", graph.role))
        backend.threads.add(threading.get_ident())
        if runs == backend.fail_at:
            raise EngineError("failed on purpose")
        results = step(graph.role, backend.graphs.layout, {name: buffer.array for name, buffer in inputs.items()})
        for name, buffer in outputs.items():
            buffer.array[...] = results[name]


# ---------------------------------------------------------------- plans


def euler_plan(graphs: str, *, name: str = "default", guidance_scale: float = 3.0) -> StepPlan:
    """A row for each letter: f(ull), s(kip), r(euse of the output); x_i = x_{i−1} − m_{i−1}/N."""
    count = len(graphs)
    rows = [
        PlanRow(
            variant={"f": "full", "s": "skip", "r": None}[letter],
            step=i,
            latents=(1.0,),
            outputs=(-1.0 / count,) if i else (),
            timestep=None if letter == "r" else 1.0 - i / count,
            caches=trunk_reads(1.0) if letter == "s" else (),
            reuse=(1.0,) if letter == "r" else (),
        )
        for i, letter in enumerate(graphs)
    ]
    rows.append(PlanRow(variant=None, step=count, latents=(1.0,), outputs=(-1.0 / count,)))
    return plan_of(*rows, name=name, guidance_scale=guidance_scale)


# ---------------------------------------------------------------- the same as ONNX


def write_onnx(graphs: GraphSet, folder: Path) -> None:
    """The ONNX files of `graphs` below `folder`."""
    import onnx

    for graph in graphs.graphs:
        path = folder / graph.file
        path.parent.mkdir(parents=True, exist_ok=True)
        model = _model(graph, graphs.layout)
        data = graph.data_files
        onnx.save_model(
            model,
            str(path),
            save_as_external_data=bool(data),
            location=Path(data[0]).name if data else None,
            size_threshold=100,
        )


def _model(graph: GraphSpec, layout: StepLayout) -> Any:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kinds = {"fp32": TensorProto.FLOAT, "int64": TensorProto.INT64, "uint8": TensorProto.UINT8}
    nodes: list[Any] = []
    constants: list[Any] = []

    def op(kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"t{len(nodes)}"
        nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def constant(value: Any, dtype: Any = np.float32) -> str:
        name = f"c{len(constants)}"
        constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def coefficient(group: str, k: int = 0) -> str:
        return op("Gather", "coefficients", constant(layout.offsets[group].start + k, np.int64))

    def mixed(group: str, name: str, count: int) -> str:
        terms = [op("Mul", coefficient(group, k), f"{name}_{k}") for k in range(count)]
        total = terms[0]
        for term in terms[1:]:
            total = op("Add", total, term)
        return total

    def result(value: str, name: str) -> None:
        nodes.append(helper.make_node("Identity", [value], [name]))

    def shaped(value: str, *shape: int) -> str:
        return op("Reshape", value, constant(shape, np.int64))

    if graph.role == "text_encoder":
        embeds = op("Gather", constant(TABLE), "input_ids")
        if len(graph.inputs) == 2:
            embeds = op("Mul", embeds, op("Unsqueeze", op("Cast", "attention_mask", to=1), constant([2], np.int64)))
        result(embeds, "prompt_embeds")
    elif graph.role == "vae_decoder":
        pixels = op("Add", op("Mul", "latents", constant(40.0)), constant(128.0))
        pixels = op("Clip", pixels, constant(0.0), constant(255.0))
        result(op("Cast", op("Transpose", pixels, perm=[0, 1, 3, 4, 2]), to=kinds["uint8"]), "frames")
    else:
        latents = op(
            "Add",
            mixed("latents", "latents", layout.latent_history),
            mixed("outputs", "outputs", layout.output_history),
        )
        if layout.guidance_history:
            latents = op("Add", latents, mixed("guidance_terms", "guidance_terms", layout.guidance_history))
        if layout.stochastic:
            latents = op("Add", latents, op("Mul", coefficient("noise"), "noise"))
        result(latents, "latents")
        if graph.role == "combine":
            output = mixed("reuse", "outputs", layout.output_history)
            if layout.guidance_history:
                result(mixed("reuse", "guidance_terms", layout.guidance_history), "guidance_term")
        else:
            sample = op("Mul", coefficient("in_scale"), latents)
            if layout.guided:
                sample = op("Concat", sample, sample, axis=0)
            hidden = op("MatMul", shaped(sample, -1, TOKENS, WIDTH), constant(A))
            hidden = op("Add", hidden, op("Mul", coefficient("timestep"), constant(B)))
            mean = op("ReduceMean", "prompt_embeds", constant([1], np.int64), keepdims=1)
            hidden = op("Add", hidden, mean)
            if graph.role == "full":
                residual = op("Tanh", op("MatMul", hidden, constant(C)))
                result(residual, "trunk")
            else:
                residual = mixed("trunk", "trunk", layout.depth("trunk"))
            output = shaped(op("Add", hidden, residual), -1, *LATENT_SHAPE)
            if layout.guided:
                pair = shaped(output, 2, -1, *LATENT_SHAPE)
                uncond, cond = (op("Gather", pair, constant(i, np.int64), axis=0) for i in (0, 1))
                scale = shaped("guidance", -1, 1, 1, 1, 1)
                difference = op("Sub", cond, uncond)
                output = op("Add", uncond, op("Mul", scale, difference))
                if layout.guidance_history:
                    term = op("Mul", op("Sub", scale, constant(1.0)), difference)
                    result(term, "guidance_term")
        result(output, "output")

    def values(tensors: tuple[TensorSpec, ...]) -> list[Any]:
        return [helper.make_tensor_value_info(t.name, kinds[t.dtype], t.shape) for t in tensors]

    body = helper.make_graph(nodes, graph.role, values(graph.inputs), values(graph.outputs), constants)
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return model
