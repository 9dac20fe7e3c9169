"""What runs in a server is pinned with hashes: all that pyproject.toml asks for, for every Python; and the SBOM."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

requirements = pytest.importorskip("packaging.requirements")
tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).parents[2]
EXTRAS = ("onnxruntime", "openvino", "video", "sign")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")

pytestmark = pytest.mark.null


SERVER, BUILD = "lemica_trt/triton/requirements.txt", "docker/build-requirements.txt"


def pins(file: str = SERVER) -> list[tuple[object, list[str]]]:
    """Requirements with their hashes."""
    text = (ROOT / file).read_text()
    lines = re.sub(r"^#.*$", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    found = []
    for line in filter(str.strip, lines):
        requirement, *hashes = re.split(r"\s+--hash=", line.strip())
        found.append((requirements.Requirement(requirement), hashes))
    return found


def asked_for() -> list[object]:
    """What pyproject.toml asks for in a server."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    return [requirements.Requirement(line) for line in lines]


def environment(python: str) -> dict[str, str]:
    return {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux",
            "platform_machine": "x86_64", "platform_python_implementation": "CPython", "implementation_name": "cpython",
            "extra": ""}  # fmt: skip


@pytest.mark.parametrize("python", PYTHONS)
def test_all_that_a_server_needs_is_pinned_within_bounds(python: str) -> None:
    here = environment(python)
    versions = {
        str(pin.name): next(iter(pin.specifier)).version  # type: ignore[attr-defined]
        for pin, _ in pins()
        if pin.marker is None or pin.marker.evaluate(here)  # type: ignore[attr-defined]
    }
    for wanted in asked_for():
        if wanted.marker is None or wanted.marker.evaluate(here):  # type: ignore[attr-defined]
            assert wanted.name in versions, f"{wanted}: make lock"  # type: ignore[attr-defined]
            assert wanted.specifier.contains(versions[wanted.name]), f"{wanted}: make lock"  # type: ignore[attr-defined]
    if python != "3.13":
        assert versions["numpy"].startswith("1."), "the server of 24.10 reads wrong numbers out of numpy 2 arrays"


@pytest.mark.parametrize("file", [SERVER, BUILD])
def test_every_pin_is_one_version_with_hashes(file: str) -> None:
    for pin, hashes in pins(file):
        (specifier,) = pin.specifier  # type: ignore[attr-defined]
        assert specifier.operator == "==" and "*" not in specifier.version
        assert hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", one) for one in hashes), pin


def test_the_pins_are_what_was_tested() -> None:
    """Of constraints.txt, where it has them; numpy is another one by need."""
    tested = [requirements.Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()
              if line and not line.startswith("#")]  # fmt: skip
    versions = {one.name.replace("_", "-"): next(iter(one.specifier)).version for one in tested}
    here = environment("3.11")
    compared = 0
    for pin, _ in pins():
        if pin.name in versions and pin.name != "numpy" and (pin.marker is None or pin.marker.evaluate(here)):  # type: ignore[attr-defined]
            assert pin.specifier.contains(versions[pin.name]), f"{pin}: make lock"  # type: ignore[attr-defined]
            compared += 1
    assert compared >= 8


def test_what_makes_the_package_is_pinned_within_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    versions = {str(pin.name): next(iter(pin.specifier)).version for pin, _ in pins(BUILD)}  # type: ignore[attr-defined]
    for wanted in map(requirements.Requirement, project["build-system"]["requires"]):
        assert wanted.specifier.contains(versions[wanted.name]), f"{wanted}: make lock"


def test_the_sbom_lists_the_pins() -> None:
    bom = json.loads((ROOT / "lemica_trt/triton/sbom.cdx.json").read_text())
    assert bom["bomFormat"] == "CycloneDX"
    listed = sorted(component["purl"] for component in bom["components"])
    assert listed == sorted(f"pkg:pypi/{pin.name}@{next(iter(pin.specifier)).version}" for pin, _ in pins())  # type: ignore[attr-defined]
