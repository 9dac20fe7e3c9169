"""Workers on a Ray cluster: one actor for each GPU (or for as many CPUs as a worker has threads), each with the model.

The last digits of a result depend on the library versions, the device and the number of threads: workers whose model
or libraries are others than here are refused, and all compute with as many threads as this process has. What is sent
is a job and the name of the weights; each machine must find those under that name.

A worker that dies takes one unit with it, which another does anew; in its place a new one is started as soon as Ray has
room for it.
"""

from __future__ import annotations

import logging
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol

from lemica_trt import __version__
from lemica_trt.calibrate.workers import E, InProcess, Job, U
from lemica_trt.core.errors import InputError, MissingDependencyError, install_command
from lemica_trt.ir.step_model import StepModel

PATIENCE = 2
"""So many workers more than there are may die without a unit finished in between."""


class TorchModel(StepModel, Protocol):
    """A model in PyTorch: `models.Model`."""

    @property
    def device(self) -> Any: ...


class RayWorkers:
    """Workers on a Ray cluster; a context manager, which lets go of them at its end. Ray starts with the first unit.

    Args:
        address: as `ray.init` has it: `local` starts a cluster on this machine, `auto` finds the one that runs on
            it, HOST:PORT and ray://HOST:PORT name one. A process that has called `ray.init` already keeps its own.
        model: what the workers must have.
        load: loads it there; is sent to them.
        note: told of workers, and of lost ones.

    Raises:
        MissingDependencyError: Ray is not installed; no cluster at the address, or none that has room for a worker
            (both when called); workers keep dying.
        InputError: a worker has another model, or other versions of libraries.
    """

    def __init__(
        self, address: str, model: TorchModel, load: Callable[[], TorchModel], *, note: Callable[[str], None]
    ) -> None:
        import torch  # of the model: engines run in one process

        try:
            import ray
        except ImportError:
            raise MissingDependencyError(
                "--ray needs Ray, which is not installed", fix=install_command("ray")
            ) from None
        self._ray: Any = ray
        self._address = address
        self._load, self._origin, self._note = load, _origin(model), note
        self._threads, self._gpu = torch.get_num_threads(), model.device.type == "cuda"
        self._connected_here = False
        self._actors: list[Any] = []

    def __enter__(self) -> RayWorkers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors.clear()
        if self._connected_here:
            self._ray.shutdown()

    def __call__(self, job: Job[U, E], units: Sequence[U]) -> Iterator[tuple[U, Sequence[E]]]:
        ray = self._ray
        room = self._room()
        while len(self._actors) < min(room, len(units)):
            self._actors.append(self._hire())
        self._note(f"Ray: {len(self._actors)} workers, {self._threads} threads each")
        waiting, idle, left, lost = deque(units), list[Any](), len(units), 0
        running: dict[Any, tuple[Any, U | None]] = {actor.begin.remote(job): (actor, None) for actor in self._actors}
        while left:
            while waiting and idle:
                actor, unit = idle.pop(), waiting.popleft()
                running[actor.work.remote(unit)] = actor, unit
            (ready,), _ = ray.wait(list(running), num_returns=1)
            actor, done = running.pop(ready)
            try:
                entries = ray.get(ready)
            except ray.exceptions.RayTaskError as error:  # the job's own
                raise error.cause from None
            except ray.exceptions.RayError:  # died, was killed for memory, lost its node, or cannot be reached
                lost += 1
                if lost > room + PATIENCE:
                    raise MissingDependencyError(
                        f"expected Ray workers that live, {lost} died one after another",
                        fix="see Ray's logs for why: most often there is too little memory for the model",
                    ) from None
                self._note(f"Ray: a worker was lost{'' if done is None else '; its piece is given to another'}")
                if done is not None:
                    waiting.append(done)
                ray.kill(actor)  # one that is only out of reach would keep its room
                self._actors[self._actors.index(actor)] = successor = self._hire()
                running[successor.begin.remote(job)] = successor, None
                continue
            idle.append(actor)
            if done is not None:
                left, lost = left - 1, 0
                yield done, entries

    def _room(self) -> int:
        """How many workers the cluster has room for; connects to it."""
        ray = self._ray
        if not ray.is_initialized():
            try:
                ray.init(address=self._address, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:  # Ray raises that very class where it does not start in time
                line = next(iter(str(error).splitlines()), type(error).__name__)
                raise MissingDependencyError(
                    f"--ray {self._address}: expected a Ray cluster, got: {line}",
                    fix="start one with `ray start --head`, or use --ray local",
                ) from None
            self._connected_here = True
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        needs, each = ("GPU", 1) if self._gpu else ("CPU", self._threads)
        room = sum(int(node.get(needs, 0)) // each for node in nodes)
        if room == 0:
            raise MissingDependencyError(
                f"--ray {self._address}: expected a machine with {each} {needs}s for a worker, got "
                f"{[int(node.get(needs, 0)) for node in nodes]}",
                fix="calibrate with --device cpu" if self._gpu else "set OMP_NUM_THREADS to what each machine has",
            )
        return room

    def _hire(self) -> Any:
        cpus, gpus = (1, 1) if self._gpu else (self._threads, 0)
        # No retries by Ray: a restarted actor may have to wait for room while others have nothing to do.
        kind = self._ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=0, max_task_retries=0)(_Worker)
        return kind.remote(self._load, self._threads, self._origin)


class _Worker:
    """The actor. Loads the model with its first job: what goes wrong there is an error of that call, not its death."""

    def __init__(self, load: Callable[[], TorchModel], threads: int, origin: dict[str, str]) -> None:
        import torch

        torch.set_num_threads(threads)
        self._load, self._origin = load, origin
        self._model: TorchModel | None = None
        self._here: InProcess | None = None
        self._job: Any = None

    def begin(self, job: Any) -> None:
        if self._model is None:
            self._model = self._load()
            for name, found in _origin(self._model).items():
                if found != self._origin[name]:
                    raise InputError(
                        f"Ray worker on {socket.gethostname()}: expected {name} {self._origin[name]}, got {found}",
                        fix="install the same on every machine: results would differ in their last digits",
                    )
            self._here = InProcess(self._model)
        self._job = job

    def work(self, unit: Any) -> Any:
        assert self._here is not None
        ((_, entries),) = self._here(self._job, [unit])
        return entries


def _origin(model: TorchModel) -> dict[str, str]:
    """What decides a result beside the job."""
    return {"lemica-trt": __version__, **model.libraries, "model revision": model.revision}
