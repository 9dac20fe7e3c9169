"""Noise from a seed: torch's numbers."""

from __future__ import annotations

import hashlib
from time import perf_counter

import numpy as np
import pytest

from lemica_trt.core.errors import UsageError
from lemica_trt.runtime.random import Generator


@pytest.mark.cpu
@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, 2**32 - 1, 2**32 + 5, 2**62 + 12345])
@pytest.mark.parametrize("shape", [(16,), (17,), (31,), (1, 3, 16, 8, 8), (1000003,), (2**20 + 16,), (2**20 + 3,)])
def test_draws_are_those_of_torch(seed: int, shape: tuple[int, ...]) -> None:
    import torch

    theirs, ours = torch.Generator("cpu").manual_seed(seed), Generator(seed)
    for _ in range(2):  # the second draw goes on where the first one ended
        expected = torch.randn(shape, generator=theirs).numpy()
        found = ours.randn(shape)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@pytest.mark.null
def test_pinned_numbers() -> None:
    """torch.randn(16, generator=torch.Generator().manual_seed(42)), torch 2.13; the same on every Python and numpy."""
    expected = [1.926915, 1.487284, 0.900717, -2.105521, 0.678418, -1.234545, -0.043067, -1.604667, -0.752135, 1.648723]
    found = Generator(42).randn((16,))
    np.testing.assert_allclose(found[:10], expected, atol=2e-6)


@pytest.mark.null
def test_a_long_draw_is_normal() -> None:
    numbers = Generator(3).randn((10, 1_000_000))
    assert abs(numbers.mean()) < 1e-3
    assert abs(numbers.std() - 1) < 1e-3
    assert np.isfinite(numbers).all()


@pytest.mark.benchmark
@pytest.mark.null
def test_a_long_draw_is_fast() -> None:
    start = perf_counter()
    Generator(3).randn((10, 1_000_000))
    assert perf_counter() - start < 3.0  # 0.4 s alone on one core


@pytest.mark.null
def test_same_seed_same_bytes() -> None:
    digests = {hashlib.sha256(Generator(7).randn((999,)).tobytes()).hexdigest() for _ in range(2)}
    assert len(digests) == 1
    assert (Generator(7).randn((999,)) != Generator(8).randn((999,))).any()
    np.testing.assert_array_equal(Generator(np.int64(7)).randn((16,)), Generator(7).randn((16,)))


@pytest.mark.null
@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, "1", None, True])
def test_bad_seeds(seed: object) -> None:
    with pytest.raises(UsageError, match="seed must be an integer"):
        Generator(seed)  # type: ignore[arg-type]


@pytest.mark.null
def test_few_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        Generator(0).randn((15,))
