"""docker/Dockerfile, as far as it can be tried without Docker: its text, what it copies, the package made of that."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from lemica_trt.triton.interface import OLDEST_SERVER_NAME

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
LINES = [
    line.split(None, 1)
    for line in re.sub(r"\\\n\s*", "", TEXT).splitlines()
    if line.strip() and not line.startswith("#")
]
ARGUMENTS = dict(shlex.split(rest)[0].split("=", 1) for word, rest in LINES if word == "ARG")
COPIES = [shlex.split(rest) for word, rest in LINES if word == "COPY"]
RUNS = [rest for word, rest in LINES if word == "RUN"]
PINNED = r"pip install --no-cache-dir --require-hashes (--target /build )?-r (/pins/\S+)"
PACKAGE = "PYTHONPATH=/build pip install --no-cache-dir --no-deps --no-build-isolation /src && rm -r /src /build /pins"


def test_its_instructions_are_known_and_in_order() -> None:
    words = [word for word, _ in LINES]
    assert set(words) <= {"ARG", "FROM", "COPY", "RUN", "USER", "ENV", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"}
    assert words.count("FROM") == words.count("USER") == words.count("ENTRYPOINT") == 1
    assert words.index("USER") > max(i for i, word in enumerate(words) if word == "RUN")  # root only installs
    used = set(re.findall(r"\$\{(\w+)\}", "\n".join(rest for _, rest in LINES)))
    assert used == set(ARGUMENTS)  # each is used, each that is used is there


def test_it_is_the_oldest_triton_that_is_known_and_its_ports() -> None:
    assert f"container {ARGUMENTS['TRITON']}" in OLDEST_SERVER_NAME
    start = (ROOT / "lemica_trt" / "triton" / "start.sh").read_text(encoding="utf-8")
    (ports,) = (rest.split() for word, rest in LINES if word == "EXPOSE")
    assert ports == re.findall(r"_PORT:-(\d+)", start)
    assert "ADDRESS:-127.0.0.1" in start and ["ENV", "ADDRESS=0.0.0.0"] in LINES


def test_all_but_what_the_engines_decide_is_pinned_with_hashes() -> None:
    pinned = [re.fullmatch(PINNED, run) for run in RUNS[:2]]
    assert all(pinned) and len(RUNS) == 5
    copied = {f"{target}{Path(source).name}" for *found, target in COPIES for source in found}
    assert {found[2] for found in pinned if found} <= copied  # before they are asked for
    assert LINES.index(["COPY", " ".join(COPIES[0])]) < LINES.index(["RUN", RUNS[0]])
    constrained = "--constraint /pins/constraints.txt"
    assert RUNS[3] == f'test -z "${{PACKAGES}}" || pip install --no-cache-dir {constrained} ${{PACKAGES}}'
    assert RUNS[4] == PACKAGE
    _, _, extras = (ROOT / "pyproject.toml").read_text(encoding="utf-8").partition("[project.optional-dependencies]")
    tensorrt = re.search(r"^tensorrt = \[(.*)\]$", extras, re.MULTILINE)
    assert tensorrt and ARGUMENTS["PACKAGES"].split() == re.findall('"([^"]+)"', tensorrt[1])


def test_the_pins_constrain_what_else_is_installed(tmp_path: Path) -> None:
    """The RUN line that makes constraints of them: the same versions, without hashes, which would be asked of all."""
    (tmp_path / "requirements.txt").write_bytes((ROOT / "lemica_trt/triton/requirements.txt").read_bytes())
    subprocess.run(["sh", "-c", RUNS[2].replace("/pins", str(tmp_path))], check=True)
    made = (tmp_path / "constraints.txt").read_text().splitlines()
    pins = re.findall(r"^([a-z0-9].*?) *\\$", (tmp_path / "requirements.txt").read_text(), re.MULTILINE)
    assert made == pins and len(made) > 20 and all(re.match(r"[a-z0-9-]+==[\w.]+( ;|$)", line) for line in made)


def test_what_it_copies_is_there_and_is_let_in() -> None:
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    sources = {source for *found, _ in COPIES for source in found}
    assert {source for source in sources if not any(source.startswith(f"{other}/") for other in sources)} == let_in
    for source in sources:
        assert (ROOT / source).exists(), source


@pytest.mark.skipif(find_spec("hatchling") is None, reason="pip install hatchling")
def test_the_package_can_be_made_of_what_it_copies(tmp_path: Path) -> None:
    """The last RUN line, without what the second one has fetched for it."""
    for *sources, target in COPIES:
        for source in sources:
            if not target.startswith("/src"):
                continue
            there = tmp_path / target.strip("/")
            if (ROOT / source).is_dir():
                shutil.copytree(ROOT / source, there, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                there.mkdir(exist_ok=True)
                shutil.copy(ROOT / source, there)
    flags = re.findall(r" (--no-deps|--no-build-isolation)", RUNS[-1])
    assert len(flags) == 2
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", *flags]
    site = tmp_path / "site"
    done = subprocess.run(
        [*command, "--target", str(site), str(tmp_path / "src")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    made = {path.relative_to(site).as_posix() for path in (site / "lemica_trt").rglob("*.py")}
    assert made == {path.relative_to(ROOT).as_posix() for path in (ROOT / "lemica_trt").rglob("*.py")}
    assert (site / "lemica_trt" / "triton" / "start.sh").is_file()
