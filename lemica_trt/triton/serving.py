"""What the emitted models share; runs inside Triton's python backend.

A model that loads answers rightly, or it does not load. `start` refuses

- a server older than `SERVER`, or a python backend without what the models use;
- a numpy that this server cannot read (out of numpy 2, the backend of 24.10 reads wrong numbers without a word);
- another lemica-trt than the one that wrote the repository, other graphs than it was written for;
- a bundle with a file missing, altered or not listed;
- engines of another TensorRT or GPU than the one here (the runtime compares).

Answers are the same bits whatever shares the batch: `Batches` measures at load whether the engines give every request
the same bits in a batch as alone, and runs requests one by one where they do not.

`pb_utils` (`triton_python_backend_utils`) exists only inside the server: it is passed in.
"""

from __future__ import annotations

import json
import math
import os
import queue
import re
import secrets
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lemica_trt import __version__
from lemica_trt.backends.base import Array
from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.errors import EngineError, InputError, LemicaError, UnsupportedError, UsageError
from lemica_trt.ir.graphs import Role
from lemica_trt.ir.plan import PlanRow, StepPlan
from lemica_trt.runtime.denoise import Cancelled, OnRow, RowDone
from lemica_trt.runtime.pipeline import Pipeline
from lemica_trt.runtime.random import Generator
from lemica_trt.triton.interface import embeds_of

SERVER = (2, 51)
"""Oldest tritonserver release: the one that the models were tested on (container 24.10)."""

GUIDANCE = (0.0, 100.0)
"""Range of a request's guidance scale."""

PROMPT_BYTES = 8192
"""Longest prompt, UTF-8; far above every text length, so that tokenising cannot hold up a server."""

BUCKETS = [0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0]
"""Upper bounds of the latency histogram, seconds."""

T = TypeVar("T")

STEP_KINDS = ("full", "skipped")
"""Labels of the step metric."""


class Ended(LemicaError):
    """A request ended before its result: `code` is the name of the TritonError code."""

    def __init__(self, code: str, what: str) -> None:
        super().__init__(what)
        self.code = code


# ---------------------------------------------------------------- at load


def start(pb_utils: Any, args: Mapping[str, str], roles: Collection[Role] | None) -> tuple[Pipeline, dict[str, str]]:
    """Check the server and the bundle, and load the engines of some roles.

    Args:
        args: of `initialize`.
        roles: which graphs; None: those of the denoising steps.

    Returns:
        The pipeline, and the parameters of config.pbtxt.

    Raises:
        LemicaError: anything is not as it must be; the server then rejects the model, and keeps an older one.
    """
    bundle, parameters = open_bundle(pb_utils, args)
    # Not by CUDA_VISIBLE_DEVICES: the backend names devices to this process as the server counts them.
    device = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else 0
    threads = int(parameters["threads"]) or None
    roles = bundle.manifest.graphs.layout.step_graphs if roles is None else roles
    return Pipeline(bundle, backend=parameters["backend"], device=device, threads=threads, roles=roles), parameters


def open_bundle(pb_utils: Any, args: Mapping[str, str]) -> tuple[Bundle, dict[str, str]]:
    """Check the server and every file of the bundle; the bundle and the parameters of config.pbtxt.

    Raises:
        LemicaError: as `start`.
    """
    check_server(pb_utils)
    config = json.loads(args["model_config"])
    parameters = {name: value["string_value"] for name, value in config.get("parameters", {}).items()}
    if parameters["lemica_trt"] != __version__:
        raise UnsupportedError(
            f"{args['model_name']} was written by lemica-trt {parameters['lemica_trt']}, here is {__version__}",
            fix="install that version, or write the repository again with 'lemica-trt triton'",
        )
    folder = Path(args["model_repository"]) / parameters["bundle"]
    bundle = Bundle.open(folder)
    bundle.check()
    if bundle.engine(parameters.get("backend")).key.graphs_digest != parameters["graphs"]:
        raise UnsupportedError(
            f"{folder}: expected the graphs that {args['model_name']} was written for, got others",
            fix="write the repository again with 'lemica-trt triton'",
        )
    return bundle, parameters


def check_server(pb_utils: Any) -> None:
    """Raise UnsupportedError unless this server and its python backend do what the models need."""
    release = os.environ.get("TRITON_SERVER_VERSION", "")  # set in NVIDIA's containers
    numbers = re.match(r"(\d+)\.(\d+)", release)
    if numbers and (int(numbers[1]), int(numbers[2])) < SERVER:
        raise UnsupportedError(f"expected tritonserver {SERVER[0]}.{SERVER[1]} or newer, got {release}")
    for owner, name in (
        (pb_utils.InferenceRequest, "is_cancelled"),
        (pb_utils.InferenceRequest, "timeout"),
        (pb_utils.InferenceRequest, "get_response_sender"),
        (pb_utils.TritonError, "CANCELLED"),
        (pb_utils.MetricFamily, "HISTOGRAM"),
    ):
        if not hasattr(owner, name):
            raise UnsupportedError(
                f"expected a python backend with {name}, this one has none",
                fix=f"use tritonserver {SERVER[0]}.{SERVER[1]} or newer",
            )
    for array in (np.arange(1, 8, dtype=np.float32), np.array([b"text", b""], np.object_)):
        tensor = pb_utils.Tensor("round_trip", array)
        if array.dtype == np.float32:  # through the memory that the server reads, not the array that it was given
            tensor = pb_utils.Tensor.from_dlpack("round_trip", tensor.to_dlpack())
        if not np.array_equal(tensor.as_numpy(), array):
            raise UnsupportedError(
                f"this server cannot read arrays of numpy {np.__version__}: a small one came back changed",
                fix="pip install 'numpy<2' in the interpreter of the python backend",
            )


# ---------------------------------------------------------------- requests


@dataclass
class Job:
    """One request to denoise.

    Attributes:
        embeds: [1 or 2, text_length, width]; with guidance the negative prompt's first.
        plan, seed, guidance_scale: what was asked for, or the default.
        sender: where its answers go.
        watch: whether it is still wanted.
        stopped: why it ended before its result; it has been answered so.
    """

    embeds: Array
    plan: StepPlan
    seed: int
    guidance_scale: float
    sender: Any = None
    watch: Watch | None = None
    stopped: Ended | None = None


def read_parameters(request: Any, allowed: Collection[str]) -> dict[str, Any]:
    """A request's parameters; a calling model's come as JSON in `settings`, because models pass no floats on.

    Raises:
        InputError: one of them is unknown.
    """
    found: dict[str, Any] = json.loads(request.parameters() or "{}")
    if "caller" in found and "settings" in found:
        found.update(json.loads(found.pop("settings")))
    for name in found:
        if name not in allowed and not name.startswith("triton_"):
            raise InputError(f"unknown parameter {name!r}: expected {', '.join(sorted(allowed))}")
    return found


def choose_plan(parameters: Mapping[str, Any], plans: Mapping[str, StepPlan], default: str) -> StepPlan:
    """The plan that `plan`, `steps` (full steps), both or neither ask for.

    Raises:
        InputError: there is none.
    """
    name, steps = parameters.get("plan"), parameters.get("steps")
    if name == "default" and name not in plans:
        name = default
    if name is not None and name not in plans:
        raise InputError(f"plan must be one of {', '.join(plans)}; got {name!r}")
    if steps is None:
        return plans[name or default]
    candidates = [default, *plans] if name is None else [name]
    for candidate in candidates:
        if not isinstance(steps, bool) and plans[candidate].budget == steps:
            return plans[candidate]
    known = ", ".join(f"{plans[c].budget} (plan {c})" for c in dict.fromkeys(candidates))
    raise InputError(f"steps, the number of full steps, must be one of {known}; got {steps!r}")


def seed_from(parameters: Mapping[str, Any]) -> int:
    """The seed; 0 if none is given.

    Raises:
        InputError: it is not 0 … 2^63 − 1.
    """
    seed = parameters.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 1 << 63:
        raise InputError(f"seed must be an integer from 0 to 2^63 - 1; got {seed!r}")
    return seed


def guidance_from(parameters: Mapping[str, Any], plan: StepPlan, *, guided: bool) -> float:
    """The guidance scale; the plan's where none is asked for.

    Raises:
        InputError: out of `GUIDANCE`, or of what the plan holds for, or the bundle has none.
    """
    if "guidance_scale" not in parameters:
        return plan.guidance_scale
    scale = parameters["guidance_scale"]
    if not guided:
        raise InputError("this bundle was built without guidance: it takes no guidance_scale and no negative_prompt")
    number = isinstance(scale, (int, float)) and not isinstance(scale, bool)
    if not number or not GUIDANCE[0] <= scale <= GUIDANCE[1]:
        raise InputError(f"guidance_scale must be a number from {GUIDANCE[0]:g} to {GUIDANCE[1]:g}; got {scale!r}")
    plan.require_guidance(scale)
    return float(scale)


def text_from(name: str, value: object) -> str:
    """A prompt.

    Raises:
        InputError: not UTF-8, or longer than `PROMPT_BYTES`.
    """
    data = value.encode() if isinstance(value, str) else value
    if not isinstance(data, bytes) or len(data) > PROMPT_BYTES:
        size = f"{len(data)} bytes" if isinstance(data, bytes) else type(value).__name__
        raise InputError(f"{name} must be text of at most {PROMPT_BYTES} bytes; got {size}")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InputError(f"{name} must be UTF-8; got: {error.reason}") from None


def tensor_from(pb_utils: Any, request: Any, name: str, shape: Sequence[int], kind: Any) -> Array:
    """An input of one sample, without its batch dimension.

    Raises:
        InputError: missing, of another shape or dtype, or with numbers that are not finite.
    """
    tensor = pb_utils.get_input_tensor_by_name(request, name)
    array = None if tensor is None else tensor.as_numpy()
    if array is None or array.shape != (1, *shape) or array.dtype != kind:
        got = "none" if array is None else f"{array.dtype} {list(array.shape)}"
        raise InputError(f"{name} must be {np.dtype(kind).name} {[1, *shape]}, one sample a request; got {got}")
    if array.dtype != np.object_ and not np.isfinite(array).all():
        raise InputError(f"{name} must be finite")
    return np.asarray(array[0])


# ---------------------------------------------------------------- the end of a request before its result


def is_called(request: Any) -> bool:
    """Whether another model sent the request."""
    return "caller" in json.loads(request.parameters() or "{}")


class Watch:
    """Says between steps whether a request is still wanted.

    Args:
        request: with its `timeout` in microseconds, 0 for none, counted from now.
        alive: the caller's `caller` parameter, see `calling`; None: the client called.

    Attributes:
        called: another model called.
    """

    def __init__(self, request: Any, alive: str | None) -> None:
        self._request = request
        limit = request.timeout()
        self._limit = limit / 1e6 if limit else math.inf
        self._start = time.monotonic()
        if alive is not None and not re.fullmatch("[0-9a-f]{32}", str(alive)):
            raise InputError("caller is set by the pipeline models only")
        self.called = alive is not None
        # The caller's file says which process works for it.
        self._alive = None if alive is None else _calls() / str(alive)
        if self._alive is not None:
            with suppress(FileNotFoundError):
                handle = os.open(self._alive, os.O_WRONLY | os.O_NOFOLLOW)
                with open(handle, "w", encoding="ascii") as file:  # noqa: PTH123
                    file.write(str(os.getpid()))

    def ended(self, where: str) -> Ended | None:
        """Why the request is over; None while it is not."""
        if self._request.is_cancelled() or (self._alive is not None and not self._alive.exists()):
            return Ended("CANCELLED", f"cancelled {where}")
        if time.monotonic() - self._start > self._limit:
            return Ended("UNAVAILABLE", f"the request's timeout of {self._limit:g} s passed {where}")
        return None


@contextmanager
def calling() -> Iterator[Path]:
    """A file that is there while the block runs; its name is the `caller` parameter for a model that is called.

    Triton 2.51 passes on to the models that a model calls neither a cancellation nor, in the middle of a stream, their
    death. A file does both: the called model writes its process id into it, and stops when it has gone.
    """
    folder = _calls()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise EngineError(f"{folder}: expected a folder of this user alone, got another", fix="remove it")
    file = folder / secrets.token_hex(16)
    file.touch()
    try:
        yield file
    finally:
        file.unlink(missing_ok=True)


def answers(responses: Iterator[T], check: Callable[[], None], every: float = 0.05) -> Iterator[T]:
    """The items of an iterator that may wait long or for ever; meanwhile `check` is called, and may raise."""
    found: queue.Queue[tuple[bool, Any]] = queue.Queue()

    def take() -> None:
        try:
            for item in responses:
                found.put((True, item))
            found.put((False, None))
        except Exception as error:  # it is raised where the items are wanted
            found.put((False, error))

    threading.Thread(target=take, daemon=True).start()
    while True:
        try:
            more, item = found.get(timeout=every)
        except queue.Empty:
            check()
            continue
        if more:
            check()
            yield item
        elif item is None:
            return
        else:
            raise item


def require_alive(request: Any, caller: Path) -> None:
    """Raise Ended if the request was cancelled, or the process that works for it has died."""
    if request.is_cancelled():
        raise Ended("CANCELLED", "cancelled")
    process = caller.read_text()
    if process:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            state = "X"
        if state in ("Z", "X"):
            raise Ended("UNAVAILABLE", "the process of denoiser_stream has died; load the model again")


def _calls() -> Path:
    return Path(tempfile.gettempdir()) / f"lemica-trt-calls-{os.getuid()}"


# ---------------------------------------------------------------- batches


class Batches:
    """Runs jobs together where that changes no bit of any result.

    Args:
        pipeline: with the engines of the denoising steps.
        rule: `exact`: together if measured equal, else one by one; `off`: one by one.

    Attributes:
        size: most jobs in one engine batch.
    """

    def __init__(self, pipeline: Pipeline, rule: str = "exact") -> None:
        if rule not in ("exact", "off"):
            raise UsageError(f"batching must be exact or off, got {rule!r}")
        self._pipeline = pipeline
        graphs = pipeline.bundle.manifest.graphs
        self._guided = graphs.layout.guided
        self.plans = {name: pipeline.bundle.plan(name) for name in pipeline.bundle.plans}
        embeds = embeds_of(graphs)
        self.condition = embeds.name
        self.embeds_shape = embeds.dims
        self.embeds_dtype: Any = {"FP32": np.float32, "FP16": np.float16}[embeds.dtype]
        self.size = self.equal_up_to(graphs.max_batch) if rule == "exact" else 1

    def warm_up(self) -> None:
        """Run every plan's first row: all rows are bound, one full step is computed.

        Raises:
            LemicaError: an engine does not run.
        """

        def stop(row: RowDone) -> None:
            raise Cancelled

        for plan in self.plans.values():
            with suppress(Cancelled):
                self._latents([self._probe(plan, 0)], on_row=stop)

    def equal_up_to(self, largest: int) -> int:
        """The largest batch b ≤ `largest` such that batches of 2 … b give the bits of batches of 1.

        Measured on the first rows of each plan until every graph has run, on normal noise. Which numbers are added in
        which order does not depend on their values, so that another order shows in the last places of such numbers.
        """
        plans = [_first_rows(plan) for plan in self.plans.values()]
        jobs = {id(plan): [self._probe(plan, seed) for seed in range(largest)] for plan in plans}
        alone = {id(plan): [self._latents([job])[0] for job in jobs[id(plan)]] for plan in plans if largest > 1}
        for size in range(2, largest + 1):
            for plan in plans:
                together = self._latents(jobs[id(plan)][:size])
                if not all(np.array_equal(one, other) for one, other in zip(together, alone[id(plan)])):
                    return size - 1
        return largest

    def groups(self, jobs: Sequence[Job]) -> list[list[Job]]:
        """Jobs that may run together: one plan, at most `size`; in order of arrival."""
        groups: list[list[Job]] = []
        for job in jobs:
            for group in groups:
                if group[0].plan is job.plan and len(group) < self.size:
                    group.append(job)
                    break
            else:
                groups.append([job])
        return groups

    def run(self, jobs: Sequence[Job], on_row: OnRow) -> Array:
        """Latents of jobs of one plan, float32 [b, *latent_shape]; a stochastic plan draws from each job's seed."""
        return self._latents(jobs, on_row)

    def _latents(self, jobs: Sequence[Job], on_row: OnRow | None = None) -> Array:
        shape = self._pipeline.bundle.manifest.graphs.layout.latent_shape
        embeds = [job.embeds[-1] for job in jobs]
        scales = None
        if self._guided:
            embeds = [job.embeds[0] for job in jobs] + embeds
            scales = np.array([job.guidance_scale for job in jobs], np.float64)
        return self._pipeline.latents(
            {self.condition: np.stack(embeds)},
            np.stack([Generator(job.seed).randn(shape) for job in jobs]),
            guidance_scale=scales,
            plan=jobs[0].plan,
            seeds=[job.seed for job in jobs],
            on_step=on_row,
        )

    def _probe(self, plan: StepPlan, seed: int) -> Job:
        numbers = np.random.default_rng(seed).standard_normal((1 + self._guided, *self.embeds_shape))
        return Job(numbers.astype(self.embeds_dtype), plan, seed, plan.guidance_scale + seed)


def _first_rows(plan: StepPlan) -> StepPlan:
    """The rows of a plan until each kind of row has run, closed by a row that gives the latents."""
    kinds = {row.variant for row in plan.rows[:-1]}
    rows: list[PlanRow] = []
    for row in plan.rows[:-1]:
        rows.append(row)
        if {row.variant for row in rows} == kinds:
            break
    last = PlanRow(step=plan.num_steps, latents=(1.0,), outputs=(-0.1,))
    return StepPlan(
        name="probe",
        num_steps=plan.num_steps,
        guidance_scale=plan.guidance_scale,
        rows=(*rows, last),
        scheduler=plan.scheduler,
        sampler_digest=plan.sampler_digest,
        method="none",
    )


# ---------------------------------------------------------------- metrics


class Metrics:
    """What a model reports in `/metrics`, beside Triton's own queue and request metrics.

    | metric | labels | |
    |---|---|---|
    | `lemica_steps_total` | model, plan, kind | steps of requests: `full` ran the DiT, `skipped` did not |
    | `lemica_requests_total` | model, plan, outcome | `ok`, `cancelled`, `unavailable`, `error` |
    | `lemica_denoise_seconds` | model, plan | histogram of a request's denoising, its batch's time |
    | `lemica_batch_size` | model | the largest batch whose results are the bits of batches of 1 |
    | `lemica_engine_bytes` | model | size of the engine files that are loaded |
    | `lemica_resident_bytes` | model | memory of the model's process |
    """

    def __init__(self, pb_utils: Any, model: str, plans: Collection[str]) -> None:
        def family(name: str, description: str, kind: str) -> Any:
            return pb_utils.MetricFamily(name=name, description=description, kind=getattr(pb_utils.MetricFamily, kind))

        self._families = {
            "steps": family("lemica_steps_total", "Denoising steps, by what ran", "COUNTER"),
            "requests": family("lemica_requests_total", "Requests, by how they ended", "COUNTER"),
            "seconds": family("lemica_denoise_seconds", "Seconds from first to last step", "HISTOGRAM"),
            "batch": family("lemica_batch_size", "Largest batch with the bits of batches of 1", "GAUGE"),
            "engines": family("lemica_engine_bytes", "Size of the engine files that are loaded", "GAUGE"),
            "resident": family("lemica_resident_bytes", "Memory of the model's process", "GAUGE"),
        }
        self._gauges = {
            name: self._families[name].Metric(labels={"model": model}) for name in ("batch", "engines", "resident")
        }
        self._steps = {
            (plan, kind): self._families["steps"].Metric(labels={"model": model, "plan": plan, "kind": kind})
            for plan in plans
            for kind in STEP_KINDS
        }
        self._requests = {
            (plan, outcome): self._families["requests"].Metric(
                labels={"model": model, "plan": plan, "outcome": outcome}
            )
            for plan in plans
            for outcome in ("ok", "cancelled", "unavailable", "error")
        }
        self._seconds = {
            plan: self._families["seconds"].Metric(labels={"model": model, "plan": plan}, buckets=BUCKETS)
            for plan in plans
        }

    def loaded(self, pipeline: Pipeline, backend: str, roles: Collection[Role], batch: int) -> None:
        """What was loaded."""
        manifest = pipeline.bundle.manifest
        files = {file for role, file in pipeline.bundle.engine(backend).files.items() if role in roles}
        for graph in manifest.graphs.graphs:
            if graph.file in files:
                files.update(graph.data_files)
        self._gauges["engines"].set(float(sum(manifest.files[name].size for name in files)))
        self._gauges["batch"].set(float(batch))
        self.resident()

    def resident(self) -> None:
        """Measure the process's memory (Linux)."""
        with suppress(OSError):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self._gauges["resident"].set(float(pages * os.sysconf("SC_PAGE_SIZE")))

    def row(self, plan: str, full: bool, requests: int) -> None:
        """A row has run for some requests."""
        self._steps[plan, STEP_KINDS[not full]].increment(float(requests))

    def request(self, plan: str, outcome: str, seconds: float | None = None) -> None:
        """A request has ended."""
        self._requests[plan, outcome].increment(1.0)
        if seconds is not None:
            self._seconds[plan].observe(seconds)


# ---------------------------------------------------------------- answers


def code_of(error: Exception) -> str:
    """The name of the TritonError code that answers an exception."""
    if isinstance(error, Ended):
        return error.code
    return "INVALID_ARG" if isinstance(error, (InputError, UsageError)) else "INTERNAL"


def line_of(error: Exception) -> str:
    """An exception in one line."""
    return " ".join((str(error) if isinstance(error, LemicaError) else f"{type(error).__name__}: {error}").split())


def triton_error(pb_utils: Any, error: Exception) -> Any:
    """An exception as Triton's error."""
    return pb_utils.TritonError(line_of(error), getattr(pb_utils.TritonError, code_of(error)))


def passed_on(pb_utils: Any, error: Any) -> Ended:
    """The error of a model that was called, to be answered as it is.

    On the way from a streaming model Triton 2.51 makes every code INTERNAL: its queue is known by what it says.
    """
    message = error.message()
    if "maximum queue size" in message or "timeout expired" in message:
        return Ended("UNAVAILABLE", message)
    for code in ("INVALID_ARG", "UNAVAILABLE", "CANCELLED"):
        if error.code() == getattr(pb_utils.TritonError, code):
            return Ended(code, message)
    return Ended("INTERNAL", message)


def send_error(pb_utils: Any, sender: Any, error: Exception, *, to_model: bool = False) -> None:
    """Answer with an error; the last answer of a request.

    Args:
        to_model: another model called. On the way to it Triton 2.51 loses the code of an error, and the whole error
            if it comes after other answers; the output `ended`, JSON [code, message], arrives.
    """
    if to_model:
        ended = json.dumps([code_of(error), line_of(error)]).encode()
        response = pb_utils.InferenceResponse([pb_utils.Tensor("ended", np.array([[ended]], np.object_))])
    else:
        response = pb_utils.InferenceResponse(error=triton_error(pb_utils, error))
    sender.send(response, flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
