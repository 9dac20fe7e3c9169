"""Measured error graphs: eq. 4 edge by edge, counted work, and journals that survive anything."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from lemica_trt.calibrate.cost import exact_cost, start_cost
from lemica_trt.calibrate.exact import measure, measurement_digest
from lemica_trt.calibrate.journal import journal_line
from lemica_trt.core.errors import InputError, UsageError, VerificationError
from lemica_trt.core.values import json_bytes
from lemica_trt.ir.calibration import ErrorGraph
from lemica_trt.ir.sampler import SamplerTable
from lemica_trt.testing.toy_model import LATENT_SHAPE, Naive, ToyModel, awkward, euler

pytestmark = pytest.mark.cpu

PROMPTS = ["a cat", "a dog", "two boats"]


@pytest.fixture(scope="module")
def model() -> ToyModel:
    return ToyModel()


def measured(model: ToyModel, journal: Path, **changes: Any) -> ErrorGraph:
    arguments: dict[str, Any] = {"table": euler(6), "prompts": PROMPTS, "samples": 2, "seed": 5, "max_skip": 3}
    return measure(model, journal=journal, **arguments | changes).graph


# --- the errors themselves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", [euler(7), awkward(7)], ids=["euler", "awkward"])
@pytest.mark.parametrize("guidance_scale", [3.0, 1.0], ids=["guided", "unguided"])
@pytest.mark.parametrize(("max_skip", "batch"), [(3, 1), (3, 4), (6, None), (3, 64)])
def test_every_edge_is_eq_4(
    tmp_path: Path, table: SamplerTable, guidance_scale: float, max_skip: int, batch: int | None
) -> None:
    toy = ToyModel(guidance_scale)
    graph = measured(toy, tmp_path / "j", table=table, max_skip=max_skip, batch=batch, samples=2)
    assert [(e.start, e.stop) for e in graph.edges] == [
        (i, j) for i in range(6) for j in range(i + 2, min(i + max_skip + 1, 7) + 1)
    ]
    for s in range(2):
        naive = Naive(toy, table, PROMPTS[s], 5 + s)
        for edge in graph.edges:
            expected = naive.error(edge.start, edge.stop)
            assert expected > 1e-4, "an edge that changes nothing would prove nothing"
            assert edge.errors[s] == pytest.approx(expected, abs=3e-6)


def test_uncached_steps_are_the_naive_run(model: ToyModel) -> None:
    from lemica_trt.calibrate.replay import Stepper

    table = awkward(5)
    uncached = Stepper(model, table, 2).sample("sample 0", "a cat", 3).uncached()
    np.testing.assert_allclose(uncached.final, Naive(model, table, "a cat", 3).final().numpy(), atol=1e-5, rtol=0)
    assert len(uncached.runs) == 6


def test_graph_says_what_it_was_measured_on(model: ToyModel, tmp_path: Path) -> None:
    graph = measured(model, tmp_path / "j", max_skip=99)
    assert (graph.model, graph.revision, graph.scheduler) == ("toy", "toy", "Euler")
    assert (graph.num_steps, graph.max_skip, graph.samples, graph.seed) == (6, 5, 2, 5)
    assert (graph.latent_shape, graph.guidance_scale) == (LATENT_SHAPE, 3.0)
    assert (graph.metric, graph.method) == ("l1", "exact")
    assert graph.sampler_digest == euler(6).digest
    assert set(graph.versions) == {"torch", "diffusers"}


def test_samples_go_round_the_prompts_with_rising_seeds(model: ToyModel, tmp_path: Path) -> None:
    graph = measured(model, tmp_path / "a", prompts=["a cat", "a dog"], samples=3)
    third = measured(model, tmp_path / "b", prompts=["a cat"], samples=1, seed=7)
    assert [edge.errors[2] for edge in graph.edges] == [edge.errors[0] for edge in third.edges]


def test_two_steps_are_enough(model: ToyModel, tmp_path: Path) -> None:
    (edge,) = measured(model, tmp_path / "j", table=euler(2), samples=1).edges
    assert edge.errors[0] == pytest.approx(Naive(model, euler(2), "a cat", 5).error(0, 2), abs=3e-6)


@pytest.mark.parametrize(("num_steps", "max_skip", "batch"), [(7, 3, 4), (7, 6, 1), (9, 1, 64), (2, 1, None)])
def test_cost_is_what_is_run(tmp_path: Path, num_steps: int, max_skip: int, batch: int | None) -> None:
    toy = ToyModel()
    rows = {"all": 0, "full": 0}
    largest = 0

    def count(name: str) -> Any:
        def hook(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            nonlocal largest
            rows[name] += args[0].shape[0]
            largest = max(largest, args[0].shape[0])

        return hook

    toy.pipeline.transformer.embed.register_forward_pre_hook(count("all"))
    toy.pipeline.transformer.blocks[0].register_forward_pre_hook(count("full"))
    measured(toy, tmp_path / "j", table=euler(num_steps), max_skip=max_skip, batch=batch, samples=3)
    expected = exact_cost(num_steps, max_skip, 3)
    assert expected.full == rows["full"] / 2  # two branches
    assert expected.skip == (rows["all"] - rows["full"]) / 2
    assert expected.samplings == expected.full / num_steps
    assert expected.units == 3 * (num_steps - 1)
    assert batch is None or largest <= 2 * batch


def test_cost_of_the_usual_measurement() -> None:
    assert exact_cost(50, 9, 1) == (49, 9039, 405, 180.78)


# --- what goes wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"samples": 0}, {"max_skip": 0}, {"batch": 0}])
def test_refuses_numbers_below_one(model: ToyModel, tmp_path: Path, changes: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"{next(iter(changes))}: expected at least 1, got 0"):
        measured(model, tmp_path / "j", **changes)


def test_refuses_no_prompts(model: ToyModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="prompts: expected at least one"):
        measured(model, tmp_path / "j", prompts=[])


def test_nan_in_the_uncached_run_is_named(tmp_path: Path) -> None:
    toy = ToyModel()
    toy.pipeline.transformer.head.bias.data.fill_(math.nan)
    with pytest.raises(VerificationError, match=r"sample 0, the uncached run: .* at step 1"):
        measured(toy, tmp_path / "j")


def test_nan_in_the_last_step_of_the_uncached_run_is_named(tmp_path: Path) -> None:
    toy = ToyModel()

    def spoil(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output * math.inf if (args[0] < 0.2).all() else output

    toy.pipeline.transformer.time.register_forward_hook(spoil)  # timestep 1000/6 of 1000: only the last step
    with pytest.raises(VerificationError, match=r"sample 0, the uncached run: .* at step 6"):
        measured(toy, tmp_path / "j")


def test_nan_in_an_edge_is_named_and_finished_units_are_kept(tmp_path: Path) -> None:
    toy = ToyModel()
    skip = toy.split.skip
    calls = 0

    def spoil(module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return output * math.nan if calls > 3 else output  # the first start skips 3 times

    handle = skip.register_forward_hook(spoil)
    with pytest.raises(VerificationError, match=r"sample 0, edge \(1, 3\): expected a finite error, got nan"):
        measured(toy, tmp_path / "j", batch=3)
    assert len((tmp_path / "j").read_bytes().splitlines()) == 2
    handle.remove()
    assert json_bytes(measured(toy, tmp_path / "j", batch=3)) == json_bytes(measured(toy, tmp_path / "w", batch=3))


# --- journals ------------------------------------------------------------------------------------------------------


def test_more_samples_extend_and_fewer_are_taken_from_it(model: ToyModel, tmp_path: Path) -> None:
    told: list[tuple[float, float]] = []
    measured(model, tmp_path / "j", samples=1)
    graph = measured(model, tmp_path / "j", samples=3, progress=lambda *args: told.append(args))
    assert told[0][0] == told[0][1] / 3
    assert json_bytes(graph) == json_bytes(measured(model, tmp_path / "at once", samples=3))
    assert (tmp_path / "j").read_bytes() == (tmp_path / "at once").read_bytes()
    before = (tmp_path / "j").read_bytes()
    assert json_bytes(measured(model, tmp_path / "j", samples=2)) == json_bytes(measured(model, tmp_path / "two"))
    assert (tmp_path / "j").read_bytes() == before


@pytest.mark.parametrize("batch", [1, 6])
def test_cut_anywhere_it_goes_on_to_the_same_bytes(model: ToyModel, tmp_path: Path, batch: int) -> None:
    """6: two starts a wave, so that cuts also fall into waves."""
    whole = json_bytes(measured(model, tmp_path / "whole", batch=batch))
    data = (tmp_path / "whole").read_bytes()
    header = data.index(b"\n")
    cuts = [0, 1, header - 1, header, header + 1, header + 2, *range(header + 3, len(data), 37), len(data) - 1]
    for cut in cuts:
        (tmp_path / "cut").write_bytes(data[:cut])
        assert json_bytes(measured(model, tmp_path / "cut", batch=batch)) == whole, cut
        lines = (tmp_path / "cut").read_bytes().splitlines()
        assert sorted(lines) == sorted(data.splitlines()), cut


def test_finished_journal_needs_no_model_call(tmp_path: Path) -> None:
    toy = ToyModel()
    graph = measured(toy, tmp_path / "j")
    toy.pipeline.transformer.embed.register_forward_pre_hook(lambda *_: pytest.fail("the model was called"))
    assert measured(toy, tmp_path / "j") == graph


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 6}, r"another seed \(5 there\): asked for is 6"),
        ({"max_skip": 2}, r"another max_skip \(3 there\): asked for is 2"),
        ({"prompts": PROMPTS[:2]}, "another prompts_digest"),
        ({"table": awkward(6)}, r"another scheduler \('Euler' there\), sampler_digest"),
        ({"table": euler(5)}, r"another sampler_digest .*, num_steps \(6 there\)"),
    ],
)
def test_journal_of_another_measurement_is_refused_and_left_alone(
    model: ToyModel, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    measured(model, tmp_path / "j")
    before = (tmp_path / "j").read_bytes()
    with pytest.raises(InputError, match=says) as caught:
        measured(model, tmp_path / "j", **changes)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "j").read_bytes() == before
    first, second = (
        {"table": euler(6), "prompts": PROMPTS, "seed": 5, "max_skip": 3} | chosen for chosen in ({}, changes)
    )
    assert measurement_digest(model, **first) != measurement_digest(model, **second)


def test_journal_of_another_guidance_is_refused(model: ToyModel, tmp_path: Path) -> None:
    measured(model, tmp_path / "j")
    with pytest.raises(InputError, match=r"another guidance_scale \(3\.0 there\): asked for is 2\.0"):
        measured(ToyModel(2.0), tmp_path / "j")


@pytest.mark.parametrize("content", [b"notes\n", b"notes", b"{}\n", b'{"version": 1}', b"\n\n"])
def test_a_file_that_is_no_journal_is_refused_and_left_alone(model: ToyModel, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(InputError, match=r"j, line 1: expected a Measurement and its digest, got something else"):
        measured(model, tmp_path / "j")
    assert (tmp_path / "j").read_bytes() == content


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{}", "line 3: expected a valid Unit"),
        (b'{"errors":[1.0],"sample":0,"start":0}', "line 3: expected 3 errors of start 0, got 1"),
        (b'{"errors":[],"sample":0,"start":9}', "line 3: expected 0 errors of start 9, got 0"),
        (b'{"errors":[1,1,-1],"sample":0,"start":0}', "line 3: .*must not be negative"),
    ],
)
def test_a_line_of_no_such_measurement_is_named(model: ToyModel, tmp_path: Path, line: bytes, says: str) -> None:
    measured(model, tmp_path / "j")
    lines = (tmp_path / "j").read_bytes().splitlines(keepends=True)
    (tmp_path / "j").write_bytes(b"".join([*lines[:2], journal_line(msgspec.Raw(line)), *lines[2:]]))
    with pytest.raises(InputError, match=says):
        measured(model, tmp_path / "j")


def test_no_changed_bit_is_ever_used(model: ToyModel, tmp_path: Path) -> None:
    """Of the first line: the file is refused. Of any other: what its line held is measured again."""
    whole = json_bytes(measured(model, tmp_path / "whole"))
    data = (tmp_path / "whole").read_bytes()
    header, rng = data.index(b"\n"), random.Random(0)
    for bit in rng.sample(range(8 * len(data)), 150):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        (tmp_path / "j").write_bytes(damaged)
        if bit // 8 <= header:
            with pytest.raises(InputError, match="j, line 1: "):
                measured(model, tmp_path / "j")
            assert (tmp_path / "j").read_bytes() == damaged
        else:
            assert json_bytes(measured(model, tmp_path / "j")) == whole, bit
            assert json_bytes(measured(model, tmp_path / "j")) == whole, bit


def test_progress_counts_units_to_the_end(model: ToyModel, tmp_path: Path) -> None:
    told: list[tuple[float, float]] = []
    measured(model, tmp_path / "j", batch=6, progress=lambda *args: told.append(args))
    done, totals = zip(*told)
    each = [start_cost(6, 3, i) for i in range(5)]
    assert done == tuple(np.cumsum([0, sum(each[:2]), sum(each[2:4]), each[4], sum(each[:2]), sum(each[2:4]), each[4]]))
    assert set(totals) == {2 * sum(each)}


KILLED = textwrap.dedent(
    """
    import os, random, signal, sys, time, torch
    from pathlib import Path
    sys.path.insert(0, sys.argv[1])
    from lemica_trt.testing.toy_model import ToyModel, awkward
    from lemica_trt.calibrate.exact import measure
    from lemica_trt.core.values import write_value
    torch.set_num_threads(1)  # no threads, so that this process can be forked: imports take longest by far

    def run(path, kill_after=None):
        # Measure in a child; kill it somewhere behind so many calls of `progress`. Prints the units it began with.
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            found = measure(ToyModel(), awkward(12), ["a cat", "a dog"], samples=3, seed=1, max_skip=4, batch=8,
                            journal=path, progress=lambda *told: os.write(write, b"%d\\n" % told[0]))
            write_value(found, path.with_suffix(".json"))
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as told:
            for count, line in enumerate(told):
                if count == 0:
                    print(line.strip(), flush=True)
                if count == kill_after:
                    time.sleep(random.uniform(0, 0.01))
                    os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0 or kill_after and os.WIFSIGNALED(status), status

    random.seed(int(sys.argv[3]))
    folder = Path(sys.argv[2])
    run(folder / "whole.jsonl")
    for _ in range(6):
        run(folder / "killed.jsonl", kill_after=random.randrange(1, 4))
    run(folder / "killed.jsonl")
    """
)


def test_killed_at_random_moments_it_ends_in_the_same_bytes(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", KILLED, Path(__file__).parent, tmp_path, "3"]
    result = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
    began = [int(line) for line in result.stdout.split()]
    assert len(began) == 8
    assert began[:2] == [0, 0]
    assert began[2:] == sorted(began[2:])
    assert len(set(began)) >= 4, "killed before anything was done"
    assert began[-1] > 0
    assert (tmp_path / "killed.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
    graph, grams = json.loads((tmp_path / "whole.json").read_bytes())
    assert graph["samples"] == grams["samples"] == 3
