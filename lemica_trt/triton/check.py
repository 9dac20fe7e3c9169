"""Lint of a model repository, offline: configs against Triton's protobuf, digests, shapes between the models.

The protobuf is tritonclient's (`pip install 'lemica-trt[client]'`).
"""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lemica_trt import __version__
from lemica_trt.bundle.manifest import Manifest
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.signing import TrustedKey
from lemica_trt.core.errors import LemicaError, MissingDependencyError, UsageError, VerificationError, install_command
from lemica_trt.core.values import Value
from lemica_trt.triton.config import BUNDLE, parameter_names
from lemica_trt.triton.interface import STREAMS, Interface, Port, interfaces
from lemica_trt.triton.repository import START_SCRIPT, model_file, shipped

Parser = Callable[[str], dict[str, Any]]

_OURS = f"lemica-trt {__version__} writes"
_CHANGED = f"not the file that {_OURS}; if you changed it, it is yours to check"
_CLOSING_FLAGS = ("--http-restricted-api", "--grpc-restricted-protocol")
"""Flags of tritonserver that close APIs to those without a token."""


class LintIssue(Value, frozen=True):
    """What is wrong, and in which file of the repository. Notes are worth knowing and fail nothing."""

    path: str
    message: str
    note: bool = False


def check_repository(
    target: str | os.PathLike[str], trusted: Sequence[TrustedKey] | None = None
) -> tuple[LintIssue, ...]:
    """Everything that is wrong with a repository; empty: nothing.

    Args:
        target: the repository.
        trusted: keys, as `Bundle.open` takes them.

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
        bundle = Bundle.open(folder / BUNDLE, trusted=trusted)
        bundle.check()
    except LemicaError as error:
        return (LintIssue(path=BUNDLE, message=str(error)),)
    return tuple(_issues_in(folder, bundle, parse))


def require_sound(target: str | os.PathLike[str], trusted: Sequence[TrustedKey] | None = None) -> tuple[LintIssue, ...]:
    """`check_repository`, and its notes.

    Raises:
        VerificationError: something is wrong; the first issue is in the message, with how many there are.
    """
    issues = check_repository(target, trusted)
    wrong = [issue for issue in issues if not issue.note]
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise VerificationError(
            f"{target}: {wrong[0].path}: {wrong[0].message}{more}",
            fix="write the repository again with 'lemica-trt triton', or undo the change",
        )
    return issues


def _issues_in(folder: Path, bundle: Bundle, parse: Parser) -> Iterator[LintIssue]:
    expected = interfaces(bundle.manifest)
    for model in expected:
        if not (folder / model / "config.pbtxt").is_file():
            yield LintIssue(path=f"{model}/config.pbtxt", message="expected a config, it is missing")
    for path in sorted(folder.glob("*/config.pbtxt")) + sorted(folder.glob("*/configs/*.pbtxt")):
        relative = path.relative_to(folder).as_posix()
        model = relative.split("/")[0]
        if model not in expected:
            yield LintIssue(path=relative, message="not a model that lemica-trt writes for this bundle", note=True)
            continue
        try:
            text = path.read_text(encoding="utf-8")
            config = parse(text)
        except ValueError as error:
            yield LintIssue(path=relative, message=f"expected Triton's ModelConfig, got: {error}")
            continue
        messages = (
            *_wrong_identity(config, text, model, bundle.manifest),
            *_wrong_tensors(config, expected[model]),
            *_wrong_parameters(config, model, bundle, folder),
        )
        for message in messages:
            yield LintIssue(path=relative, message=message)
        if relative.endswith("/configs/cpu.pbtxt"):
            for group in config["instance_group"]:
                if group["kind"] != "KIND_CPU":
                    yield LintIssue(path=relative, message=f"expected KIND_CPU, got {group['kind']}")
    yield from _issues_in_code(folder, expected)
    yield from _issues_in_start_script(folder / START_SCRIPT)


def _issues_in_code(folder: Path, models: Iterable[str]) -> Iterator[LintIssue]:
    for model in models:
        relative = f"{model}/1/model.py"
        if not (folder / relative).is_file():
            yield LintIssue(path=relative, message="expected a model, it is missing")
        elif (folder / relative).read_bytes() != model_file(model):
            yield LintIssue(path=relative, message=_CHANGED, note=True)


def _issues_in_start_script(script: Path) -> Iterator[LintIssue]:
    """Notes on what a server that is started otherwise may let strangers do."""
    try:
        text = script.read_bytes()
    except OSError:
        text = b""
    if text == shipped(START_SCRIPT):
        return
    closed = [flag for flag in _CLOSING_FLAGS if re.search(rb"^[^#]*" + flag.encode(), text, re.MULTILINE)]
    for flag in _CLOSING_FLAGS:
        if flag not in closed:
            danger = "whoever reaches the port may load models, and so run any code"
            message = f"no {flag}: {danger}; use the start.sh that {_OURS}"
            yield LintIssue(path=script.name, message=message, note=True)
    if re.search(rb"^[^#]*--log-verbose[= ][1-9]", text, re.MULTILINE):
        yield LintIssue(path=script.name, message="--log-verbose: requests, prompts too, may be logged", note=True)
    if len(closed) == len(_CLOSING_FLAGS):
        yield LintIssue(path=script.name, message=_CHANGED, note=True)


def _wrong_identity(config: Mapping[str, Any], text: str, model: str, manifest: Manifest) -> Iterator[str]:
    """What does not say which model this is, or how it is called."""
    if config["name"] != model:
        yield f"name: expected {model!r}, as the folder is called, got {config['name']!r}"
    if config["backend"] != "python":
        yield f"backend: expected 'python', got {config['backend']!r}"
    if not re.search(r"^\s*max_batch_size\s*:", text, re.MULTILINE):
        yield "max_batch_size: expected to be written, it is missing"
    most = manifest.graphs.max_batch if model.startswith("denoiser") else config["max_batch_size"]
    if not 1 <= config["max_batch_size"] <= most:
        yield f"max_batch_size: expected 1 … {most}, got {config['max_batch_size']}"
    if config["decoupled"] != (model in STREAMS):
        yield f"model_transaction_policy: expected decoupled {model in STREAMS}, got {config['decoupled']}"
    if config["response_cache"]:
        yield "response_cache: parameters are not part of its key, so that it answers whatever they are"


def _wrong_tensors(config: Mapping[str, Any], expected: Interface) -> Iterator[str]:
    """Inputs and outputs that are not the model's."""
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


def _wrong_parameters(config: Mapping[str, Any], model: str, bundle: Bundle, folder: Path) -> Iterator[str]:
    """Parameters that the model would refuse, or that are not its own."""
    parameters = config["parameters"]
    wanted = set(parameter_names(model))
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
    if parameters["manifest"] != bundle.digest:
        yield "parameter manifest: expected the digest of the bundle, got another"
    backend = parameters.get("backend")
    if backend is not None and backend not in {entry.key.backend for entry in bundle.manifest.engines}:
        yield f"parameter backend: the bundle has no engines for {backend!r}"
    if "threads" in parameters and not parameters["threads"].isdecimal():
        yield f"parameter threads: expected a number, got {parameters['threads']!r}"
    if parameters["require_signature"] not in ("yes", "no"):
        yield f"parameter require_signature: expected yes or no, got {parameters['require_signature']!r}"
    if parameters.get("batching", "exact") not in ("exact", "off"):
        yield f"parameter batching: expected exact or off, got {parameters['batching']!r}"


def _parser() -> Parser:
    """A function from a config.pbtxt to a plain dictionary; it raises ValueError for what is none.

    Raises:
        MissingDependencyError: tritonclient is not installed.
    """
    try:
        proto = importlib.import_module("tritonclient.grpc.model_config_pb2")
        json_format = importlib.import_module("google.protobuf.json_format")
        text_format = importlib.import_module("google.protobuf.text_format")
    except ImportError as error:
        raise MissingDependencyError(
            f"checking needs tritonclient, got: {error}", fix=install_command("client")
        ) from None

    def parse(text: str) -> dict[str, Any]:
        try:
            message = text_format.Parse(text, proto.ModelConfig())
        except text_format.ParseError as error:
            raise ValueError(" ".join(str(error).split())) from None
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
        return config

    return parse
