"""Which initializer is which parameter, followed through what the exporter's optimizer does to constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from msgspec import UNSET
from torch import Tensor, nn

from lemica_trt.backends.build import graphs_digest
from lemica_trt.export.graphs import _quiet
from lemica_trt.export.weights import Parameter, constants_of, named_weights, weight_table, without
from lemica_trt.ir.graphs import Weight

pytestmark = pytest.mark.cpu


class Net(nn.Module):
    """Every way in which a weight may end up in a graph."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.small, self.large = nn.Linear(6, 6), nn.Linear(6, 600)
        self.back = nn.Linear(600, 600)
        self.conv = nn.Conv1d(1, 2, 3)
        self.reduced, self.both = nn.Linear(6, 6), nn.Linear(6, 6)
        self.equal, self.same = nn.Linear(6, 4, bias=False), nn.Linear(6, 4, bias=False)
        self.unused = nn.Linear(6, 6)
        with torch.no_grad():
            self.same.weight.copy_(self.equal.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.small(x[:, None, :])
        x = x * (self.reduced.weight * 2).sum(0)
        x = self.both(x) + self.both.weight.exp().sum(1)
        x = x + self.conv(x[:, :1]).sum()
        return self.back(self.large(x)).sum(-1) + self.equal(x).sum(-1) + self.same(x).sum(-1)


def test_what_became_of_each() -> None:
    net = Net().eval()
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(net, (torch.ones(2, 6),), dynamo=True, optimize=False, verbose=False)
        assert program is not None
        before = constants_of(program.model.graph, named_weights({"transformer": net}))
        program.optimize()
    graph = program.model.graph
    table, fixed = weight_table(graph, before)
    left = without(table, fixed)
    assert {its.name for its in left.values()} == {f"{name}.weight" for name in ("small", "large", "back", "conv")}
    gone = {its.name.removesuffix(".weight") for its in fixed}
    assert gone == {"reduced", "both", "equal", "same"}
    for name, its in left.items():
        values, own = graph.initializers[name].const_value.numpy(), net.get_parameter(its.name).detach().numpy()
        assert its.part == "transformer" and its.shape == own.shape
        assert np.array_equal(values.T if its.transposed else values, own)
    assert {bool(its.transposed) for its in left.values()} == {True, False}


def test_parameters_that_one_graph_has_fixed() -> None:
    table = {"x": Weight(part="a", name="p.weight", shape=(2, 2)), "y": Weight(part="b", name="p.weight", shape=(2, 2))}
    assert set(without(table, {Parameter("a", "p.weight")})) == {"y"}


@pytest.mark.parametrize("case", ["sincos", "rotary", "wan", "wan-fp16"])
def test_step_graphs_name_all_weights(case: str, exported_case: Callable[[str], Any]) -> None:
    """Of families: whole or transposed, in each precision; other graphs name none."""
    found = exported_case(case)
    parameters = dict(found.model.pipeline.transformer.named_parameters())
    named = {name for name, value in parameters.items() if value.dim() >= 2 and name.endswith(".weight")}
    for graph in found.graphs.graphs:
        table = graph.weights or {}
        if graph.dit is None:
            assert not table
            continue
        assert {its.name for its in table.values()} <= named
        assert graph.dit == "part" or {its.name for its in table.values()} == named
        for tensor in onnx.load(found.folder / graph.file).graph.initializer:
            if tensor.name in table:
                its, values = table[tensor.name], onnx.numpy_helper.to_array(tensor)
                want = parameters[its.name].detach().numpy()
                assert np.array_equal(values.T if its.transposed else values, want)


def test_nothing_else_follows_the_names(exported_case: Callable[[str], Any]) -> None:
    """Engines of the same files keep their keys."""
    found = exported_case("rotary")
    unnamed = tuple(msgspec.structs.replace(graph, weights=UNSET) for graph in found.graphs.graphs)
    old = msgspec.structs.replace(found.graphs, graphs=unnamed)
    assert graphs_digest(found.graphs, found.folder) == graphs_digest(old, found.folder)
