"""What lies in the `reports/` of a bundle, for people: no manifest lists it, so that nothing here is trusted."""

from __future__ import annotations

import shutil

from lemica_trt.bundle.manifest import KEPT_CLIPS, KEPT_FOLDER, REPORTS, VERIFY_REPORT
from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.errors import InputError
from lemica_trt.core.values import read_value, write_bytes, write_value
from lemica_trt.ir.kept import Kept, KeptClips
from lemica_trt.ir.report import VerifyReport

MAX_PICTURE_BYTES = 8 << 20
"""Of one picture; they are smaller by far."""


def stored_report(bundle: Bundle) -> VerifyReport | None:
    """The report of the last verification; None: there is none that this version can read."""
    try:
        return read_value(VerifyReport, bundle.path / VERIFY_REPORT)
    except InputError:
        return None


def store_report(report: VerifyReport, bundle: Bundle) -> None:
    """Put a report into the place of an earlier one."""
    write_value(report, bundle.path / VERIFY_REPORT)


def stored_kept(bundle: Bundle) -> Kept | None:
    """The clips that the last verification kept; None: there are none that are whole and that this version can read."""
    try:
        value = read_value(KeptClips, bundle.path / KEPT_CLIPS)
        paths = {path: bundle.path / REPORTS / path for path in value.files}
        if any(path.stat().st_size > MAX_PICTURE_BYTES for path in paths.values()):
            return None
        return Kept(value, {name: path.read_bytes() for name, path in paths.items()})
    except (InputError, OSError):
        return None


def store_kept(kept: Kept | None, bundle: Bundle) -> None:
    """Put clips into the place of those that an earlier verification kept; None: there are none."""
    (bundle.path / KEPT_CLIPS).unlink(missing_ok=True)
    shutil.rmtree(bundle.path / KEPT_FOLDER, ignore_errors=True)
    if kept is not None:
        for path, data in kept.pictures.items():
            write_bytes(data, bundle.path / REPORTS / path)
        write_value(kept.clips, bundle.path / KEPT_CLIPS)
