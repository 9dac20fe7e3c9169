"""What a model checks before it serves, and its pipeline. It refuses to load with

- a server older than `OLDEST_SERVER`, or a python backend without what the models use;
- a numpy that this server cannot read (of numpy 2, the backend of 24.10 reads wrong numbers without a word);
- another lemica-trt than the one that wrote the repository, or another bundle than it was written for;
- a bundle with a file missing, altered or not listed;
- a bundle that none of the keys of LEMICA_TRUSTED_KEYS signed, if that is set, or has to be;
- engines of another TensorRT or GPU than the one here (the runtime compares).

Before it opens the bundle it gives up the right to write into it (`confinement`).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from lemica_trt import __version__
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.signing import TRUSTED_KEYS
from lemica_trt.core.atomic_folder import finish_swap
from lemica_trt.core.errors import UnsupportedError
from lemica_trt.runtime.pipeline import Pipeline
from lemica_trt.triton.interface import OLDEST_SERVER, graphs_of
from lemica_trt.triton.server import confinement, lifetime, temporary


def load_pipeline(pb_utils: Any, args: Mapping[str, str]) -> tuple[Pipeline, dict[str, str]]:
    """Check the server and the bundle, and load the engines that a model runs.

    Args:
        args: of `initialize`.

    Returns:
        The pipeline, and the parameters of config.pbtxt.

    Raises:
        LemicaError: anything is not as it must be; the server then rejects the model, and keeps an older one.
    """
    bundle, parameters = open_bundle(pb_utils, args)
    # Not by CUDA_VISIBLE_DEVICES: the backend names devices to this process as the server counts them.
    device = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else 0
    threads = int(parameters["threads"]) or None
    roles = graphs_of(args["model_name"], bundle.manifest)
    return Pipeline(bundle, backend=parameters["backend"], device=device, threads=threads, roles=roles), parameters


def open_bundle(pb_utils: Any, args: Mapping[str, str]) -> tuple[Bundle, dict[str, str]]:
    """Check the server and every file of the bundle; the bundle and the parameters of config.pbtxt.

    Raises:
        LemicaError: as `load_pipeline`.
    """
    check_server(pb_utils)
    config = json.loads(args["model_config"])
    parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
    if parameters["lemica_trt"] != __version__:
        raise UnsupportedError(
            f"{args['model_name']} was written by lemica-trt {parameters['lemica_trt']}, here is {__version__}",
            fix="install that version, or write the repository again with 'lemica-trt triton'",
        )
    folder = Path(args["model_repository"]) / parameters["bundle"]
    _confine(pb_utils, args, folder)
    lifetime.exit_with_parent()
    temporary.remove_leftovers()
    bundle = Bundle.open(folder)
    if parameters["require_signature"] == "yes" and bundle.signed_by is None:
        raise UnsupportedError(
            f"{args['model_name']} was written for a bundle that must be signed, and the server trusts no key",
            fix=f"start it with {TRUSTED_KEYS}=PUBLIC.pem",
        )
    bundle.check()
    if bundle.digest != parameters["manifest"]:
        raise UnsupportedError(
            f"{folder}: expected the bundle that {args['model_name']} was written for, got another",
            fix="write the repository again with 'lemica-trt triton'",
        )
    return bundle, parameters


def _confine(pb_utils: Any, args: Mapping[str, str], folder: Path) -> None:
    """Take the right to write into the repository away from this process; a line in the log says what is not. What a
    killed writer left is put right before."""
    if lifetime.in_server():
        with suppress(OSError):
            finish_swap(folder)
        gpu = args["model_instance_kind"] == "GPU"
        notes = confinement.confine(Path(args["model_repository"]).parent, folder, gpu=gpu)
    else:  # whatever this process is, it goes on with something else
        notes = ["no server's Python backend has started this process: it may still write into the repository"]
    for note in notes:
        pb_utils.Logger.log_warn(f"{args['model_name']}: {note}")


def check_server(pb_utils: Any) -> None:
    """Raise UnsupportedError unless this server and its python backend do what the models need."""
    release = os.environ.get("TRITON_SERVER_VERSION", "")  # set in NVIDIA's containers
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers and (int(numbers[1]), int(numbers[2])) < OLDEST_SERVER:
        raise UnsupportedError(f"expected tritonserver {OLDEST_SERVER[0]}.{OLDEST_SERVER[1]} or newer, got {release}")
    for owner, name in (
        (pb_utils.InferenceRequest, "is_cancelled"),
        (pb_utils.InferenceRequest, "timeout"),
        (pb_utils.InferenceRequest, "get_response_sender"),
        (pb_utils.TritonError, "CANCELLED"),
        (pb_utils.MetricFamily, "HISTOGRAM"),
    ):
        if not hasattr(owner, name):
            raise UnsupportedError(
                f"expected a python backend with {name}, this one has none",
                fix=f"use tritonserver {OLDEST_SERVER[0]}.{OLDEST_SERVER[1]} or newer",
            )
    for array in (np.arange(1, 8, dtype=np.float32), np.array([b"text", b""], np.object_)):
        tensor = pb_utils.Tensor("round_trip", array)
        if array.dtype == np.float32:  # through the memory that the server reads, not the array that it was given
            tensor = pb_utils.Tensor.from_dlpack("round_trip", tensor.to_dlpack())
        if not np.array_equal(tensor.as_numpy(), array):
            raise UnsupportedError(
                f"this server cannot read arrays of numpy {np.__version__}: a small one came back changed",
                fix="pip install 'numpy<2' in the interpreter of the python backend",
            )
