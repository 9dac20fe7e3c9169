"""What the emitted models share, without a server: what is refused at load, what a request may ask for, batches."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "runtime"))

import toy
from test_repository import make_bundle

from lemica_trt.core.errors import EngineError, InputError, IntegrityError, LemicaError, UnsupportedError, UsageError
from lemica_trt.runtime import validation
from lemica_trt.runtime.conditions import EncodedText
from lemica_trt.runtime.denoise import Denoiser
from lemica_trt.runtime.random import Generator
from lemica_trt.triton.client import _address, _error
from lemica_trt.triton.interface import Port
from lemica_trt.triton.repository import write_repository
from lemica_trt.triton.server import batching, cancel, errors, load, temporary

pytestmark = pytest.mark.null


class Tensor:
    """`pb_utils.Tensor` as the server of 24.10 behaves; with `zeros` as it does under numpy 2."""

    zeros = False

    def __init__(self, name: str, array: Any) -> None:
        self.array = array

    def to_dlpack(self) -> Any:
        return self.array * 0 if self.zeros else self.array

    @classmethod
    def from_dlpack(cls, name: str, array: Any) -> Tensor:
        return cls(name, array)

    def as_numpy(self) -> Any:
        return self.array


class Zeros(Tensor):
    zeros = True


def pb_utils(tensor: type[Tensor] = Tensor, **missing: Any) -> Any:
    request = SimpleNamespace(is_cancelled=None, timeout=None, get_response_sender=None)
    metrics = SimpleNamespace(HISTOGRAM=2)
    logger = SimpleNamespace(log_warn=lambda text: None)
    parts = {
        "Logger": logger,
        "InferenceRequest": request,
        "TritonError": SimpleNamespace(CANCELLED=6),
        "MetricFamily": metrics,
    }
    return SimpleNamespace(**{**parts, "Tensor": tensor, **missing})


def test_servers_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_SERVER_VERSION", raising=False)
    load.check_server(pb_utils())
    with pytest.raises(UnsupportedError, match=r"cannot read arrays of numpy .* → pip install 'numpy<2'"):
        load.check_server(pb_utils(Zeros))
    with pytest.raises(UnsupportedError, match="python backend with HISTOGRAM"):
        load.check_server(pb_utils(MetricFamily=SimpleNamespace()))
    monkeypatch.setenv("TRITON_SERVER_VERSION", "2.50.0")
    with pytest.raises(UnsupportedError, match=r"expected tritonserver 2\.51 or newer, got 2\.50\.0"):
        load.check_server(pb_utils())
    monkeypatch.setenv("TRITON_SERVER_VERSION", "3.0.0")
    load.check_server(pb_utils())


def load_args(repository: Path, **parameters: str) -> dict[str, str]:
    """`args` of initialize for the denoiser of a repository."""
    text = (repository / "denoiser/config.pbtxt").read_text()
    lines = [line.split('"') for line in text.splitlines() if line.startswith("parameters")]
    found = {**{words[1]: words[3] for words in lines}, **parameters}
    config = {"parameters": {name: {"string_value": value} for name, value in found.items()}}
    return {
        "model_name": "denoiser",
        "model_config": json.dumps(config),
        "model_repository": str(repository / "denoiser"),
        "model_instance_kind": "CPU",
    }


def test_bundles_that_are_refused(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "bundle")
    repository = tmp_path / "repository"
    write_repository(bundle, repository)
    found, _ = load.open_bundle(pb_utils(), load_args(repository))
    assert found.manifest == bundle.manifest
    with pytest.raises(UnsupportedError, match=r"written by lemica-trt 0\.0\.1"):
        load.open_bundle(pb_utils(), load_args(repository, lemica_trt="0.0.1"))
    with pytest.raises(UnsupportedError, match="expected the bundle that denoiser was written for, got another"):
        load.open_bundle(pb_utils(), load_args(repository, manifest="1" * 64))
    with pytest.raises(InputError, match="expected a bundle"):
        load.open_bundle(pb_utils(), load_args(repository, bundle="../nowhere"))
    plan = repository / "denoiser/bundle/plans/slow.json"
    plan.write_bytes(plan.read_bytes() + b" ")
    with pytest.raises(IntegrityError, match=r"plans/slow\.json"):
        load.open_bundle(pb_utils(), load_args(repository))


@pytest.mark.parametrize(("kind", "expected"), [("GPU", 1), ("CPU", 0)])
def test_an_instance_has_its_own_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, expected: int
) -> None:
    """The one that KIND_GPU gave it, as the server counts them."""
    write_repository(make_bundle(tmp_path / "bundle", ("tensorrt-rtx", "sm_89")), tmp_path / "repository")
    assert "KIND_GPU" in (tmp_path / "repository/denoiser/config.pbtxt").read_text()
    seen = []
    monkeypatch.setattr(load, "Pipeline", lambda *_, device, **__: seen.append(device))
    args = {**load_args(tmp_path / "repository"), "model_instance_kind": kind, "model_instance_device_id": "1"}
    load.load_pipeline(pb_utils(), args)
    assert seen == [expected]


def test_engines_of_another_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_repository(make_bundle(tmp_path / "bundle", ("tensorrt", "sm_90")), tmp_path / "repository")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="9.9"))  # type: ignore[arg-type]
    with pytest.raises(
        UnsupportedError, match=r"built for tensorrt 1\.2, here is tensorrt 9\.9 → lemica-trt engine .*--backend"
    ):
        load.load_pipeline(pb_utils(), load_args(tmp_path / "repository"))
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # type: ignore[arg-type]
    with pytest.raises(LemicaError, match="engines for tensorrt need the package tensorrt, got"):
        load.load_pipeline(pb_utils(), load_args(tmp_path / "repository"))


def test_plans_and_steps() -> None:
    plans = {"fast": toy.euler_plan("fsss", name="fast"), "slow": toy.euler_plan("ffff", name="slow")}
    for asked, name in (
        ({}, "slow"),
        ({"plan": "default"}, "slow"),
        ({"plan": "fast"}, "fast"),
        ({"steps": 1}, "fast"),
        ({"quality": "fast"}, "fast"),
        ({"quality": "high"}, "fast"),
        ({"quality": "balanced"}, "slow"),
        ({"quality": "lossless", "plan": "fast"}, "fast"),
        ({"quality": "lossless"}, "slow"),
    ):
        assert validation.choose_plan(asked, plans, "slow") is plans[name]
    assert validation.choose_plan({"plan": "fast", "steps": 1}, plans, "slow") is plans["fast"]
    for bad in (
        {"plan": "no"},
        {"plan": 3},
        {"steps": 2},
        {"quality": "best"},
        {"quality": ["high"]},
        {"steps": True},
        {"steps": "1"},
        {"plan": "slow", "steps": 1},
    ):
        with pytest.raises(LemicaError, match="must be one of"):
            validation.choose_plan(bad, plans, "slow")


def test_guidance() -> None:
    plan = toy.euler_plan("fr", guidance_scale=4.0)
    assert validation.guidance_from({}, plan, guided=True) == 4.0
    assert validation.guidance_from({"guidance_scale": 3}, plan, guided=True) == 3.0
    for bad in (float("nan"), float("inf"), 100.5, True, "3", None):
        with pytest.raises(LemicaError, match="guidance_scale must be a number from 0 to 100"):
            validation.guidance_from({"guidance_scale": bad}, plan, guided=True)
    with pytest.raises(LemicaError, match="built without guidance"):
        validation.guidance_from({"guidance_scale": 3}, plan, guided=False)
    limited = msgspec.structs.replace(plan, guidance_range=(2.0, 7.0))
    assert validation.guidance_from({"guidance_scale": 7}, limited, guided=True) == 7.0
    with pytest.raises(LemicaError, match=r"plan default holds for guidance_scale 2 … 7, got 7\.5"):
        validation.guidance_from({"guidance_scale": 7.5}, limited, guided=True)


class Pipe:
    """A pipeline over the numpy DiT; with `drift`, results depend on how many share the batch."""

    def __init__(self, bundle: Any, drift: float) -> None:
        self.bundle, self.drift = bundle, drift
        self.sizes: list[int] = []
        backend = toy.NullBackend(bundle.manifest.graphs)
        self.denoiser = Denoiser(backend, bundle.manifest.graphs, backend.engines())

    def generator(self, seed: int) -> Generator:
        return Generator(seed)

    def latents(self, embeds: Any, noise: Any, *, guidance_scale: Any, plan: Any, seeds: Any, on_step: Any) -> Any:
        self.sizes.append(len(noise))
        found = self.denoiser.run(plan, embeds, noise, guidance_scale, on_step=on_step)
        return found if len(noise) < 3 else found + np.float32(self.drift)


def test_batches_only_where_they_change_no_bit(tmp_path: Path) -> None:
    """The numpy DiT's batches are exact by construction but for what `drift` adds to batches of three."""
    bundle = make_bundle(tmp_path / "bundle")
    for drift, size in ((0.0, 3), (1e-6, 2)):
        pipe = Pipe(bundle, drift)
        batches = batching.Batches(pipe, "exact")  # type: ignore[arg-type]
        if batches.size == 1:
            pytest.skip("this numpy's matmul gives other bits in a batch")
        assert batches.size == size
        batches.warm_up()
        jobs = [batches._probe(batches.plans[name], seed) for seed, name in enumerate(["slow", "default"] * 4)]
        groups = batches.groups(jobs)
        assert [len(group) for group in groups] == ([3, 3, 1, 1] if size == 3 else [2, 2, 2, 2])
        assert sorted(job.seed for group in groups for job in group) == list(range(8))
        assert all(len({job.plan.name for job in group}) == 1 for group in groups)
    pipe = Pipe(bundle, 0.0)
    assert batching.Batches(pipe, "off").size == 1  # type: ignore[arg-type]
    assert pipe.sizes == []
    with pytest.raises(UsageError, match="batching must be exact or off"):
        batching.Batches(pipe, "fast")  # type: ignore[arg-type]


def test_a_caller_that_goes_away_and_a_worker_that_dies() -> None:
    request = SimpleNamespace(is_cancelled=lambda: False, timeout=lambda: 0)
    with cancel.cancel_token() as file:
        cancellation = cancel.Cancellation(request, file.name)
        assert cancellation.called
        assert file.read_text() == str(os.getpid())
        assert cancellation.ended("now") is None
        cancel.require_wanted(request, file)
        worker = subprocess.Popen([sys.executable, "-c", "pass"])
        worker.wait()
        file.write_text(str(worker.pid))
        with pytest.raises(errors.RequestEnded, match="has died"):
            cancel.require_wanted(request, file)
    ended = cancellation.ended("after step 3")
    assert ended is not None
    assert (ended.code, ended.what) == ("CANCELLED", "cancelled after step 3")
    for name in ("../x", "", "F" * 32):
        with pytest.raises(LemicaError, match="pipeline models only"):
            cancel.Cancellation(request, name)
    cancellation = cancel.Cancellation(SimpleNamespace(is_cancelled=lambda: False, timeout=lambda: 1000), None)
    time.sleep(0.002)
    ended = cancellation.ended("after step 1")
    assert ended is not None and ended.code == "UNAVAILABLE"


def test_files_of_callers_that_were_killed_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(temporary.tempfile, "gettempdir", lambda: str(tmp_path))
    temporary.remove_leftovers()  # nothing is there yet
    script = (
        "import os, signal, tempfile; tempfile.tempdir = os.environ['AT']\n"
        "from lemica_trt.triton.server import cancel\n"
        "with cancel.cancel_token(): os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script], env={**os.environ, "AT": str(tmp_path)}, check=False)
    with cancel.cancel_token() as mine:
        (mine.parent / "something else").touch()
        assert len(list(mine.parent.iterdir())) == 3
        temporary.remove_leftovers()
        assert {path.name for path in mine.parent.iterdir()} == {mine.name, "something else"}


def test_a_process_ends_with_its_server(tmp_path: Path) -> None:
    """A grandchild whose parent is killed; with its files, and its shared memory, whatever that is called."""
    child = (
        "import os, sys, tempfile, time; tempfile.tempdir = os.environ['AT']\n"
        "sys.modules['c_python_backend_utils'] = sys  # what the backend's program has\n"
        "from lemica_trt.triton.server import cancel, lifetime\n"
        "lifetime.CHECK_INTERVAL_SECONDS = 0.01\n"
        "lifetime.exit_with_parent(); lifetime.exit_with_parent()\n"
        "with cancel.cancel_token(): print(os.getpid(), flush=True); time.sleep(600)"
    )
    server = "import subprocess, sys\nprocess = subprocess.Popen([sys.executable, *sys.argv[1:]])\nprocess.wait()"
    (tmp_path / "model.py").write_text(child)
    region = Path("/dev/shm") / f"some_prefix_{tmp_path.name}-{os.getpid()}"
    region.touch()
    environment = {**os.environ, "AT": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", server, str(tmp_path / "model.py"), region.name, "1024"],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdout is not None
        process = int(parent.stdout.readline())
        assert len(list(tmp_path.glob("*/*"))) == 1
        parent.kill()
        assert parent.stdout.read() == ""  # its end: nobody holds the pipe any more
    while not temporary.has_died(str(process)):  # its files are closed a moment before
        time.sleep(0.01)
    assert not list(tmp_path.glob("*/*")) and not region.exists()


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = SimpleNamespace(is_cancelled=lambda: False, timeout=lambda: 0)
    monkeypatch.setattr(temporary.tempfile, "gettempdir", lambda: str(tmp_path))
    with cancel.cancel_token() as file:
        (tmp_path / "victim").write_text("mine")
        file.unlink()
        file.symlink_to(tmp_path / "victim")
        with pytest.raises(OSError, match="symbolic link"):
            cancel.Cancellation(request, file.name)
        assert (tmp_path / "victim").read_text() == "mine"
    file.parent.chmod(0o777)
    with pytest.raises(EngineError, match="expected a folder of this user alone"), cancel.cancel_token():
        pass


@pytest.mark.parametrize(
    ("message", "kind"),
    [
        ("plan b15 holds for guidance_scale 2 … 7, got 100 → use the plan that skips nothing", InputError),
        ("this bundle was built without guidance", InputError),
        ("steps, the number of full steps, must be one of 10, 15; got 3", InputError),
        ("the denoiser has died", EngineError),
    ],
)
def test_clients_know_what_was_their_mistake(message: str, kind: type[LemicaError]) -> None:
    assert type(_error(SimpleNamespace(status=lambda: None, message=lambda: message), "localhost:1")) is kind


def test_answers_that_never_come_are_given_up() -> None:
    released, wanted = threading.Event(), [True]

    def forever() -> Any:
        yield 1
        released.wait(60)

    def check() -> None:
        if not wanted[0]:
            raise errors.RequestEnded("CANCELLED", "enough")

    found = cancel.answers_while_wanted(forever(), check, every=0.01)
    assert next(found) == 1
    wanted[0] = False
    with pytest.raises(errors.RequestEnded, match="enough"):
        next(found)
    released.set()
    assert list(cancel.answers_while_wanted(iter([1, 2]), lambda: None)) == [1, 2]


# --- what the text encoder's log says --------------------------------------------------------------------------------


def test_prompts_that_are_cut_or_far_are_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line without the prompt's text; of negative prompts, whose encoders may be others, only that they are cut."""
    logged: list[str] = []
    pb = SimpleNamespace(
        Logger=SimpleNamespace(log_warn=logged.append),
        Tensor=lambda name, array: (name, array.shape, array.flat[-1]),
        InferenceResponse=SimpleNamespace,
        get_input_tensor_by_name=lambda request, name: SimpleNamespace(as_numpy=lambda: request.array),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", pb)
    model = runpy.run_path(str(Path(load.__file__).parents[1] / "model" / "text_encoder.py"))["TritonPythonModel"]()
    model.name, model.input = "text_encoder", Port("prompt", "STRING", (1,))
    model.pipeline = SimpleNamespace(
        encode_text=lambda prompt, negative: EncodedText(
            {"prompt_embeds": np.full((5, 12), negative, np.float32)}, {"prompt_embeds": len(prompt)}
        ),
        warnings=lambda prompt, negative: [] if prompt == "near" else [f"it is {'cut' if negative else 'far'}"],
    )
    model.keep(3)
    for prompt, negative in (("near", 0), ("dragons", 0), ("dragons", 1), ("blurry", 1), ("dragons", 0)):
        array, sent = np.array([[prompt.encode()]], np.object_), json.dumps({"negative": True} if negative else {})
        (answer,) = model.execute([SimpleNamespace(array=array, parameters=lambda sent=sent: sent)])
        assert answer.output_tensors == [
            ("prompt_embeds", (1, 5, 12), negative),
            ("prompt_embeds_tokens", (1, 1), len(prompt)),
        ]
    assert logged == ["text_encoder: it is far", "text_encoder: it is cut", "text_encoder: it is cut"]
    assert model.encoded.cache_info().hits == 1


def test_addresses_of_servers() -> None:
    for url, expected in (
        ("localhost:8001", ("localhost:8001", False)),
        ("grpc://localhost:8001/", ("localhost:8001", False)),
        ("http://[::1]:8001", ("[::1]:8001", False)),
        ("grpcs://example.com:443", ("example.com:443", True)),
        ("https://example.com:443", ("example.com:443", True)),
    ):
        assert _address(url) == expected
    for url in ("localhost", "http://localhost:8001/v2", "ftp://localhost:1", "", "user@host:1", "host:1 "):
        with pytest.raises(UsageError, match=r"expected HOST:PORT of a server's gRPC endpoint, got .* → --url local"):
            _address(url)
