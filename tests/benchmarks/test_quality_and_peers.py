"""The benchmarks of quality on a small bundle: both run, and measure what they say."""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from record import Peers, Quality
from torch import Tensor, nn
from torch.nn import functional

from lemica_trt.core.values import read_value

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]
Built = tuple[Path, subprocess.CompletedProcess[str]]


def benchmark(script: str, *arguments: object) -> str:
    """Its standard output."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quality_measures_flip(built: Built, tmp_path: Path) -> None:
    pytest.importorskip("flip_evaluator")
    printed = benchmark("quality.py", built[0], "--clips", 1, "--output", tmp_path / "quality.json")
    result = read_value(Quality, tmp_path / "quality.json")
    assert "| FLIP to 8 steps |" in printed
    assert all(len(row.flip) == 1 and 0 < row.flip[0] < 1 for row in result.rows)
    nearest, furthest = (end(result.rows, key=lambda row: row.psnr[0]) for end in (max, min))
    assert nearest.flip[0] < furthest.flip[0]


@pytest.mark.long
def test_peers_run_are_counted_or_say_why_not(built: Built, tmp_path: Path) -> None:
    compared = ("dpcache", "l2p", "magcache", "mean-velocity", "teacache")
    chosen = ("the plan", "stock:unipc", *compared, "TaylorSeer", "TaylorSeer, lite", "SmoothCache", "DBPrune")
    benchmark("peers/run.py", built[0], "--clips", 2, "--only", *chosen, "--output", tmp_path / "peers.json")
    result = read_value(Peers, tmp_path / "peers.json")
    rows = {(row.method, row.setting): row for row in result.rows}
    assert {method for method, _ in rows} == set(chosen) and (result.steps, result.blocks) == (8, 6)
    for budget in (4, 5):
        plan, stock = rows["the plan", f"B = {budget}, lemica"], rows["stock:unipc", f"B = {budget}"]
        assert plan.full_steps == stock.full_steps == pytest.approx((budget, budget))
        assert len(plan.psnr) == len(plan.seconds) == 2 and min(plan.psnr) > 10
        for name in compared:
            other = rows[name, f"B = {budget}"]
            assert not other.refusal and other.full_steps == pytest.approx((budget, budget)) and min(other.psnr) > 10
    lite = rows["TaylorSeer, lite", "interval 2, order 1"]
    assert set(lite.full_steps) == {5.0}, "steps 0, 1, 2, 4 and 6 of 8"
    assert rows["TaylorSeer", "interval 2, order 1"].refusal == "runs every step in full"
    assert "has no SmoothCacheConfig" in rows["SmoothCache", ""].refusal
    if importlib.util.find_spec("cache_dit") is None:
        assert "No module named 'cache_dit'" in rows["DBPrune", ""].refusal


class Block(nn.Module):
    """A linear layer of 4 to 6 numbers, and attention over what it gives."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)

    def forward(self, hidden: Tensor) -> Tensor:
        found = self.linear(hidden)
        return functional.scaled_dot_product_attention(found, found[..., :5, :], value=found[..., :5, :2])


def test_work_is_linear_layers_and_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks" / "peers"))
    transformer = SimpleNamespace(blocks=nn.ModuleList([Block(), Block()]))
    task = SimpleNamespace(model=SimpleNamespace(family=SimpleNamespace(block_lists=("blocks",))))
    counter = importlib.import_module("peer").WorkCounter(task, SimpleNamespace(transformer=transformer))
    original, linear, hidden = functional.scaled_dot_product_attention, 3 * 7 * 6 * 4, torch.ones(3, 7, 4)
    with counter.attention():
        found = transformer.blocks[0](hidden)
    assert found.shape == (3, 7, 2)
    assert counter.take() == linear + 3 * (7 * 5 * 6 + 7 * 5 * 2) and counter.take() == 0
    assert functional.scaled_dot_product_attention is original
    transformer.blocks[1](hidden)
    assert counter.take() == linear
