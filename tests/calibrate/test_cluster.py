"""Calibration on a local Ray cluster of two workers: the same bits as here, also when one of them dies."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lemica_trt.calibrate.cluster import RayWorkers
from lemica_trt.calibrate.estimate import calibrate_cheaply
from lemica_trt.calibrate.exact import measure
from lemica_trt.core.errors import InputError, MissingDependencyError
from lemica_trt.core.values import json_bytes
from lemica_trt.evaluate.evaluator import PlanEvaluator
from lemica_trt.evaluate.samples import Samples
from lemica_trt.ir.schedule import Schedule
from lemica_trt.planning.step_plan import plan_from_schedule
from lemica_trt.testing.toy_model import ToyModel, euler

pytestmark = pytest.mark.cpu
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")

ARGUMENTS: dict[str, Any] = {"prompts": ["a cat", "a dog"], "samples": 3, "seed": 5, "max_skip": 3}


CLUSTER = """
import sys, ray
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
"""A cluster of one machine with two CPUs, until its input ends."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Address of a cluster with room for two workers of one thread each, in a process of its own."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),  # workers load this file's functions
        "RAY_USAGE_STATS_ENABLED": "0",
        # For busy hosts: a worker may take longer to start than a minute, and does not stand back behind all others.
        "RAY_worker_register_timeout_seconds": "600",
        "RAY_worker_niceness": "0",
    }
    for _ in range(3):  # Ray gives itself 30 seconds to start
        process = subprocess.Popen(
            [sys.executable, "-c", CLUSTER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )
        with process:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            if address:
                yield address
                return
    pytest.fail("Ray does not start here")


def workers(cluster: str, load: Callable[[], ToyModel] = ToyModel, notes: list[str] | None = None) -> RayWorkers:
    return RayWorkers(cluster, ToyModel(), load, note=(notes if notes is not None else []).append)


def mortal(marker: Path, calls: int) -> ToyModel:
    """A model that kills its process at some call of the DiT; only once, wherever that is."""
    model, left = ToyModel(), calls

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            try:
                marker.touch(exist_ok=False)
            except FileExistsError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

    model.pipeline.transformer.embed.register_forward_pre_hook(count)
    return model


def other() -> ToyModel:
    model = ToyModel()
    model.revision = "another"
    return model


@needs_ray
def test_two_workers_one_of_them_lost_give_the_same_bits(tmp_path: Path, cluster: str) -> None:
    model, notes = ToyModel(), list[str]()
    told: list[float] = []
    with workers(cluster, partial(mortal, tmp_path / "killed", calls=60), notes) as pool:
        progress = {"progress": lambda done, total: told.append(done / total)}
        exact = measure(model, euler(8), journal=tmp_path / "e", workers=pool, batch=3, **ARGUMENTS, **progress)
        cheap = calibrate_cheaply(model, euler(8), method="secant", journal=tmp_path / "c", workers=pool, **ARGUMENTS)
        plans = [
            plan_from_schedule(
                Schedule(num_steps=8, full_steps=full), euler(8), name="p", guidance_scale=3.0, method=""
            )
            for full in ((0, 3, 6), (0, 2, 4))
        ]
        evaluator = partial(PlanEvaluator, lambda: model, euler(8), Samples(prompts=("a cat",), seed=1, count=3))
        scores = evaluator(folder=tmp_path / "t", workers=pool).scores(plans)
    assert (tmp_path / "killed").exists()
    assert notes.count("Ray: a worker was lost; its piece is given to another") == 1
    assert notes[0] == "Ray: 2 workers, 1 threads each"
    assert told[0] == 0 and told[-1] == 1 and told == sorted(told)
    here = measure(model, euler(8), journal=tmp_path / "e0", batch=3, **ARGUMENTS)
    assert json_bytes(exact) == json_bytes(here)
    estimated = calibrate_cheaply(model, euler(8), method="secant", journal=tmp_path / "c0", **ARGUMENTS)
    assert json_bytes(cheap) == json_bytes(estimated)
    assert scores == evaluator(folder=tmp_path / "t0").scores(plans)
    (trials,) = (path.name for path in (tmp_path / "t").iterdir())
    for name, other in (("e", "e0"), ("c", "c0"), (f"t/{trials}", f"t0/{trials}")):  # every piece was finished once
        mine, theirs = ((tmp_path / file).read_bytes().splitlines() for file in (name, other))
        assert sorted(mine) == sorted(theirs)


@needs_ray
def test_errors_of_workers_are_told_here_and_other_models_refused(tmp_path: Path, cluster: str) -> None:
    with workers(cluster, other) as pool, pytest.raises(InputError, match="expected model revision toy, got another"):
        measure(ToyModel(), euler(4), journal=tmp_path / "j", workers=pool, **ARGUMENTS | {"samples": 1})


@needs_ray
def test_a_cluster_without_room_for_a_worker(tmp_path: Path, cluster: str) -> None:
    torch.set_num_threads(3)
    with (
        workers(cluster) as pool,
        pytest.raises(MissingDependencyError, match=r"a machine with 3 CPUs for a worker, got \[2\]"),
    ):
        measure(ToyModel(), euler(4), journal=tmp_path / "j", workers=pool, **ARGUMENTS)


@needs_ray
@pytest.mark.parametrize("loss", ["RayActorError", "OutOfMemoryError", "NodeDiedError"])
def test_workers_that_all_die_end_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    pool, hired = workers("local"), []

    class Dying:
        """Ray as the pool sees it, with actors that die when they begin."""

        exceptions = pool._ray.exceptions

        def wait(self, running: list[Any], num_returns: int) -> tuple[list[Any], list[Any]]:
            return running[:num_returns], running[num_returns:]

        def get(self, reference: Any) -> None:
            raise getattr(self.exceptions, loss)(*["killed"][: loss != "RayActorError"])

        def kill(self, actor: Any) -> None:
            hired.remove(actor)

    def hire() -> Any:
        actor = SimpleNamespace(begin=SimpleNamespace(remote=lambda job: object()))
        hired.append(actor)
        return actor

    monkeypatch.setattr(pool, "_ray", Dying())
    monkeypatch.setattr(pool, "_hire", hire)
    monkeypatch.setattr(pool, "_room", lambda: 2)
    with pool, pytest.raises(MissingDependencyError, match="expected Ray workers that live, 5 died one after another"):
        measure(ToyModel(), euler(4), journal=tmp_path / "j", workers=pool, **ARGUMENTS)


@needs_ray
def test_a_finished_journal_needs_no_cluster(tmp_path: Path) -> None:
    graph = measure(ToyModel(), euler(4), journal=tmp_path / "j", **ARGUMENTS)
    with workers("127.0.0.1:1") as pool:
        assert measure(ToyModel(), euler(4), journal=tmp_path / "j", workers=pool, **ARGUMENTS) == graph


def test_without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'lemica-trt\[ray\]'"):
        workers("auto")
