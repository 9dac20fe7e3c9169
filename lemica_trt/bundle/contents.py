"""What bundles and work folders know of a model beside graphs and engines, as values."""

from __future__ import annotations

from pathlib import Path

from lemica_trt.bundle.manifest import ERROR_GRAPH_FILE, GRAMS_FILE, SENSITIVITY_FILE
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.workspace import Files, View, Workspace
from lemica_trt.core.errors import InputError
from lemica_trt.core.values import V, read_value, value_from_json
from lemica_trt.ir.calibration import Calibration, ErrorGraph, Sensitivity, TrajectoryGrams


def read_from(files: Files, kind: type[V], path: str) -> V:
    """A value out of a bundle or a work folder.

    Raises:
        InputError: it is not there, was altered, or is something else.
    """
    return value_from_json(kind, files.read_bytes(path), where=path)


def read_if_listed(files: Files, kind: type[V], path: str) -> V | None:
    """The same; None where it is not there."""
    return read_from(files, kind, path) if path in files.listed else None


def calibration_in(files: Files) -> Calibration | None:
    """The calibration of a bundle or a work folder; None: there is none."""
    graph = read_if_listed(files, ErrorGraph, ERROR_GRAPH_FILE)
    if graph is None:
        return None
    grams = read_if_listed(files, TrajectoryGrams, GRAMS_FILE)
    return Calibration(graph=graph, grams=grams, sensitivity=read_if_listed(files, Sensitivity, SENSITIVITY_FILE))


def calibration_at(error_graph: Path) -> Calibration:
    """An error graph, and the Gram matrices of the same calibration where they lie beside it.

    Raises:
        InputError: they are something else, or do not belong together.
    """
    graph, grams = read_value(ErrorGraph, error_graph), error_graph.with_name(Path(GRAMS_FILE).name)
    try:
        return Calibration(graph=graph, grams=read_value(TrajectoryGrams, grams) if grams.is_file() else None)
    except ValueError as error:
        raise InputError(f"{error_graph}: {error}", fix=f"move {grams.name} away, or use that of this graph") from None


def sensitivity_at(folder: Path) -> Sensitivity:
    """What a work folder or a bundle knows for calibrations at other steps, shifts and guidance scales.

    Raises:
        InputError: it is neither, or was calibrated otherwise than by secant, or from one that was.
    """
    work = Workspace(folder)
    files: Files = View(work, ["calibrate"]) if work.is_there else Bundle.open(folder)
    found = read_if_listed(files, Sensitivity, SENSITIVITY_FILE)
    if found is None:
        raise InputError(
            f"{folder}: expected a calibration by secant, got another or none",
            fix="calibrate it with --calibration secant",
        )
    return found
