"""Passes over exported graphs: the same numbers before and after."""

from __future__ import annotations

import numpy as np
import onnx_ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from lemica_trt.export.passes import clean_model, remove_idle_squeeze, rewrite_bool_where

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore")]  # of the exporter


class Masks(nn.Module):
    """Truth values chosen by truth values, twice, and numbers chosen by them."""

    def forward(self, choice: Tensor, mask: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        filled = mask.masked_fill(choice, True)
        return torch.where(choice, filled, ~mask), torch.where(filled, numbers, -numbers)


def test_where_of_truth_values_becomes_logic() -> None:
    generator = torch.Generator().manual_seed(0)
    choice, mask = (torch.rand(4, 5, generator=generator) > 0.5 for _ in range(2))
    numbers = torch.randn(4, 5, generator=generator)
    exported = torch.onnx.export(Masks(), (choice, mask, numbers), dynamo=True, opset_version=20, verbose=False)
    assert exported is not None
    model = exported.model
    assert rewrite_bool_where(model) >= 2
    assert rewrite_bool_where(model) == 0
    clean_model(model, {})
    left = [node.outputs[0].dtype for node in model.graph if node.op_type == "Where"]
    assert left == [onnx_ir.DataType.FLOAT]
    data = onnx_ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    got = session.run(None, dict(zip(names, (choice.numpy(), mask.numpy(), numbers.numpy()))))
    for result, expected in zip(got, Masks()(choice, mask, numbers)):
        assert np.array_equal(result, expected.numpy())


class Squeezes(nn.Module):
    """One that does something, and two that do nothing."""

    def forward(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return numbers.squeeze(1).squeeze(0) * 2, numbers.squeeze(2)


def test_squeezes_of_other_sizes_than_1_are_removed() -> None:
    numbers = torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(0))
    exported = torch.onnx.export(Squeezes(), (numbers,), dynamo=True, opset_version=20, verbose=False)
    assert exported is not None
    model = exported.model
    before = sum(node.op_type == "Squeeze" for node in model.graph)
    removed = remove_idle_squeeze(model)
    assert before - removed == 1
    assert remove_idle_squeeze(model) == 0
    data = onnx_ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    got = session.run(None, {session.get_inputs()[0].name: numbers.numpy()})
    for result, expected in zip(got, Squeezes()(numbers)):
        assert np.array_equal(result, expected.numpy())
