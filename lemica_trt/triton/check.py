"""Lint of a model repository, offline: configs against Triton's protobuf, digests, shapes between the models.

The protobuf is tritonclient's (`pip install 'lemica-trt[client]'`).
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lemica_trt import __version__
from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.errors import LemicaError, MissingDependencyError, UsageError, VerificationError
from lemica_trt.core.values import Value
from lemica_trt.triton.interface import CACHED, MODELS, STREAMS, Interface, Port, interfaces
from lemica_trt.triton.repository import BUNDLE, model_file


class Finding(Value, frozen=True):
    """What is wrong, and in which file of the repository. Notes are worth knowing and fail nothing."""

    path: str
    message: str
    note: bool = False


def check_repository(target: str | os.PathLike[str]) -> tuple[Finding, ...]:
    """Everything that is wrong with a repository; empty: nothing.

    Raises:
        UsageError: `target` is not a repository of lemica-trt.
        MissingDependencyError: tritonclient is not installed.
    """
    folder = Path(target)
    if not (folder / BUNDLE).is_dir():
        raise UsageError(
            f"{target}: expected a model repository with {BUNDLE}, got something else",
            fix="give the folder that 'lemica-trt triton BUNDLE -o' wrote",
        )
    parse = _parser()
    try:
        bundle = Bundle.open(folder / BUNDLE)
        bundle.check()
    except LemicaError as error:
        return (Finding(path=BUNDLE, message=str(error)),)
    return tuple(_findings(folder, bundle, parse))


def require_sound(target: str | os.PathLike[str]) -> tuple[Finding, ...]:
    """`check_repository`, and its notes.

    Raises:
        VerificationError: something is wrong; the first finding is in the message, with how many there are.
    """
    findings = check_repository(target)
    wrong = [finding for finding in findings if not finding.note]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise VerificationError(
            f"{target}: {wrong[0].path}: {wrong[0].message}{more}",
            fix="write the repository again with 'lemica-trt triton', or undo the change",
        )
    return findings


def _findings(folder: Path, bundle: Bundle, parse: Any) -> Iterator[Finding]:
    expected = interfaces(bundle.manifest)
    for model in MODELS:
        if model in expected and not (folder / model / "config.pbtxt").is_file():
            yield Finding(path=f"{model}/config.pbtxt", message="expected a config, it is missing")
    for path in sorted(folder.glob("*/config.pbtxt")) + sorted(folder.glob("*/configs/*.pbtxt")):
        relative = path.relative_to(folder).as_posix()
        model = relative.split("/")[0]
        if model not in expected:
            yield Finding(path=relative, message="not a model that lemica-trt writes for this bundle", note=True)
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as broken:
            yield Finding(path=relative, message=f"expected Triton's ModelConfig, got: {broken}")
            continue
        config, error = parse(text)
        if error:
            yield Finding(path=relative, message=f"expected Triton's ModelConfig, got: {error}")
            continue
        for message in _wrong_in(config, text, model, expected[model], bundle, folder):
            yield Finding(path=relative, message=message)
        if relative.endswith("/configs/cpu.pbtxt"):
            for group in config["instance_group"]:
                if group["kind"] != "KIND_CPU":
                    yield Finding(path=relative, message=f"expected KIND_CPU, got {group['kind']}")
    for model in expected:
        file = folder / model / "1" / "model.py"
        if not file.is_file():
            yield Finding(path=f"{model}/1/model.py", message="expected a model, it is missing")
        elif file.read_bytes() != model_file(model):
            message = f"not the file that lemica-trt {__version__} writes; if you changed it, it is yours to check"
            yield Finding(path=f"{model}/1/model.py", message=message, note=True)


def _wrong_in(
    config: Mapping[str, Any], text: str, model: str, expected: Interface, bundle: Bundle, folder: Path
) -> Iterator[str]:
    """Everything wrong with one parsed config."""
    manifest = bundle.manifest
    if config["name"] != model:
        yield f"name: expected {model!r}, as the folder is called, got {config['name']!r}"
    if config["backend"] != "python":
        yield f"backend: expected 'python', got {config['backend']!r}"
    if not re.search(r"^\s*max_batch_size\s*:", text, re.MULTILINE):
        yield "max_batch_size: expected to be written, it is missing"
    most = manifest.graphs.max_batch if model.startswith("denoiser") else config["max_batch_size"]
    if not 1 <= config["max_batch_size"] <= most:
        yield f"max_batch_size: expected 1 … {most}, got {config['max_batch_size']}"
    for kind, ports in (("input", expected.inputs), ("output", expected.outputs)):
        found = {
            tensor["name"]: Port(tensor["name"], tensor["data_type"].removeprefix("TYPE_"), tuple(tensor["dims"]))
            for tensor in config[kind]
        }
        for port in ports:
            got = found.pop(port.name, None)
            if got != port:
                shown = "nothing" if got is None else f"{got.dtype} {list(got.dims)}"
                yield f"{kind} {port.name}: expected {port.dtype} {list(port.dims)}, got {shown}"
        for name in found:
            yield f"{kind} {name}: not a tensor of this model"
    if config["decoupled"] != (model in STREAMS):
        yield f"model_transaction_policy: expected decoupled {model in STREAMS}, got {config['decoupled']}"
    if config["response_cache"] and model not in CACHED:
        yield "response_cache: answers of this model depend on parameters, which are not part of the cache's key"
    parameters = config["parameters"]
    wanted = {"bundle", "graphs", "lemica_trt"}
    wanted |= set() if model.startswith("pipeline") else {"backend", "threads"}
    wanted |= {"batching"} if model.startswith("denoiser") else set()
    wanted |= {"stream"} if model in STREAMS else set()
    if not wanted <= set(parameters):
        missing = ", ".join(sorted(wanted - set(parameters)))
        yield f"parameters: expected {', '.join(sorted(wanted))}; missing: {missing}"
        return
    if ("stream" in parameters) != (model in STREAMS):
        yield "parameter stream: belongs to the streaming models"
    if (folder / model / parameters["bundle"]).resolve() != (folder / BUNDLE).resolve():
        yield f"parameter bundle: expected ../{BUNDLE}, got {parameters['bundle']!r}"
    if parameters["lemica_trt"] != __version__:
        yield f"parameter lemica_trt: expected {__version__}, got {parameters['lemica_trt']}"
    backend = parameters.get("backend")
    if backend is not None and backend not in {entry.key.backend for entry in manifest.engines}:
        yield f"parameter backend: the bundle has no engines for {backend!r}"
    elif parameters["graphs"] != bundle.engine(backend).key.graphs_digest:
        yield "parameter graphs: expected the digest of the bundle's graphs, got another"
    if "threads" in parameters and not parameters["threads"].isdecimal():
        yield f"parameter threads: expected a number, got {parameters['threads']!r}"
    if parameters.get("batching", "exact") not in ("exact", "off"):
        yield f"parameter batching: expected exact or off, got {parameters['batching']!r}"


def _parser() -> Any:
    """A function from pbtxt to (plain config, error).

    Raises:
        MissingDependencyError: tritonclient is not installed.
    """
    try:
        proto = importlib.import_module("tritonclient.grpc.model_config_pb2")
        json_format = importlib.import_module("google.protobuf.json_format")
        text_format = importlib.import_module("google.protobuf.text_format")
    except ImportError as error:
        raise MissingDependencyError(
            f"checking needs tritonclient, got: {error}", fix="pip install 'lemica-trt[client]'"
        ) from None

    def parse(text: str) -> tuple[dict[str, Any], str]:
        try:
            message = text_format.Parse(text, proto.ModelConfig())
        except text_format.ParseError as error:
            return {}, " ".join(str(error).split())
        plain = json.loads(json_format.MessageToJson(message, preserving_proto_field_name=True))
        config: dict[str, Any] = {
            "name": message.name,
            "backend": message.backend,
            "max_batch_size": message.max_batch_size,
            "decoupled": message.model_transaction_policy.decoupled,
            "response_cache": message.response_cache.enable,
            "instance_group": [{"kind": "KIND_AUTO", **group} for group in plain.get("instance_group", [])],
            "parameters": {name: value.string_value for name, value in message.parameters.items()},
        }
        for kind in ("input", "output"):
            config[kind] = [
                {**tensor, "dims": [int(size) for size in tensor.get("dims", [])]} for tensor in plain.get(kind, [])
            ]
        return config, ""

    return parse
