"""`doctor` looks at broken machines."""

from __future__ import annotations

import pytest

from lemica_trt.backends.onnxruntime import build as onnxruntime
from lemica_trt.compiler import doctor
from lemica_trt.core.errors import MissingDependencyError
from lemica_trt.ir.report import Check

pytestmark = pytest.mark.null


@pytest.mark.parametrize(
    "error", [MissingDependencyError("got: libonnx.so.1", fix="reinstall it"), AttributeError("no providers")]
)
def test_a_broken_onnxruntime_is_told(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise error

    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(onnxruntime, "import_onnxruntime", broken)
    found = {check.what: check for check in doctor.run_checks()}
    assert found["onnxruntime providers"] == Check(what="onnxruntime providers", found=str(error), ok=False)
    assert "backends" in found, "it goes on behind it"
