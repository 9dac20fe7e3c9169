"""The lint finds what it is for: every way to break a repository, and nothing in one that is whole."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from test_repository import make_bundle

from lemica_trt.core.errors import UsageError, VerificationError
from lemica_trt.triton.check import check_repository, require_sound
from lemica_trt.triton.repository import write_repository

pytestmark = pytest.mark.cpu

pytest.importorskip("tritonclient.grpc", reason="the lint needs tritonclient's protobuf")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write_repository(make_bundle(tmp_path / "bundle"), tmp_path / "repository")
    return tmp_path / "repository"


def test_a_whole_repository(repository: Path) -> None:
    assert check_repository(repository) == ()


BROKEN = [
    ("denoiser", "max_batch_size: 3", "", "max_batch_size: expected to be written"),
    ("denoiser", "max_batch_size: 3", "max_batch_size: 4", "max_batch_size: expected 1 … 3, got 4"),
    ("denoiser", 'name: "denoiser"', 'name: "denoser"', "name: expected 'denoiser'"),
    ("denoiser", 'backend: "python"', 'backend: "pyhton"', "backend: expected 'python'"),
    ("denoiser", "dynamic_batching {", "dynamic_batchin {", 'no field named "dynamic_batchin"'),
    ("denoiser_stream", "decoupled: true", "decoupled: false", "expected decoupled True, got False"),
    (
        "pipeline",
        "version_policy",
        "response_cache { enable: true }\nversion_policy",
        "parameters are not part of its key",
    ),
    ("vae_decoder", "dims: [ 2, 3, 4, 4 ] }\n", "dims: [ 2, 3, 4, 5 ] }\n", "expected FP32 [2, 3, 4, 4], got FP32"),
    ("text_encoder", "TYPE_FP32", "TYPE_FP16", "expected FP32 [5, 12], got FP16 [5, 12]"),
    ("denoiser", '"../denoiser/bundle"', '"../bundle"', "parameter bundle: expected ../denoiser/bundle"),
    (
        "denoiser",
        'key: "manifest" value { string_value: "',
        'key: "manifest" value { string_value: "0',
        "expected the digest",
    ),
    ("denoiser", '"onnxruntime"', '"tensorrt"', "the bundle has no engines for 'tensorrt'"),
    ("denoiser", '"exact"', '"fast"', "batching: expected exact or off, got 'fast'"),
    ("denoiser", 'key: "threads"', 'key: "thread"', "missing: threads"),
]


@pytest.mark.parametrize(("model", "old", "new", "message"), BROKEN, ids=[message for *_, message in BROKEN])
def test_broken_configs(repository: Path, model: str, old: str, new: str, message: str) -> None:
    path = repository / model / "config.pbtxt"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    issues = check_repository(repository)
    assert {issue.path for issue in issues} == {f"{model}/config.pbtxt"}
    assert any(message in issue.message for issue in issues), issues
    assert all("\n" not in issue.message for issue in issues)
    with pytest.raises(VerificationError, match=f"{model}/config.pbtxt"):
        require_sound(repository)


def test_broken_files(repository: Path, tmp_path: Path) -> None:
    cpu = repository / "denoiser/configs/cpu.pbtxt"
    cpu.write_text(cpu.read_text().replace("KIND_CPU", "KIND_GPU"))
    (repository / "pipeline/1/model.py").unlink()
    (repository / "vae_decoder/config.pbtxt").unlink()
    messages = {issue.path: issue.message for issue in check_repository(repository)}
    assert messages == {
        "denoiser/configs/cpu.pbtxt": "expected KIND_CPU, got KIND_GPU",
        "pipeline/1/model.py": "expected a model, it is missing",
        "vae_decoder/config.pbtxt": "expected a config, it is missing",
    }
    cpu.write_bytes(b"\xff")
    assert "utf-8" in next(found.message for found in check_repository(repository) if found.path.endswith("cpu.pbtxt"))
    plan = repository / "denoiser/bundle/plans/slow.json"
    plan.write_bytes(plan.read_bytes()[:-1])
    (issue,) = check_repository(repository)
    assert "plans/slow.json" in issue.message
    with pytest.raises(UsageError, match="expected a model repository"):
        check_repository(tmp_path)


def test_notes_fail_nothing(repository: Path) -> None:
    path = repository / "pipeline/1/model.py"
    path.write_text(path.read_text() + "# mine\n")
    (repository / "mine").mkdir()
    (repository / "mine/config.pbtxt").write_text('name: "mine"')
    assert [issue.path for issue in require_sound(repository)] == ["mine/config.pbtxt", "pipeline/1/model.py"]


START_SCRIPTS = [
    ("", ["no --http-restricted-api: whoever reaches the port", "no --grpc-restricted-protocol: "]),
    (
        "#!/bin/sh\ntritonserver --http-restricted-api=model-repository:a=b  # --grpc-restricted-protocol\n",
        ["no --grpc-"],
    ),
    ("exec tritonserver --http-restricted-api=x --grpc-restricted-protocol=x\n", ["not the file that lemica-trt"]),
    (
        "tritonserver --http-restricted-api=x --grpc-restricted-protocol=x \\\n --log-verbose=1",
        ["--log-verbose: requests, prompts too, may be logged", "not the file that lemica-trt"],
    ),
]


@pytest.mark.parametrize(("script", "messages"), START_SCRIPTS)
def test_a_server_that_anybody_may_load_code_into_is_noted(repository: Path, script: str, messages: list[str]) -> None:
    (repository / "start.sh").write_text(script)
    notes = require_sound(repository)
    assert {note.path for note in notes} == {"start.sh"}
    assert len(notes) == len(messages)
    assert all(message in note.message for note, message in zip(notes, messages)), notes
    (repository / "start.sh").unlink()
    assert len(require_sound(repository)) == 2


def test_on_the_command_line(repository: Path, tmp_path: Path) -> None:
    def triton(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lemica_trt", "triton", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])

    done = triton(tmp_path / "bundle", "--output", tmp_path / "second")
    assert done.returncode == 0, done.stderr
    assert "pipeline_stream" in done.stdout
    assert triton("--check", tmp_path / "second").returncode == 0
    (tmp_path / "second/pipeline/config.pbtxt").write_text("name: pipeline")
    done = triton("--check", tmp_path / "second")
    assert done.returncode == VerificationError.exit_code
    assert len(done.stderr.splitlines()) == 1
    for wrong in (["--check", repository, "--output", "x"], [tmp_path / "bundle"], []):
        assert triton(*wrong).returncode == UsageError.exit_code
