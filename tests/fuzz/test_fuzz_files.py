"""Every format on disk, mutated: a refusal in one line or a value that fits; nothing altered is loaded as what it was.

Seeds are the golden files, a bundled profile and a bundled tokenizer. `make fuzz` runs 10⁵ mutations.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st
from mutations import TIERS, changed, run
from test_golden_files import FILES, GOLDEN

from lemica_trt.bundle.limits import require_runnable
from lemica_trt.bundle.manifest import manifest_from_json
from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.errors import LemicaError
from lemica_trt.core.text import printable
from lemica_trt.core.values import json_bytes, read_value, value_from_json
from lemica_trt.ir.calibration import ErrorGraph
from lemica_trt.ir.graphs import EncoderSpec
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.resources import load_profile, zoo_path
from lemica_trt.planning.minimax import solve

ROOT = Path(__file__).parents[2]


def refused(call: Callable[[], Any]) -> Any:
    """What a call returns; None where it refuses in one printable line. Any other error is not caught."""
    try:
        return call()
    except LemicaError as error:
        assert printable(str(error)) == str(error)
        assert len(str(error)) < 20_000
        return None


def manifest_alone(data: bytes) -> None:
    """Whoever recomputes the digest may write what they like: it is refused, or it means what it says."""
    found = refused(lambda: manifest_from_json(data, where="manifest.json"))
    if found is not None:
        assert manifest_from_json(json_bytes(found), where="again") == found


def manifest_in_its_folder(folder: Path, data: bytes) -> None:
    """Without its digest no other manifest opens."""
    assume(data != (GOLDEN / "bundle/manifest.json").read_bytes())
    (folder / "manifest.json").write_bytes(data)
    assert refused(lambda: Bundle.open(folder)) is None


def plan(data: bytes) -> None:
    graphs = manifest_from_json((GOLDEN / "bundle/manifest.json").read_bytes(), where="manifest.json").graphs
    found = refused(lambda: value_from_json(StepPlan, data, where="plan.json"))
    if found is not None:
        refused(lambda: require_runnable(found, graphs))


def error_graph(data: bytes) -> None:
    found = refused(lambda: value_from_json(ErrorGraph, data, where="error_graph.json"))
    if found is not None:
        refused(lambda: solve(found, [3]))
        refused(lambda: solve(found))


def any_value(named: tuple[str, bytes]) -> None:
    name, data = named
    found = refused(lambda: value_from_json(FILES[name], data, where=name))
    if found is not None:
        assert value_from_json(FILES[name], json_bytes(found), where=name) == found


def toml(path: Path, data: bytes) -> None:
    path.write_bytes(data)
    refused(lambda: load_profile(str(path)))


def read(name: str) -> bytes:
    return (GOLDEN / name).read_bytes()


@pytest.mark.cpu
@TIERS
def test_manifests_with_a_digest_of_their_own(many: bool) -> None:
    run(manifest_alone, changed(read("bundle/manifest.json"), is_json=True), many=many)


@pytest.mark.cpu
@TIERS
def test_manifests_beside_their_digest(many: bool, tmp_path: Path) -> None:
    folder = shutil.copytree(GOLDEN / "bundle", tmp_path / "b")
    data = changed(read("bundle/manifest.json"), is_json=True)
    run(lambda data: manifest_in_its_folder(folder, data), data, many=many)


@pytest.mark.cpu
@TIERS
def test_plans(many: bool) -> None:
    run(plan, st.one_of(*(changed(read(f"bundle/plans/{name}.json"), is_json=True) for name in ("b3", "uncached"))),
        many=many)  # fmt: skip


@pytest.mark.cpu
@TIERS
def test_error_graphs(many: bool) -> None:
    run(error_graph, changed(read("bundle/calibration/error_graph.json"), is_json=True), many=many)


@pytest.mark.cpu
@TIERS
def test_all_other_values(many: bool) -> None:
    files = [st.tuples(st.just(name), changed(read(name), is_json=True)) for name in FILES if "manifest" not in name]
    run(any_value, st.one_of(*files), many=many)


@pytest.mark.cpu
@TIERS
def test_profiles(many: bool, tmp_path: Path) -> None:
    data = changed((ROOT / "engines/cogvideox-tiny.toml").read_bytes())
    run(lambda data: toml(tmp_path / "p.toml", data), data, many=many)


@pytest.mark.cpu
@TIERS
def test_journals(many: bool, tmp_path: Path) -> None:
    """No entry of a mutated journal is another than one that was written."""
    from lemica_trt.calibrate.journal import Journal, line_content
    from lemica_trt.evaluate.runs import LatentScore, TrialHeader

    data = read("work/journals/trials.jsonl")
    header = value_from_json(TrialHeader, line_content(data.splitlines()[0]) or b"", where="journal")
    path = tmp_path / "trials.jsonl"
    path.write_bytes(data)
    written = Journal(path, header, LatentScore).entries
    assert written

    def target(data: bytes) -> None:
        path.write_bytes(data)
        found = refused(lambda: Journal(path, header, LatentScore))
        assert found is None or found.entries.items() <= written.items()

    run(target, changed(data), many=many)


@pytest.mark.cpu
@TIERS
def test_tokenizers(many: bool) -> None:
    from lemica_trt.runtime.text import PromptTokenizer

    spec = EncoderSpec(tokenizer="tokenizer.json", length=16, pad_id=0, end_id=1)

    def target(data: bytes) -> None:
        found = refused(lambda: PromptTokenizer(spec, data).ids("a big red circle moves left!"))
        assert found is None or found[0].shape == found[1].shape == (16,)

    run(
        target, changed((zoo_path("cogvideox-tiny") / "tokenizer/tokenizer.json").read_bytes(), is_json=True), many=many
    )


@pytest.mark.cpu
@TIERS
def test_onnx_files(many: bool, tmp_path: Path) -> None:
    """Through our own check and ONNX Runtime's loader, as a bundle's graphs are."""
    from lemica_trt.backends.onnxruntime.build import open_session
    from lemica_trt.backends.onnxruntime.options import OrtOptions
    from lemica_trt.bundle.manifest import Manifest

    graph = read_value(Manifest, GOLDEN / "bundle/manifest.json").graphs.graph("combine")
    path = tmp_path / "combine.onnx"

    def target(data: bytes) -> None:
        path.write_bytes(data)
        refused(lambda: open_session(graph, path, OrtOptions(threads=1)))

    run(target, changed(read("bundle/onnx/combine.onnx")), many=many)


@pytest.mark.cpu
@TIERS
def test_lora_files(many: bool, tmp_path: Path) -> None:
    """The whole file, and its header alone with a length that fits; what is read fits the module that it is for."""
    from lora_files import content

    from lemica_trt.runtime.lora_file import METADATA, LoraFile, factors_of

    module, shape = "blocks.0.to_q", (4, 6)
    factors = {"lora_A.weight": (2, shape[1]), "lora_B.weight": (shape[0], 2), "alpha": ()}
    tensors = {f"transformer.{module}.{name}": np.ones(size, np.float32) for name, size in factors.items()}
    seed = content(tensors, {METADATA: '{"transformer.lora_alpha": 8, "transformer.alpha_pattern": {"to_q": 6}}'})
    data = seed[8 + int.from_bytes(seed[:8], "little") :]
    header = seed[8 : -len(data)]
    path = tmp_path / "x.safetensors"

    def target(mutated: bytes) -> None:
        path.write_bytes(mutated)
        found = refused(lambda: factors_of(LoraFile(path), "transformer", {module: shape}))
        for its in (found or {}).values():
            assert its.a.shape[1:] == shape[1:] and its.b.shape == (shape[0], its.a.shape[0])

    path.write_bytes(seed)
    assert factors_of(LoraFile(path), "transformer", {module: shape})[module].factor == 0.5
    headers = changed(header, is_json=True).map(lambda text: len(text).to_bytes(8, "little") + text + data)
    run(target, st.one_of(changed(seed), headers), many=many)
