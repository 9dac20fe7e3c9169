"""The minimax search: against brute force, and the theorems that hold for it."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given as forall
from hypothesis import settings
from hypothesis import strategies as st

from lemica_trt.core.errors import InfeasibleError
from lemica_trt.core.values import json_bytes, value_from_json
from lemica_trt.ir.calibration import Edge, ErrorGraph
from lemica_trt.ir.schedule import Schedule
from lemica_trt.planning.minimax import (
    Edges,
    edges_from_tuples,
    minimax_paths,
    path_costs,
    require_feasible,
    solve,
)

pytestmark = pytest.mark.null

Key = tuple[list[float], list[tuple[int, int]]]


def graph_of(weights: dict[tuple[int, int], tuple[float, ...]], num_steps: int, max_skip: int) -> ErrorGraph:
    edges = tuple(Edge(start=i, stop=j, errors=errors) for (i, j), errors in sorted(weights.items()))
    return ErrorGraph(
        model="toy",
        revision="0",
        scheduler="Euler",
        sampler_digest="0",
        sampler_probe=(),
        num_steps=num_steps,
        max_skip=max_skip,
        dtype="fp32",
        guidance_scale=1.0,
        negative_prompt="",
        text_length=16,
        latent_shape=(1,),
        samples=len(edges[0].errors) if edges else 1,
        seed=0,
        prompts_digest="0",
        edges=edges,
    )


def spans(num_steps: int, max_skip: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(num_steps) for j in range(i + 2, min(i + max_skip + 1, num_steps) + 1)]


@st.composite
def graphs(draw: st.DrawFn) -> ErrorGraph:
    """Graphs of up to 9 steps; few distinct errors, so that ties are frequent; some edges missing."""
    num_steps = draw(st.integers(2, 9))
    max_skip = draw(st.integers(1, num_steps - 1))
    errors = st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0, 3.0])
    weights = {span: (draw(errors),) for span in spans(num_steps, max_skip) if draw(st.integers(0, 9)) > 0}
    return graph_of(weights, num_steps, max_skip)


@st.composite
def multigraphs(draw: st.DrawFn) -> tuple[Edges, int]:
    """Bare edges, with parallel ones and costs from 1 to 3."""
    num_steps = draw(st.integers(2, 7))
    tuples = [(i, i + 1, 0.0, 1) for i in range(num_steps)]
    for i, j in spans(num_steps, num_steps - 1):
        for _ in range(draw(st.integers(0, 2))):
            tuples.append((i, j, float(draw(st.integers(0, 3))), draw(st.integers(1, 3))))
    return edges_from_tuples(tuples), num_steps


def brute_force(graph: ErrorGraph, budget: int) -> tuple[list[float], tuple[int, ...]] | None:
    """Least (errors descending, full steps) over all subsets of the steps."""
    weights = {(edge.start, edge.stop): edge.error for edge in graph.edges}
    weights |= {(i, i + 1): 0.0 for i in range(graph.num_steps)}
    found = []
    for rest in itertools.combinations(range(1, graph.num_steps), budget - 1):
        steps = (0, *rest)
        segments = list(zip(steps, (*rest, graph.num_steps)))
        if all(segment in weights for segment in segments):
            found.append((sorted((weights[segment] for segment in segments), reverse=True), steps))
    return min(found) if found else None


def brute_force_paths(edges: Edges, num_steps: int) -> dict[int, tuple[Key, list[int]]]:
    """For every cost ≤ N the least key, and the path that has it, over all paths."""
    leaving: dict[int, list[tuple[int, float, int, int]]] = {}
    for index, (start, stop, weight, cost) in enumerate(zip(*(array.tolist() for array in edges))):
        leaving.setdefault(start, []).append((stop, weight, cost, index))
    best: dict[int, tuple[Key, list[int]]] = {}

    def walk(node: int, cost: int, weights: list[float], hops: list[tuple[int, int]], path: list[int]) -> None:
        if node == num_steps:
            padded = sorted(weights, reverse=True) + [0.0] * (num_steps - len(weights))
            if cost <= num_steps and (cost not in best or (padded, hops) < best[cost][0]):
                best[cost] = (padded, hops), path
            return
        for stop, weight, step, index in leaving.get(node, ()):
            walk(stop, cost + step, [*weights, weight], [*hops, (stop, step)], [*path, index])

    walk(0, 0, [], [], [])
    return best


@forall(graphs())
def test_solve_is_brute_force_with_ties(graph: ErrorGraph) -> None:
    expected = {b: key for b in range(1, graph.num_steps + 1) if (key := brute_force(graph, b)) is not None}
    schedules = solve(graph)
    assert list(schedules) == list(expected)
    for budget, (errors, steps) in expected.items():
        schedule = schedules[budget]
        assert schedule.full_steps == steps
        assert schedule.budget == budget
        assert list(schedule.bottleneck) + [0.0] * (budget - len(schedule.bottleneck)) == errors
        assert solve(graph, [budget]) == {budget: schedule}  # alone or with all others: the same


@forall(multigraphs())
def test_minimax_paths_is_brute_force_with_costs_and_parallel_edges(case: tuple[Edges, int]) -> None:
    edges, num_steps = case
    expected = brute_force_paths(edges, num_steps)
    assert {b for b in range(num_steps + 1) if path_costs(edges, num_steps) >> b & 1} == set(expected)
    found = minimax_paths(edges, num_steps, list(expected))
    for budget, (_, path) in expected.items():
        assert found[budget] == path
        assert minimax_paths(edges, num_steps, [budget]) == {budget: path}


def test_edge_costs_of_a_graph_count() -> None:
    edges = (Edge(start=0, stop=3, errors=(1.0,), cost=2), Edge(start=1, stop=4, errors=(2.0,)))
    graph = ErrorGraph(
        **{name: getattr(graph_of({(0, 2): (1.0,)}, 4, 2), name) for name in ErrorGraph.__struct_fields__}
        | {"edges": edges}
    )
    assert {b: s.full_steps for b, s in solve(graph).items()} == {2: (0, 1), 3: (0, 3), 4: (0, 1, 2, 3)}


@forall(graphs(), st.integers(1, 8))
def test_more_skipping_never_worsens(graph: ErrorGraph, max_skip: int) -> None:
    short = {(e.start, e.stop): e.errors for e in graph.edges if e.stop - e.start - 1 <= max_skip}
    longer = solve(graph)
    for budget, schedule in solve(graph_of(short, graph.num_steps, min(max_skip, graph.max_skip))).items():
        padded = [list(s.bottleneck) + [0.0] * budget for s in (longer[budget], schedule)]
        assert padded[0][:budget] <= padded[1][:budget]


@forall(st.integers(3, 12), st.data())
def test_bottleneck_never_grows_with_the_budget_where_errors_grow_with_the_segment(n: int, data: st.DataObject) -> None:
    # Nested segments with nested errors: the error of a segment is a sum over its skipped steps.
    steps = data.draw(st.lists(st.floats(0, 1, allow_subnormal=False), min_size=n, max_size=n))
    graph = graph_of({(i, j): (sum(steps[i + 1 : j]),) for i, j in spans(n, n - 1)}, n, n - 1)
    largest = [max(schedule.bottleneck, default=0.0) for schedule in solve(graph).values()]
    assert all(a >= b - 1e-12 for a, b in itertools.pairwise(largest))
    assert largest[-1] == 0.0


@forall(graphs(), st.sampled_from([lambda x: 7 * x, lambda x: x**3, lambda x: 2.0**x - 1]))
def test_only_the_order_of_errors_matters(graph: ErrorGraph, rising) -> None:
    other = graph_of({(e.start, e.stop): (rising(e.error),) for e in graph.edges}, graph.num_steps, graph.max_skip)
    for budget, schedule in solve(graph).items():
        assert solve(other)[budget].full_steps == schedule.full_steps


@forall(multigraphs(), st.randoms(use_true_random=False))
def test_the_order_in_which_edges_come_does_not_matter(case: tuple[Edges, int], random) -> None:
    edges, _ = case
    tuples = list(zip(*(array.tolist() for array in edges)))
    random.shuffle(tuples)
    for array, other in zip(edges, edges_from_tuples(tuples)):
        np.testing.assert_array_equal(array, other)


def test_ties_take_full_steps_early() -> None:
    graph = graph_of({span: (1.0,) for span in spans(8, 3)}, 8, 3)
    assert solve(graph, [7, 2])[2].full_steps == (0, 4)
    assert solve(graph, [7])[7].full_steps == (0, 1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize(("budget", "says"), [(4, "got 4"), (0, "got 0"), (51, "got 51"), (-1, "got -1")])
def test_infeasible_budget_is_one_clear_line(budget: int, says: str) -> None:
    graph = graph_of({span: (1.0,) for span in spans(50, 9)}, 50, 9)
    with pytest.raises(InfeasibleError) as caught:
        solve(graph, [budget])
    message = str(caught.value)
    assert says in message
    assert "ask for 5 … 50" in message
    assert "\n" not in message


def test_infeasible_budget_names_gaps() -> None:
    edges = edges_from_tuples([(0, 1, 0.0, 1), (1, 2, 0.0, 1), (2, 3, 0.0, 1), (3, 4, 0.0, 1), (0, 4, 1.0, 1)])
    assert path_costs(edges, 4) == 0b10010
    with pytest.raises(InfeasibleError, match="ask for 1 or 4, or calibrate"):
        solve(graph_of({(0, 4): (1.0,)}, 4, 3), [2])


def smooth(num_steps: int, max_skip: int) -> list[tuple[int, int, float, int]]:
    """Errors like the measured ones: U-shaped in position, growing with the length, with noise."""
    noise = np.random.default_rng(0).uniform(0.5, 2, (num_steps + 1, num_steps + 1))
    edges = [(i, i + 1, 0.0, 1) for i in range(num_steps)]
    for i, j in spans(num_steps, max_skip):
        edges.append((i, j, float((j - i - 1) ** 1.5 * (4 * (i / num_steps - 0.5) ** 2 + 0.1) * noise[i, j]), 1))
    return edges


@pytest.mark.benchmark
def test_speed() -> None:
    """Milliseconds where models live, seconds at a thousand steps (limits leave room for a busy machine)."""
    usual, large = edges_from_tuples(smooth(50, 9)), edges_from_tuples(smooth(1000, 50))
    began = time.process_time()
    minimax_paths(usual, 50, range(5, 51))
    assert time.process_time() - began < 1.0
    began = time.process_time()
    path = minimax_paths(large, 1000, [200])[200]
    assert time.process_time() - began < 10.0
    assert len(path) == 200


@forall(graphs())
@settings(max_examples=20)
def test_schedule_survives_json(graph: ErrorGraph) -> None:
    for schedule in solve(graph).values():
        assert value_from_json(Schedule, json_bytes(schedule), where="x") == schedule


@pytest.mark.parametrize(("num_steps", "max_skip"), [(2, 1), (7, 2), (8, 7), (50, 9), (13, 3)])
def test_what_is_feasible_is_known_before_calibration(num_steps: int, max_skip: int) -> None:
    complete = graph_of({span: (1.0,) for span in spans(num_steps, max_skip)}, num_steps, max_skip)
    feasible = set(solve(complete))
    for budget in range(num_steps + 2):
        if budget in feasible:
            require_feasible(num_steps, max_skip, [budget])
        else:
            with pytest.raises(InfeasibleError, match=f"got {budget}"):
                require_feasible(num_steps, max_skip, [budget])
