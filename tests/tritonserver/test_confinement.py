"""Processes of models cannot write into the repository: in processes that look like Triton's, without a server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_repository import make_bundle
from test_serving import load_args

from lemica_trt.core import landlock
from lemica_trt.triton.repository import write_repository
from lemica_trt.triton.server import confinement

pytestmark = pytest.mark.null

needs_landlock = pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")

ATTEMPTS = """
import errno, os, subprocess, sys, threading
from pathlib import Path
from lemica_trt.core import landlock

def attempts(bundle, outside):
    manifest, plan = bundle / "manifest.json", next((bundle / "plans").iterdir())
    found = {
        "write": lambda: manifest.open("r+b").close(),
        "append": lambda: plan.open("ab").close(),
        "truncate": lambda: os.truncate(plan, 1),
        "truncate and read": lambda: os.close(os.open(manifest, os.O_RDONLY | os.O_TRUNC)),
        "make": lambda: (bundle / "new").write_bytes(b"x"),
        "make a folder": lambda: (bundle / "folder").mkdir(),
        "make a link": lambda: (bundle / "link").symlink_to("/etc"),
        "remove": lambda: plan.unlink(),
        "rename": lambda: manifest.rename(bundle / "other"),
        "move out": lambda: manifest.rename(outside / "moved"),
        "link out": lambda: os.link(plan, outside / "linked"),
        "move in": lambda: (outside / "mine").rename(bundle / "mine"),
        "through /proc": lambda: Path(f"/proc/self/root{manifest}").open("r+b").close(),
        "the model": lambda: (bundle.parent / "1" / "model.py").open("r+b").close(),
        "the script": lambda: (bundle.parents[1] / "start.sh").unlink(),
        "a thread": lambda: in_thread(lambda: manifest.open("r+b").close()),
        "a child": lambda: in_child(bundle),
    }
    known = landlock.version() >= landlock.TRUNCATE_VERSION
    return {name: call for name, call in found.items() if known or not name.startswith("truncate")}

def in_thread(call):
    raised = []
    def run():
        try:
            call()
        except OSError as error:
            raised.append(error)
    thread = threading.Thread(target=run)
    thread.start(); thread.join()
    if raised:
        raise raised[0]

def in_child(bundle):
    done = subprocess.run([sys.executable, "-c", "import sys; open(sys.argv[1], 'ab')", str(bundle / "manifest.json")],
                          stderr=subprocess.PIPE)
    if b"PermissionError" in done.stderr:
        raise PermissionError(errno.EACCES, "in the child")

def done(bundle, outside):
    (outside / "mine").write_bytes(b"mine")
    for name, call in attempts(bundle, outside).items():
        try:
            call()
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EPERM, errno.EXDEV):
                continue
        yield name
"""

RESTRICTED = (
    ATTEMPTS
    + """
bundle, outside = map(Path, sys.argv[1:])
landlock.restrict_writes(landlock.places([outside.parent, Path("/dev/null")], (bundle.parents[1], bundle)))
print(list(done(bundle, outside)))
(outside / "fresh").write_bytes(b"x"); (outside / "fresh").unlink(); (outside / "d").mkdir()
open("/dev/null", "wb").write(b"x")
(bundle / "manifest.json").read_bytes(); list(bundle.iterdir())
"""
)

MODEL = (
    ATTEMPTS
    + """
import json, tempfile
tempfile.tempdir = os.environ["AT"]
sys.path[:0] = os.environ["TESTS"].split(os.pathsep)
from test_serving import pb_utils
from types import SimpleNamespace
from lemica_trt.triton.server import cancel, load, temporary
if "IN_SERVER" in os.environ:  # what the program of the Python backend has
    sys.modules["c_python_backend_utils"] = sys
if "VERSION" in os.environ:
    landlock.version = lambda: int(os.environ["VERSION"])
told = []
server = pb_utils(Logger=SimpleNamespace(log_warn=told.append))
args = json.loads(os.environ["ARGS"])
bundle, _ = load.open_bundle(server, args)
print(json.dumps([told, list(done(bundle.path, Path(os.environ["OUTSIDE"])))]))
"""
)

MODEL_AT_WORK = (
    MODEL
    + """
with cancel.cancel_token() as token:
    assert token.parent.parent == Path(os.environ["AT"])
with tempfile.NamedTemporaryFile() as file:  # what is made for a clip
    assert Path(file.name).parent.parent == token.parent
temporary.remove_leftovers()
assert Path(tempfile.gettempdir()).is_dir()
temporary.remove_leftovers(own=True)
assert not list(token.parent.iterdir())
"""
)


def run(script: str, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Beside a folder that may be written, both below one that may be."""
    write_repository(make_bundle(tmp_path / "made" / "bundle"), tmp_path / "models" / "repository")
    (tmp_path / "outside").mkdir()
    return tmp_path / "models" / "repository"


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@needs_landlock
def test_nothing_in_the_repository_can_be_changed(repository: Path, tmp_path: Path) -> None:
    before = content(repository)
    done = run(RESTRICTED, repository / "denoiser/bundle", tmp_path / "outside")
    assert done.stdout == "[]\n"  # nothing of it was done
    assert content(repository) == before


def test_without_it_everything_can(repository: Path, tmp_path: Path) -> None:
    """What the other tests attempt does succeed where nothing forbids it."""
    bundle, outside = repository / "denoiser/bundle", tmp_path / "outside"
    script = ATTEMPTS + "print(len(list(done(*map(Path, sys.argv[1:])))), len(attempts(*map(Path, sys.argv[1:]))))"
    changed, known = run(script, bundle, outside).stdout.split()
    assert int(changed) >= int(known) - 3  # some find what they want to change gone


def loaded(script: str, repository: Path, tmp_path: Path, **environment: str) -> tuple[list[str], list[str]]:
    """What a model has logged that was loaded with the arguments of Triton's, and what it could do then. Temporary
    files lie beside the repository."""
    done = run(
        script,
        ARGS=json.dumps(load_args(repository)), AT=str(tmp_path), OUTSIDE=str(tmp_path / "outside"),
        TESTS=os.pathsep.join(sys.path), **environment,
    )  # fmt: skip
    told, changed = json.loads(done.stdout)
    return told, changed


@needs_landlock
def test_a_model_gives_the_right_up_when_it_loads(repository: Path, tmp_path: Path) -> None:
    before = content(repository)
    told, changed = loaded(MODEL_AT_WORK, repository, tmp_path, IN_SERVER="1")
    assert not changed and all("truncating" in line for line in told)
    assert bool(told) == (landlock.version() < landlock.TRUNCATE_VERSION)
    assert content(repository) == before


def test_a_kernel_without_it_is_told_of(repository: Path, tmp_path: Path) -> None:
    told, changed = loaded(MODEL, repository, tmp_path, IN_SERVER="1", VERSION="0")
    assert changed and told == [
        "denoiser: this kernel keeps no process from writing into the repository (no Landlock here, or it is turned "
        "off): mount it read-only"
    ]


@pytest.mark.skipif(landlock.version() < 2, reason="this kernel has no such Landlock")
def test_a_kernel_that_cannot_refuse_truncating_is_told_of(repository: Path, tmp_path: Path) -> None:
    told, changed = loaded(MODEL, repository, tmp_path, IN_SERVER="1", VERSION="2")
    assert not changed
    assert told == [
        "denoiser: this kernel cannot refuse truncating the repository's files: mount it read-only"
    ]  # fmt: skip


def test_a_process_that_stays_free_is_told_of(repository: Path, tmp_path: Path) -> None:
    """Nothing of Triton's has started it: it is somebody's own, which goes on with something else."""
    told, changed = loaded(MODEL, repository, tmp_path)
    assert changed and told == [
        "denoiser: no server's Python backend has started this process: it may still write into the repository"
    ]


@needs_landlock
def test_places_that_cannot_be_allowed_change_nothing_else(repository: Path, tmp_path: Path) -> None:
    bad = {"/etc/passwd/x": "not there", "/" + "x" * 300: "not there", str(tmp_path / "missing"): "not there",
           str(repository / "denoiser"): "in the repository"}  # fmt: skip
    (tmp_path / "link").symlink_to(tmp_path / "outside")
    listed = os.pathsep.join(["", str(tmp_path / "outside"), *bad, str(tmp_path / "link")])
    told, changed = loaded(MODEL, repository, tmp_path, IN_SERVER="1", LEMICA_WRITABLE=listed)
    assert not changed
    lines = [f"denoiser: LEMICA_WRITABLE: {path}: {why}, not allowed" for path, why in bad.items()]
    assert [line for line in told if "truncating" not in line] == lines


def test_a_gpu_needs_more_places(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches, and the pipes of CUDA MPS, wherever they are; nothing is restricted here."""
    allowed = set[Path]()
    monkeypatch.setattr(landlock, "version", lambda: 7)
    monkeypatch.setattr(landlock, "restrict_writes", lambda paths: (allowed.clear(), allowed.update(paths)))
    monkeypatch.setattr(confinement.tempfile, "tempdir", str(tmp_path / "outside"))
    places = {
        "XDG_CACHE_HOME": tmp_path / "cache", "CUDA_CACHE_PATH": tmp_path / "nv",
        "CUDA_MPS_PIPE_DIRECTORY": Path("/srv/pipes"), "CUDA_MPS_LOG_DIRECTORY": Path("/srv/logs"),
    }  # fmt: skip
    for name, path in places.items():
        monkeypatch.setenv(name, str(path))
    needed = {tmp_path / "cache/lemica-trt", tmp_path / "nv", Path("/srv/pipes"), Path("/srv/logs")}
    for gpu in (False, True):
        assert confinement.confine(repository, repository / "denoiser/bundle", gpu=gpu) == []
        assert tmp_path / "outside" in allowed
        assert needed & allowed == (needed if gpu else set())
    for name in ("CUDA_MPS_PIPE_DIRECTORY", "CUDA_MPS_LOG_DIRECTORY"):
        monkeypatch.delenv(name)
    assert Path("/tmp/nvidia-mps") in confinement._multi_process_service()


def test_places_leave_out_what_is_closed(tmp_path: Path) -> None:
    for name in ("a/b/closed/inside", "a/b/beside", "a/other", "c"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "a/file").touch()
    (tmp_path / "a/link").symlink_to("b/closed")
    closed = (tmp_path / "a/b/closed",)

    def found(root: str) -> set[str]:
        return {path.relative_to(tmp_path).as_posix() for path in landlock.places([tmp_path / root], closed)}

    assert found("") == {"a/b/beside", "a/other", "a/file", "c"}
    assert found("c") == {"c"} and found("a/b/beside") == {"a/b/beside"}
    assert found("a/b/closed") == found("a/b/closed/inside") == found("a/link") == set()
    assert found("missing") == {"missing"}
