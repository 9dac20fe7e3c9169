"""LeMiCa's search: the lexicographic minimax path through an error graph (NeurIPS 2025, arXiv 2511.00090, eq. 5).

Among all paths 0 → N of the error graph with exactly B full steps, the one whose edge errors, sorted descending, are
lexicographically least. `minimax_paths` is the search on bare arrays; it takes parallel edges of different cost.

Knows the error graph and numbers only.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from lemica_trt.core.errors import InfeasibleError
from lemica_trt.ir.calibration import ErrorGraph
from lemica_trt.ir.schedule import Schedule

IntArray = npt.NDArray[np.int64]


FloatArray = npt.NDArray[np.float64]


def solve(graph: ErrorGraph, budgets: Sequence[int] | None = None) -> dict[int, Schedule]:
    """The lexicographic minimax schedule of every budget (LeMiCa eq. 5), exact.

    Paths run 0 → N. An edge (i, i + 1) weighs 0 and costs 1; a cached edge weighs its error and costs
    `Edge.cost`; a path costs exactly B. Its key is the weights sorted descending (padded with zeros where costs
    make paths differ in length); the least key wins. The paper is silent on ties: here the path whose sequence
    of (stop, cost) is least wins, which is, where every cost is 1, the least tuple `full_steps`: full steps early.

    Args:
        graph: measured edges; an edge that is missing cannot be taken.
        budgets: each B asked for; None: every feasible one.

    Returns:
        Budget → schedule, rising.

    Raises:
        InfeasibleError: a budget lies outside 1 … N, or no path costs exactly that.
    """
    edges = _edges_from_graph(graph)
    paths = minimax_paths(edges, graph.num_steps, _feasible_budgets(edges, graph, budgets))
    return {budget: _schedule_from_path(edges, path, graph.num_steps) for budget, path in paths.items()}


class Edges(NamedTuple):
    """Edges as arrays [E], sorted by (start, stop, cost). Several may join the same (start, stop)."""

    starts: IntArray
    stops: IntArray
    weights: FloatArray
    costs: IntArray

    def where(self, mask: npt.NDArray[np.bool_]) -> Edges:
        """The edges that a mask [E] keeps."""
        return Edges(self.starts[mask], self.stops[mask], self.weights[mask], self.costs[mask])


def edges_from_tuples(tuples: Iterable[tuple[int, int, float, int]]) -> Edges:
    """`Edges` of (start, stop, weight, cost) tuples in any order."""
    rows = sorted(tuples, key=lambda edge: (edge[0], edge[1], edge[3], edge[2]))
    starts, stops, weights, costs = zip(*rows)
    return Edges(np.array(starts), np.array(stops), np.array(weights, float), np.array(costs))


def minimax_paths(edges: Edges, num_steps: int, budgets: Sequence[int]) -> dict[int, list[int]]:
    """Lexicographic minimax paths 0 → N of exactly each cost; `solve` on bare arrays, parallel edges welcome.

    Dynamic programming over (cost c of the rest of the path, node i), from N backwards. It is exact because
    inserting the same number into two descending vectors keeps their order. Weights become ranks (0: weight 0),
    and a state keeps the descending rank vector v of its best rest path. Putting an edge of rank ρ in front gives
    the vector u with

        u[p] = max(v[p], min(v[p − 1], ρ)),    v[−1] = ∞,

    so the candidates of all nodes of a layer are compared one column p after the other, only those that are
    still tied, and only the winner's u is ever written.

    Args:
        edges: all of them, also (i, i + 1); weights ≥ 0, at least one of them 0.
        num_steps: N.
        budgets: costs that some path has (see `path_costs`).

    Returns:
        Budget → indices into `edges`, in path order.
    """
    if len(budgets) == 0:
        return {}
    levels, ranks = np.unique(edges.weights, return_inverse=True)
    wanted = sum(1 << budget for budget in set(budgets))
    # The largest bottleneck of any budget bounds every edge of every optimum: heavier edges leave before the search.
    bound = bisect.bisect_left(
        range(len(levels)), True, key=lambda rank: path_costs(edges.where(ranks <= rank), num_steps) & wanted == wanted
    )
    kept = np.flatnonzero(ranks <= bound)
    starts, stops, costs, rank = edges.starts[kept], edges.stops[kept], edges.costs[kept], ranks[kept].astype(np.int32)

    top, nodes = max(budgets), num_steps + 1
    ring = int(costs.max()) + 1  # a layer looks back that many layers at most, itself counted
    columns = np.zeros((top + 1, ring * nodes), np.int32)  # column p + 1: v[p] of state (c % ring)·nodes + i
    columns[0] = np.iinfo(np.int32).max  # v[−1]
    reached = np.zeros((top + 1, nodes), bool)
    reached[0, num_steps] = True
    choice = np.full((top + 1, nodes), -1)
    for cost in range(1, top + 1):
        layer = cost - costs
        alive = np.flatnonzero((layer >= 0) & reached[layer, stops])
        state = layer[alive] % ring * nodes + stops[alive]
        best = _least_insertion(columns, state, rank[alive], starts[alive])
        state, winner = state[best], alive[best]
        target = cost % ring * nodes + starts[winner]
        columns[1:, target] = np.maximum(columns[1:, state], np.minimum(columns[:-1, state], rank[winner]))
        reached[cost, starts[winner]] = True
        choice[cost, starts[winner]] = kept[winner]
    return {budget: _path(edges, choice, budget) for budget in sorted(set(budgets))}


def _least_insertion(
    columns: npt.NDArray[np.int32], state: IntArray, rank: npt.NDArray[np.int32], owner: IntArray
) -> IntArray:
    """Of each owner's candidates the first with the least inserted vector (see `minimax_paths`).

    Args:
        columns: int32 [1 + width, states], the vectors of all states column by column, ∞ first.
        state, rank, owner: [candidates]; vector, what is inserted, and whose candidate it is (sorted).

    Returns:
        Indices of the winners, one per owner, rising.
    """
    candidate = np.arange(len(owner))
    for before, here in pairwise(columns):
        heads = _heads(owner)
        if len(heads) == len(owner):
            break
        value = np.maximum(here[state], np.minimum(before[state], rank))
        least = np.minimum.reduceat(value, heads)
        tied = value == np.repeat(least, np.diff(heads, append=len(owner)))
        candidate, state, rank, owner = candidate[tied], state[tied], rank[tied], owner[tied]
        if not least.any():  # only zeros follow
            break
    return candidate[_heads(owner)]


def path_costs(edges: Edges, num_steps: int) -> int:
    """Costs that paths 0 → N have, as a bit set: bit B is on where some path costs exactly B."""
    costs = [0] * num_steps + [1]  # of paths node → N
    for start, stop, cost in zip(*(array[::-1].tolist() for array in (edges.starts, edges.stops, edges.costs))):
        costs[start] |= costs[stop] << cost
    return costs[0]


def least_budget(num_steps: int, max_skip: int | None, switches: Sequence[int] = ()) -> int:
    """⌈N/(K + 1)⌉, the fewest full steps of a schedule that skips at most K steps in a row; 1 where K is None.

    Args:
        switches: steps of another kind than the one before, where residuals are reused: each begins a path of its own,
            and the fewest are the sum of theirs.
    """
    longest = num_steps if max_skip is None else max_skip + 1
    return sum(-(-(end - begin) // longest) for begin, end in pairwise([0, *switches, num_steps]))


def require_feasible(num_steps: int, max_skip: int, budgets: Sequence[int], switches: Sequence[int] = ()) -> None:
    """Ask before hours of calibration whether a complete error graph could have a path for each budget.

    Args:
        switches: as in `least_budget`.

    Raises:
        InfeasibleError: a budget lies outside `least_budget` … N.
    """
    least = least_budget(num_steps, max_skip, switches)
    kinds = f", of {len(switches) + 1} kinds," if switches else ""
    for budget in budgets:
        if not least <= budget <= num_steps:
            raise InfeasibleError(
                f"budget: expected {least} … {num_steps} full steps{kinds} where at most {max_skip} in a row are "
                f"skipped, got {budget}",
                fix=f"ask for {least} … {num_steps}, or raise --max-skip",
            )


def _feasible_budgets(edges: Edges, graph: ErrorGraph, budgets: Sequence[int] | None) -> Sequence[int]:
    """The budgets asked for, or all feasible ones.

    Raises:
        InfeasibleError: one of them is not feasible.
    """
    costs = path_costs(edges, graph.num_steps)
    feasible = [budget for budget in range(1, graph.num_steps + 1) if costs >> budget & 1]
    for budget in () if budgets is None else budgets:
        if budget not in feasible:
            raise InfeasibleError(
                f"budget: expected a number of full steps that some path over {graph.num_steps} steps with at most "
                f"{graph.max_skip} skipped in a row has, got {budget}",
                fix=f"ask for {_ranges(feasible)}, or calibrate with another max_skip",
            )
    return feasible if budgets is None else budgets


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers, readable: [1, 2, 3, 5] → `1 … 3 or 5`."""
    breaks = [k for k in range(1, len(numbers)) if numbers[k] != numbers[k - 1] + 1]
    runs = [numbers[a:b] for a, b in zip((0, *breaks), (*breaks, len(numbers)))]
    return " or ".join(str(run[0]) if len(run) == 1 else f"{run[0]} … {run[-1]}" for run in runs)


def _edges_from_graph(graph: ErrorGraph) -> Edges:
    """All edges of a graph, with those of length 1, which weigh 0 and cost 1."""
    return edges_from_tuples(
        chain(
            ((i, i + 1, 0.0, 1) for i in range(graph.num_steps)),
            ((edge.start, edge.stop, edge.error, edge.cost) for edge in graph.edges),
        )
    )


def _heads(owner: IntArray) -> IntArray:
    """Where each run of equal numbers begins."""
    return np.flatnonzero(np.diff(owner, prepend=-1))


def _path(edges: Edges, choice: IntArray, budget: int) -> list[int]:
    """Follow the chosen edges from (budget, step 0) to the end."""
    path, node, cost = [], 0, budget
    while cost > 0:
        edge = int(choice[cost, node])
        path.append(edge)
        node, cost = int(edges.stops[edge]), cost - int(edges.costs[edge])
    return path


def _schedule_from_path(edges: Edges, path: Sequence[int], num_steps: int) -> Schedule:
    cached = [edge for edge in path if edges.stops[edge] > edges.starts[edge] + 1]
    return Schedule(
        num_steps=num_steps,
        full_steps=tuple(edges.starts[path].tolist()),
        bottleneck=tuple(sorted(edges.weights[cached].tolist(), reverse=True)),
    )
