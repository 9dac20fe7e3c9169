"""TensorRT for RTX takes the graphs of traced pipelines: engines are built without a GPU, and do not run here."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
from traced_bundles import built

from lemica_trt.bundle.reading import Bundle

pytestmark = [
    pytest.mark.cpu,
    pytest.mark.long,
    pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="pip install tensorrt-rtx"),
    pytest.mark.filterwarnings("ignore"),  # of diffusers and exporters
]

ENGINES = ("--backend", "tensorrt-rtx", "--builder-optimization-level", 0)


@pytest.mark.parametrize("name", ["flux", "hunyuanvideo", "latte", "qwen-image"])
def test_engines_are_built_of_every_graph(name: str, tmp_path: Path) -> None:
    """Two streams, masks, frames as rows, complex rotary tables and shapes that follow the prompt."""
    bundle = Bundle.open(built(name, tmp_path, "--schedule", "0,2,4", "--verify-samples", 0, *ENGINES))
    bundle.check()
    (entry,) = bundle.manifest.engines
    assert set(entry.files) == {graph.role for graph in bundle.manifest.graphs.graphs} >= {"full", "skip", "combine"}
    assert all((bundle.path / file).stat().st_size for file in entry.files.values())
    assert set(entry.builds["full"].engine_precisions or {}) <= {"fp32"}
