"""What is built to be installed: the sdist, the wheel out of it, and the command line with only what it declares."""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import lemica_trt

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def dist(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist, and the wheel that is built from it; without a network."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def required(name: str) -> Iterator[str]:
    """The distributions that one requires without extras, by name, those of theirs among them."""
    from packaging.requirements import Requirement

    seen, left = set(), [name]
    while left:
        each = left.pop()
        for text in importlib.metadata.requires(each) or ():
            requirement = Requirement(text)
            wanted = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if wanted and requirement.name.lower() not in seen:
                seen.add(requirement.name.lower())
                left.append(requirement.name)
    yield from sorted(seen)


@pytest.fixture(scope="session")
def dependencies(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what lemica-trt declares, and nothing else: links to the packages that are installed here."""
    folder = tmp_path_factory.mktemp("dependencies")
    for name in required("lemica-trt"):
        for file in importlib.metadata.files(name) or ():
            top = file.parts[0]
            if top not in ("..", "__pycache__") and not (folder / top).exists():
                (folder / top).symlink_to(Path(str(file.locate())).parents[len(file.parts) - 1] / top)
    assert (folder / "click").exists() and not (folder / "torch").exists() and not (folder / "onnxruntime").exists()
    return folder


@pytest.fixture(scope="session")
def installed(dist: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, installed into a folder of its own."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder)]
    subprocess.run([*command, str(dist[1])], check=True)
    return folder


def run(paths: list[Path], *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """The command line where Python finds these folders, the standard library, and nothing else."""
    script = (
        "import sys; sys.path[:0] = sys.argv.pop(1).split('\\n'); import lemica_trt\n"
        "assert lemica_trt.__file__.startswith(sys.path[0]), lemica_trt.__file__\n"
        "from lemica_trt.cli.main import main; main()"
    )
    command = [sys.executable, "-I", "-S", "-c", script, "\n".join(map(str, paths)), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


def test_the_sdist_has_what_the_wheel_is_made_of(dist: tuple[Path, Path]) -> None:
    with tarfile.open(dist[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "LICENSE", "README.md", "CHANGELOG.md", "lemica_trt/py.typed"} <= names
    assert not [name for name in names if name.startswith((".venv", ".cache", "out/", "dist"))]


def test_the_wheel_has_the_package_its_data_and_nothing_else(dist: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(dist[1]) as archive:
        names = set(archive.namelist())
        about = archive.read(f"lemica_trt-{lemica_trt.__version__}.dist-info/METADATA").decode()
    assert {name.partition("/")[0] for name in names} == {
        "lemica_trt",
        f"lemica_trt-{lemica_trt.__version__}.dist-info",
    }
    there = {path.relative_to(ROOT).as_posix() for path in (ROOT / "lemica_trt").rglob("*.py")}
    assert there <= names and not [name for name in names if "__pycache__" in name]
    assert {"lemica_trt/py.typed", "lemica_trt/triton/start.sh", "lemica_trt/data/engines/cogvideox-tiny.toml"} <= names
    for model in ("cogvideox-tiny", "flux-tiny", "wan-tiny"):
        assert f"lemica_trt/zoo/{model}/transformer/diffusion_pytorch_model.safetensors" in names
    assert "lemica_trt/data/calibration/flux-tiny/held_out.txt" in names
    assert {"build", "hub", "serve", "video"} <= set(re.findall(r"^Provides-Extra: (\S+)", about, re.MULTILINE))


def test_the_command_line_needs_what_is_declared_and_no_more(
    installed: Path, dependencies: Path, built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    paths = [installed, dependencies]
    for arguments, said in (
        (["--version"], lemica_trt.__version__),
        (["methods"], "fitted"),
        (["doctor"], "lemica-trt"),
        (["models"], "wan-tiny"),
        (["inspect", built[0]], "b4"),
        (["plan", "--help"], "--budget"),
    ):
        done = run(paths, *arguments, cwd=tmp_path)
        assert done.returncode == 0 and said in done.stdout, f"{arguments}: {done.stdout}{done.stderr}"
    done = run(paths, "push", built[0], "file:kept", "--json", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["result"]["kind"] == "bundle", done.stderr
    for arguments in (["build", "--model", "wan-tiny"], ["run", built[0], "x", "-o", "x.gif"], ["serve", built[0]]):
        done = run(paths, *arguments, cwd=tmp_path)
        assert done.returncode == 7 and done.stderr.count("→ pip install 'lemica-trt[") == 1, done.stderr


def test_a_checkout_that_is_not_installed_says_how_it_is(dependencies: Path, tmp_path: Path) -> None:
    """In an installed one, and from a wheel, the package's name is enough: pip needs no index for it."""
    done = run([ROOT, dependencies], "build", "--model", "wan-tiny", cwd=tmp_path)
    assert done.returncode == 7, done.stderr
    assert done.stderr.endswith(f"→ pip install --editable '{ROOT}[onnxruntime]'\n")


def test_pip_needs_no_index_for_an_extra_of_an_installed_package() -> None:
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--quiet", "lemica-trt[video]"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
