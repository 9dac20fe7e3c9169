"""What is written: folders, configs, one copy of the weights; and writing over what is there."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

import toy

from lemica_trt import __version__
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.writing import add_plan, write_bundle
from lemica_trt.core.atomic_folder import held
from lemica_trt.core.errors import IntegrityError, UsageError
from lemica_trt.ir.engine import EngineEntry, EngineKey
from lemica_trt.ir.graphs import EncoderSpec, Role
from lemica_trt.ir.profile import Profile, Shape
from lemica_trt.triton.interface import MODELS, interfaces
from lemica_trt.triton.repository import BUNDLE, Settings, model_file, write_repository

pytestmark = pytest.mark.null


def make_bundle(folder: Path, *targets: tuple[str, str], guided: bool = True, parts: bool = True) -> Bundle:
    """A bundle of files that say nothing, with engines for (backend, target)."""
    graphs = toy.graphs_of(toy.layout_of(guided=guided), data_file=True)
    roles: tuple[Role, ...] = ("combine", "full", "skip", *(("text_encoder", "vae_decoder") if parts else ()))
    graphs = type(graphs)(
        dtype=graphs.dtype,
        layout=graphs.layout,
        max_batch=graphs.max_batch,
        graphs=tuple(graph for graph in graphs.graphs if graph.role in roles),
    )
    files = {name: name.encode() * 1000 for graph in graphs.graphs for name in (graph.file, *graph.data_files)}
    entries = [
        EngineEntry(
            key=EngineKey(backend=backend, version="1.2", target=target, dtype="fp32", graphs_digest="0" * 64),
            files={graph.role: graph.file for graph in graphs.graphs},
        )
        for backend, target in targets or (("onnxruntime", "cpu"),)
    ]
    return write_bundle(
        folder,
        profile=Profile(
            name="toy", family="toy", source="package:toy", dtype="fp32", text_length=5,
            shape=Shape(frames=2, height=4, width=4, max_batch=3),
        ),
        graphs=graphs,
        plans=[toy.euler_plan("fsrfsr"), toy.euler_plan("ffffff", name="slow")],
        default_plan="default",
        encoders=[EncoderSpec(tokenizer="tokenizer.json", length=5, pad_id=0)],
        engines=entries,
        files={**files, "tokenizer.json": b"{}"},
    )  # fmt: skip


def test_a_repository(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    models = write_repository(bundle, tmp_path / "repository")
    assert models == tuple(name for name in MODELS if name != "image_encoder")
    folder = tmp_path / "repository"
    for model in models:
        assert (folder / model / "1" / "model.py").read_bytes() == model_file(model)
        config = (folder / model / "config.pbtxt").read_text()
        assert config == (folder / model / "configs" / "cpu.pbtxt").read_text()
        assert f'name: "{model}"' in config
        assert re.search(r"^max_batch_size: \d", config, re.MULTILINE)
        assert str(tmp_path) not in config
        for explained in re.finditer(r"^parameters", config, re.MULTILINE):
            assert config[: explained.start()].splitlines()[-1].startswith("# ")
    copy = Bundle.open(folder / BUNDLE)
    copy.check()
    assert copy.manifest == bundle.manifest
    weights = bundle.path / "onnx/full.data"
    assert (folder / BUNDLE / "onnx/full.data").samefile(weights), "linked, not copied"
    assert not (folder / BUNDLE / "plans/slow.json").samefile(bundle.path / "plans/slow.json"), "may be edited"
    assert len(list(folder.rglob("full.data"))) == 1
    readme = (folder / "README.md").read_text()
    assert f"lemica-trt=={__version__}" in readme
    assert "| `default` (default) | 2 of 6 |" in readme


def test_the_same_bundle_gives_the_same_bytes(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    found = []
    for name in ("a", "b", "a"):
        write_repository(bundle, tmp_path / name)
        files = sorted(path for path in (tmp_path / name).rglob("*") if path.is_file())
        found.append({path.relative_to(tmp_path / name): path.read_bytes() for path in files})
    assert found[0] == found[1] == found[2]


def test_gpu_and_cpu_configs(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "both", ("tensorrt", "sm_90"), ("onnxruntime", "cpu"))
    write_repository(bundle, tmp_path / "repository", Settings(instances=2, threads=3, batching="off"))
    config = (tmp_path / "repository/denoiser/config.pbtxt").read_text()
    assert "count: 2 kind: KIND_GPU" in config
    assert '"backend" value { string_value: "tensorrt" }' in config
    assert '"batching" value { string_value: "off" }' in config
    assert "KIND_CPU" in (tmp_path / "repository/pipeline/config.pbtxt").read_text()
    cpu = (tmp_path / "repository/denoiser/configs/cpu.pbtxt").read_text()
    assert "KIND_CPU" in cpu
    assert '"backend" value { string_value: "onnxruntime" }' in cpu
    bundle = make_bundle(tmp_path / "gpu", ("tensorrt", "sm_90"))
    write_repository(bundle, tmp_path / "repository")
    assert not (tmp_path / "repository/denoiser/configs/cpu.pbtxt").exists()
    assert "need a GPU" in (tmp_path / "repository/README.md").read_text()


def test_interfaces_follow_the_bundle(tmp_path: Path) -> None:
    found = interfaces(make_bundle(tmp_path / "guided").manifest)
    assert [port.name for port in found["denoiser"].inputs] == ["prompt_embeds", "negative_prompt_embeds"]
    assert found["vae_decoder"].inputs == found["denoiser"].outputs
    assert found["text_encoder"].outputs == found["denoiser"].inputs[:1]
    found = interfaces(make_bundle(tmp_path / "unguided", guided=False, parts=False).manifest)
    assert list(found) == ["denoiser", "denoiser_stream"]
    assert [port.name for port in found["denoiser"].inputs] == ["prompt_embeds"]


def test_what_is_not_written(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(UsageError, match="expected a model repository of lemica-trt, an empty folder or nothing"):
        write_repository(bundle, tmp_path / "other")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["thesis.txt"]
    for bad in ({"instances": 0}, {"queue": 0}, {"timeout": 0}, {"threads": -1}, {"batching": "fast"}):
        with pytest.raises(UsageError, match=f"{next(iter(bad))} must be"):
            Settings(**bad)  # type: ignore[arg-type]
    (bundle.path / "onnx/skip.onnx").write_bytes(b"altered")
    with pytest.raises(IntegrityError, match=r"onnx/skip\.onnx"):
        write_repository(bundle, tmp_path / "repository")


FAKE_SERVER = """#!/bin/sh
printf '%s\\n' "$@" >"$ARGUMENTS"
test -z "${ADMIN_TOKEN+set}"
"""


def started(repository: Path, tmp_path: Path, *flags: str, **environment: str) -> list[str]:
    """The flags that tritonserver would be started with."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    server = tmp_path / "bin" / "tritonserver"
    server.write_text(FAKE_SERVER)
    server.chmod(0o755)
    given = {"PATH": f"{server.parent}:{os.environ['PATH']}", "ARGUMENTS": str(tmp_path / "flags"), **environment}
    subprocess.run([str(repository / "start.sh"), *flags], env=given, check=True, cwd="/")
    return (tmp_path / "flags").read_text().splitlines()


@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_the_start_script_lets_nobody_in(tmp_path: Path) -> None:
    repository = tmp_path / "a repository"
    write_repository(make_bundle(tmp_path / "bundle"), repository)
    flags = started(repository, tmp_path, "--model-config-name=cpu")
    assert f"--model-repository={repository}" in flags
    assert {"--http-address=127.0.0.1", "--grpc-address=127.0.0.1", "--metrics-address=127.0.0.1"} < set(flags)
    assert {"--load-model=*", "--model-config-name=cpu", "--log-verbose=0"} < set(flags)
    tokens = []
    for given in (flags, started(repository, tmp_path)):
        closed = [flag.partition("=")[2] for flag in given if "-restricted-" in flag]
        apis, _, token = closed[0].partition(":admin-token=")
        assert closed == [f"{apis}:admin-token={token}"] * 2
        assert {"model-repository", "trace", "logging", "shared-memory"} == set(apis.split(","))
        assert re.fullmatch("[0-9a-f]{64}", token)
        tokens.append(token)
    assert tokens[0] != tokens[1]
    flags = started(repository, tmp_path, ADMIN_TOKEN="mine", ADDRESS="0.0.0.0", MODELS="pipeline vae_decoder")
    assert any(flag.endswith(":admin-token=mine") for flag in flags)
    assert {"--load-model=pipeline", "--load-model=vae_decoder", "--http-address=0.0.0.0"} < set(flags)
    for bad in ("a:b", "a=b", "a b", "a,b"):
        with pytest.raises(subprocess.CalledProcessError):
            started(repository, tmp_path, ADMIN_TOKEN=bad)


def test_written_again_from_its_own_bundle_with_more_plans(tmp_path: Path) -> None:
    write_repository(make_bundle(tmp_path / "bundle"), tmp_path / "repository")
    config = (tmp_path / "repository/denoiser/config.pbtxt").read_text()
    more = add_plan(Bundle.open(tmp_path / "repository" / BUNDLE), toy.euler_plan("fsffff", name="five"))
    write_repository(more, tmp_path / "repository")
    again = Bundle.open(tmp_path / "repository" / BUNDLE)
    again.check()
    assert again.plans == ("default", "five", "slow")
    changed = (tmp_path / "repository/denoiser/config.pbtxt").read_text()
    assert changed == config.replace(re.findall(r"[0-9a-f]{64}", config)[0], again.digest)


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    write_repository(bundle, tmp_path / "repository")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    left = tmp_path / "repository/denoiser" / f".config.pbtxt.tmp-{dead.pid}-00000000"
    living = left.with_name(f".config.pbtxt.tmp-{os.getppid()}-00000000")
    left.touch()
    living.touch()
    write_repository(bundle, tmp_path / "repository")
    assert not left.exists()
    assert living.exists()


@pytest.mark.parametrize("is_new", [True, False])
def test_a_full_disk_leaves_nothing_half(is_new: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every file that is synced: a new repository is not there, an older one is as it was."""
    bundle, target = make_bundle(tmp_path / "bundle"), tmp_path / "new/repository"
    if not is_new:
        write_repository(bundle, target)
        bundle = add_plan(bundle, toy.euler_plan("fsffff", name="five"))
    before = _tree(tmp_path / "new")
    real, left = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal left
        left -= stat.S_ISREG(os.fstat(handle).st_mode)  # a folder's names are there by then
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    for room in range(200):
        left = room
        with monkeypatch.context() as patched:
            patched.setattr(os, "fsync", full)
            try:
                write_repository(bundle, target)
                break
            except OSError as error:
                assert error.errno == errno.ENOSPC
        assert _tree(tmp_path / "new") == before
    assert 10 < room < 199
    Bundle.open(target / BUNDLE).check()
    assert (target / "README.md").is_file() and os.access(target / "start.sh", os.X_OK)


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_two_writers_of_one_repository(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    with held(tmp_path / "repository"), pytest.raises(UsageError, match=r"another lemica-trt .* is writing it"):
        write_repository(bundle, tmp_path / "repository")
    write_repository(bundle, tmp_path / "repository")
