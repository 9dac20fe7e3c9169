"""Bounds in pyproject.toml are consistent: with each other, with the pins, with the floor that is tested."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import pytest

requirements = pytest.importorskip("packaging.requirements")
tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.null


def sections() -> dict[str, list[str]]:
    """Requirements of `dependencies` and of each extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {"dependencies": project["dependencies"], **project["optional-dependencies"]}


def lowest(requirement: str) -> tuple[str, str, str]:
    """Name, marker, lowest version; of a requirement that names one."""
    parsed = requirements.Requirement(requirement)
    floors = [one.version for one in parsed.specifier if one.operator in (">=", "==")]
    assert len(floors) == 1, f"{requirement}: expected one lowest version"
    return parsed.name, str(parsed.marker or ""), floors[0]


def test_every_requirement_has_a_floor_and_one_only() -> None:
    """What stands in several extras has the same floor everywhere."""
    floors: dict[tuple[str, str], set[str]] = defaultdict(set)
    found = sections()
    assert {"dependencies", "onnxruntime", "build", "test", "sign"} <= found.keys()
    for lines in found.values():
        for line in lines:
            name, marker, floor = lowest(line)
            floors[name, "3.11" if "python_version" in marker and ">=" in marker else ""].add(floor)
    assert not {name: each for name, each in floors.items() if len(each) > 1}


def test_pins_are_within_the_bounds() -> None:
    """constraints.txt pins everything of `build` and `test` that is not PyTorch."""
    pins = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            parsed = requirements.Requirement(line)
            pins[parsed.name.replace("_", "-").lower()] = next(iter(parsed.specifier)).version
    found = sections()
    for line in (*found["dependencies"], *found["build"], *found["test"]):
        parsed = requirements.Requirement(line)
        if parsed.name == "torch" or (parsed.marker and not parsed.marker.evaluate({"python_version": "3.11"})):
            continue
        assert parsed.name in pins, f"{parsed.name}: not in constraints.txt"
        assert parsed.specifier.contains(pins[parsed.name]), f"{line}: constraints.txt pins {pins[parsed.name]}"


def test_the_floors_are_those_that_were_tried() -> None:
    """Who changes a floor runs tools/test_lowest.sh, and writes it here."""
    tried = {
        "accelerate": "1.0", "av": "12", "click": "8.2", "cryptography": "42", "diffusers": "0.39", "ftfy": "6.1",
        "matplotlib": "3.8", "msgspec": "0.21", "numpy": "1.24", "onnx": "1.17", "onnxscript": "0.7",
        "openvino": "2026.4", "pillow": "10.1", "rich": "13", "safetensors": "0.8", "scipy": "1.10",
        "sentencepiece": "0.2", "tokenizers": "0.20", "transformers": "5.15", "tritonclient": "2.51",
    }  # fmt: skip
    found = sections()
    floors = dict(lowest(line)[::2] for name in ("dependencies", "build", "video", "client", "openvino", "sign")
                  for line in found[name])  # fmt: skip
    assert {name: floor for name, floor in floors.items() if name in tried} == tried
