"""Complex numbers, attention without heads, stable sorts, and sizes taken by `int()`, before a program becomes ONNX."""

from __future__ import annotations

from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lemica_trt.core.errors import UnsupportedError
from lemica_trt.export.real import RealProgram, is_complex, symbolic_int, with_heads, with_plain_sorts

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore")]  # of torch.export


class Rotary(nn.Module):
    """A rotary embedding as complex products, for any number of tokens."""

    def __init__(self) -> None:
        super().__init__()
        angles = torch.outer(torch.arange(64.0), 1.0 / 10 ** torch.arange(0, 1, 0.25))
        self.register_buffer("freqs", torch.polar(torch.ones_like(angles), angles))

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x = inputs["x"]
        first, second = self.freqs.split([2, 2], dim=1)
        freqs = torch.cat([second, first], dim=-1)[: x.shape[1]].unsqueeze(0)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        return {"y": torch.view_as_real(pairs * freqs).flatten(2)}


def shapes() -> tuple[dict[str, dict[int, object]]]:
    return ({"x": {1: torch.export.Dim("tokens", min=1, max=64)}},)


def test_complex_products_become_real_ones_at_any_length() -> None:
    module, example = Rotary().eval(), {"x": torch.zeros(2, 29, 8)}
    program = torch.export.export(module, (example,), dynamic_shapes=shapes(), strict=False)
    assert is_complex(program)
    real = torch.export.export(RealProgram(program), (example,), dynamic_shapes=shapes(), strict=False)
    assert not is_complex(real)
    for tokens in (1, 5, 64):
        given = {"x": torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(tokens))}
        torch.testing.assert_close(real.module()(given)["y"], module(given)["y"])


@pytest.mark.parametrize("is_last", [True, False])
def test_attention_without_heads_is_exported(is_last: bool, tmp_path: Path) -> None:
    class Attention(nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            x, mask = inputs["x"], inputs["mask"] > 0
            found = functional.scaled_dot_product_attention(x, 2 * x, 3 * x, attn_mask=mask)
            return {"y": found if is_last else found + x}

    draw = torch.Generator().manual_seed(1)
    given = {"x": torch.randn(2, 7, 8, generator=draw), "mask": torch.rand(2, 7, 7, generator=draw) + 0.3}
    given["mask"] = given["mask"].floor() + torch.eye(7)
    program = torch.export.export(Attention(), (given,), strict=False)
    with_heads(program)
    exported = torch.onnx.export(program, (), dynamo=True, opset_version=20, input_names=list(given), verbose=False)
    assert exported is not None
    exported.save(tmp_path / "attention.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "attention.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
    torch.testing.assert_close(torch.from_numpy(found), Attention()(given)["y"])


@pytest.mark.parametrize("descending", [False, True])
def test_stable_sorts_are_exported(descending: bool, tmp_path: Path) -> None:
    """Indices of many equal numbers, and the numbers; along the first dimension, too."""

    class Sorted(nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            x = inputs["x"]
            values, places = torch.sort(x, dim=0, stable=True, descending=descending)
            return {
                "order": torch.argsort(1 - x, dim=1, stable=True, descending=descending),
                "values": values,
                "places": places,
            }

    given = {"x": torch.randint(0, 3, (40, 50), generator=torch.Generator().manual_seed(1), dtype=torch.int32)}
    program = torch.export.export(Sorted(), (given,), strict=False)
    with_plain_sorts(program)
    exported = torch.onnx.export(program, (), dynamo=True, opset_version=20, input_names=list(given), verbose=False)
    assert exported is not None
    exported.save(tmp_path / "sorted.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "sorted.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
    for array, wanted in zip(found, Sorted()(given).values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(array), wanted)


def test_an_operator_without_a_real_form_is_refused() -> None:
    class Exponential(nn.Module):
        def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
            return {"y": torch.view_as_real(torch.exp(torch.view_as_complex(inputs["x"])))}

    given = {"x": torch.zeros(3, 2)}
    program = torch.export.export(Exponential(), (given,), strict=False)
    with pytest.raises(UnsupportedError, match=r"aten\.exp.* of complex numbers"):
        RealProgram(program)(given)


def test_sizes_stay_symbols_within_and_int_is_itself_behind() -> None:
    from diffusers.models import normalization
    from diffusers.models.normalization import RMSNorm

    module = RMSNorm(8, eps=1e-6)
    with symbolic_int(module):
        replaced = vars(normalization)["int"]
        assert replaced("12") == 12 and replaced(3.7) == 3 and isinstance(5, replaced) and not isinstance("5", replaced)
    assert "int" not in vars(normalization)
