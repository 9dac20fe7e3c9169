"""Damaged reports have no step times."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from lemica_trt.bundle.manifest import STEP_TIMES, VERIFY_REPORT
from lemica_trt.evaluate.timing import stored_steps

pytestmark = pytest.mark.null


@pytest.mark.parametrize("damaged", [b"{", b'{"x": "\xff"}', b'{"x":' + b"[" * 100_000])
def test_damaged_reports_have_no_times(tmp_path: Path, damaged: bytes) -> None:
    for file in (STEP_TIMES, VERIFY_REPORT):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(damaged)
    assert stored_steps(SimpleNamespace(path=tmp_path), "x") is None  # type: ignore[arg-type]
