"""`doctor` looks at broken machines."""

from __future__ import annotations

import pytest

from lemica_trt.backends.onnxruntime import build as onnxruntime
from lemica_trt.compiler import diagnosis
from lemica_trt.core.errors import MissingDependencyError

pytestmark = pytest.mark.null


@pytest.mark.parametrize(
    "error", [MissingDependencyError("got: libonnx.so.1", fix="reinstall it"), AttributeError("no providers")]
)
def test_a_broken_onnxruntime_is_a_finding(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise error

    monkeypatch.setattr(diagnosis.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(onnxruntime, "import_onnxruntime", broken)
    found = {finding.what: finding for finding in diagnosis.examine()}
    assert found["onnxruntime providers"] == diagnosis.Finding(what="onnxruntime providers", found=str(error), ok=False)
    assert "backends" in found, "it goes on behind it"
