"""Peak memory and time of one attention by the number of tokens, in parts and as each CPU backend runs it.

    OMP_NUM_THREADS=1 python benchmarks/attention_memory.py --output benchmarks/results/attention-memory.json

fp32, 16 heads of 64, batch 1, random numbers. Each run is a process of its own: it writes the graph as the exporter
writes it, builds it, binds buffers, and runs it once. Memory is the kernel's high-water mark after that run above what
the process had when the buffers were filled, so that neither libraries nor inputs and outputs count. `in parts` is the
exported graph on ONNX Runtime; it is left out where its scores need more than `--limit`. Writes JSON
(`record.AttentionMemory`) and prints its table.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from record import AttentionMemory, AttentionRow, this_run, write_result
from tables import described

from lemica_trt.backends.base import open_backend
from lemica_trt.backends.build import build
from lemica_trt.core.progress import reporter
from lemica_trt.ir.graphs import GraphSet, GraphSpec, TensorSpec, step_layout

HEADS, WIDTH = 16, 64
IN_PARTS = "in parts"


def write_attention(folder: Path, tokens: int, *, masked: bool = False) -> GraphSet:
    """One attention as `torch.onnx` writes it at opset 20, as the graph `full`."""
    shape = (1, HEADS, tokens, WIDTH)
    specs = [TensorSpec(name=name, dtype="fp32", shape=shape) for name in "qkvy"]
    if masked:
        specs.insert(3, TensorSpec(name="mask", dtype="fp32", shape=(1, 1, 1, tokens)))
    node = helper.make_node
    nodes = [
        node("Mul", ["q", "root"], ["rows"]),
        node("Transpose", ["k"], ["turned"], perm=[0, 1, 3, 2]),
        node("Mul", ["turned", "root"], ["columns"]),
        node("MatMul", ["rows", "columns"], ["scores"]),
        *([node("Add", ["scores", "mask"], ["masked"])] if masked else []),
        node("Softmax", ["masked" if masked else "scores"], ["weights"], axis=-1),
        node("MatMul", ["weights", "v"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(spec.name, TensorProto.FLOAT, spec.shape) for spec in specs]
    root = numpy_helper.from_array(np.array([WIDTH**-0.25], np.float32), "root")
    body = helper.make_graph(nodes, "g", values[:-1], values[-1:], [root])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (folder / "onnx").mkdir(parents=True, exist_ok=True)
    onnx.save_model(onnx.shape_inference.infer_shapes(model), str(folder / "onnx/full.onnx"))
    graph = GraphSpec(role="full", file="onnx/full.onnx", inputs=tuple(specs[:-1]), outputs=tuple(specs[-1:]), opset=20)
    layout = step_layout(latent_shape=(1,), latent_history=1, output_history=1)
    return GraphSet(dtype="fp32", layout=layout, max_batch=1, graphs=(graph,))


def measured(how: str, tokens: int, *, masked: bool = False) -> AttentionRow:
    """One attention in this process, whose peak must not have been higher before."""
    name = "onnxruntime" if how == IN_PARTS else how
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        graphs = write_attention(folder, tokens, masked=masked)
        entry, (graph,) = build(name, graphs, folder, folder, {"threads": 1}), graphs.graphs
        backend, random = open_backend(entry.key), np.random.default_rng(0)
        engine = backend.load(graph, folder / (graph.file if how == IN_PARTS else entry.files["full"]))
        buffers = {spec.name: backend.empty(spec.at(1), spec.dtype) for spec in (*graph.inputs, *graph.outputs)}
        for buffer in buffers.values():
            backend.upload(random.standard_normal(buffer.shape, np.float32), buffer)
        call, before, start = engine.bind(buffers), _status("VmRSS"), perf_counter()
        call.run()
        backend.synchronize()
        seconds = perf_counter() - start
    return AttentionRow(how=how, tokens=tokens, seconds=seconds, memory=_status("VmHWM") - before)


def _status(name: str) -> int:
    """Bytes that Linux says of this process. `ru_maxrss` would start at what the parent had."""
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"), re.MULTILINE)
    assert found
    return int(found[1]) << 10


def in_a_process(how: str, tokens: int, *, masked: bool = False) -> AttentionRow:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--one", how, "--tokens", str(tokens), *(["--masked"] if masked else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return msgspec.json.decode(done.stdout, type=AttentionRow)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[6000, 17_776], help="17 776: CogVideoX-2B's")
    parser.add_argument("--backends", nargs="+", default=["onnxruntime", "openvino"])
    parser.add_argument("--limit", type=float, default=6e9, help="bytes of scores that are tried in parts")
    parser.add_argument("--masked", action="store_true", help="with a mask of keys")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help="JSON file")
    given = parser.parse_args()
    if given.one:
        sys.stdout.buffer.write(msgspec.json.encode(measured(given.one, given.tokens[0], masked=given.masked)))
        return
    if given.output is None:
        parser.error("the following arguments are required: --output")
    run, report, rows = this_run("numpy", *given.backends), reporter(), []
    for tokens in given.tokens:
        ways = [IN_PARTS] if 4 * HEADS * tokens**2 <= given.limit else []
        for how in (*ways, *given.backends):
            report.stage("run", f"{how}, {tokens} tokens")
            rows.append(in_a_process(how, tokens, masked=given.masked))
    report.close()
    result = AttentionMemory(run=run, heads=HEADS, width=WIDTH, masked=given.masked, rows=tuple(rows))
    write_result(result, given.output)
    print(described(result))


if __name__ == "__main__":
    main()
