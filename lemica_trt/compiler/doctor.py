"""What is on this machine, as far as building and running bundles goes: `lemica-trt doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
from pathlib import Path

from lemica_trt import __version__
from lemica_trt.backends.options import backend_names
from lemica_trt.core.errors import LemicaError, install_command
from lemica_trt.core.progress import size
from lemica_trt.ir.report import Check
from lemica_trt.ir.resources import load_profile, profile_names

LIBRARIES = {
    "onnxruntime": f"runs bundles on CPU and CUDA: {install_command('onnxruntime')}",
    "openvino": f"runs bundles on CPU: {install_command('openvino')}",
    "tensorrt": f"builds and runs engines on an NVIDIA GPU: {install_command('tensorrt')}",
    "tensorrt_lean": "runs version-compatible engines: pip install tensorrt-lean, at the version that built them",
    "tensorrt_rtx": f"builds engines on any machine, runs them on an RTX GPU: {install_command('rtx')}",
    "av": f"writes .mp4: {install_command('video')}",
    "cryptography": f"signs bundles and checks signatures: {install_command('sign')}",
    "starlette": f"serves bundles to OpenAI's clients: {install_command('serve')}",
    "torch": f"builds bundles: {install_command('build')}",
    "diffusers": f"builds bundles: {install_command('build')}",
    "onnx": f"builds bundles: {install_command('build')}",
}
"""Optional libraries, and what for."""


def run_checks() -> list[Check]:
    """What is here. Imports no heavy library except onnxruntime."""
    checks = [
        Check(what="lemica-trt", found=__version__),
        Check(what="Python", found=f"{platform.python_version()} on {platform.platform(terse=True)}"),
        Check(what="free disk here", found=size(shutil.disk_usage(Path.cwd()).free)),
    ]
    for name, purpose in LIBRARIES.items():
        here = importlib.util.find_spec(name) is not None
        checks.append(Check(what=name, found=_version(name) if here else purpose, ok=here))
    if importlib.util.find_spec("onnxruntime") is not None:
        from lemica_trt.backends.onnxruntime.build import import_onnxruntime

        try:
            providers = import_onnxruntime().get_available_providers()
        except Exception as error:  # a broken installation raises anything; saying so is what this is for
            checks.append(Check(what="onnxruntime providers", found=str(error), ok=False))
        else:
            checks.append(Check(what="onnxruntime providers", found=", ".join(providers)))
    checks.append(Check(what="NVIDIA driver", found=_driver(), ok=None))
    checks.append(Check(what="backends", found=", ".join(backend_names())))
    broken = []
    for name in profile_names():
        try:
            load_profile(name)
        except LemicaError as error:
            broken.append(Check(what=f"model {name}", found=str(error), ok=False))
    count = len(profile_names()) - len(broken)
    checks += [Check(what="named models", found=f"{count}, see lemica-trt models"), *broken]
    return checks


def _version(module: str) -> str:
    for name in importlib.metadata.packages_distributions().get(module, [module]):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "present, version unknown"


def _driver() -> str:
    path = Path("/proc/driver/nvidia/version")
    return path.read_text().splitlines()[0] if path.is_file() else "none"
