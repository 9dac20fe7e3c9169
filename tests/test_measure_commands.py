"""`bench`, `compare` and `plan` on a finished bundle, as they are typed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from command import result_of

from lemica_trt.bundle.reading import Bundle
from lemica_trt.cli.main import main
from lemica_trt.core.values import read_value
from lemica_trt.ir.measured import Bench

pytestmark = pytest.mark.cpu


def typed(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "80", "NO_COLOR": "1"}).invoke(main, list(map(str, arguments)))


@pytest.fixture(scope="module")
def bundle(built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Plans b4 (the default one), b5 and uncached."""
    return shutil.copytree(built[0], tmp_path_factory.mktemp("measured") / "bundle")


def test_bench_times_plans_in_turns_and_row_by_row(bundle: Path, tmp_path: Path) -> None:
    times = tmp_path / "new" / "times.json"
    done = typed(
        *("bench", bundle, "--plan", "b4,uncached", "--iterations", 3, "--duration", 0, "--warmUp", 1),
        *("--batch", 2, "--exportTimes", times),
    )
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert f"the folder {times.parent} is not there, and will be made" in done.stderr
    found = read_value(Bench, times)
    assert (found.batch, found.bundle) == (2, Bundle.open(bundle).digest) and found.memory > 10_000_000
    assert found.device_memory is None  # ONNX Runtime on the CPU
    plan, uncached = found.plans
    assert [p.plan for p in found.plans] == ["b4", "uncached"] and len(plan.latency) == len(uncached.latency) == 3
    for each in found.plans:
        parts = zip(each.text, each.denoise, each.decode, each.latency)
        assert all(0 < text + denoise + decode <= whole for text, denoise, decode, whole in parts)
        assert min(each.latency) <= each.percentile(50) <= each.percentile(99) <= max(each.latency)
    assert [row.variant for row in uncached.rows] == ["full"] * 8 + [None]
    assert sum(row.variant == "full" for row in plan.rows) == 4
    assert all(len(row.seconds) == 3 for row in plan.rows)
    assert "3 requests of each plan, 2 at once" in " ".join(done.stdout.split())


def test_bench_runs_at_least_so_long(bundle: Path) -> None:
    done = typed("bench", bundle, "--iterations", 1, "--duration", 1.5, "--json")
    (plan,) = result_of(done.stdout)["plans"]
    assert plan["plan"] == "b4" and sum(plan["latency"]) > 0.5 and len(plan["latency"]) > 1


def test_compare_says_how_alike_two_plans_are(bundle: Path) -> None:
    done = typed("compare", f"{bundle}:b5", "uncached", "--samples", 2)
    assert done.exit_code == 0, done.output
    said = " ".join(done.stdout.split())
    assert "5 full in both only in A: none only in B: " in said and "B takes" in said
    assert max(map(len, done.stdout.splitlines())) <= 80
    found = result_of(typed("compare", f"{bundle}:b5", "uncached", "--samples", 2, "--json").stdout)
    report = json.loads((bundle / "reports" / "verify.json").read_text())
    verified = next(row for row in report["quality"] if (row["plan"], row["method"]) == ("b5", "plan"))
    assert found["psnr"][0] == pytest.approx(verified["each_psnr"][0], abs=1e-6)  # the same prompts and seeds
    assert len(found["psnr"]) == len(found["ssim"]) == len(found["samples"]) == 2
    assert found["a"]["full_steps"] != found["b"]["full_steps"] == list(range(8))


def test_compare_fails_where_plans_are_less_alike_than_asked(bundle: Path) -> None:
    done = typed("compare", f"{bundle}:b4", "b5", "--samples", 1, "--min-psnr", 99)
    assert done.exit_code == 9 and "expected at least 99 dB between b4 and b5, got " in done.stderr
    assert "PSNR dB" in done.stdout  # what was found is printed all the same
    assert typed("compare", f"{bundle}:b4", "b5", "--samples", 1, "--min-psnr", 1).exit_code == 0


def test_two_bundles_of_the_same_model_are_identical(bundle: Path, tmp_path: Path) -> None:
    other = shutil.copytree(bundle, tmp_path / "other")
    assert typed("plan", other, "--rename", "b4=same", "-q").exit_code == 0
    done = typed("compare", bundle, other, "--samples", 1)
    assert done.exit_code == 0 and "clips    identical" in done.stdout and "the same full steps" in done.stdout


@pytest.mark.parametrize(("arguments", "fix"), [
    (("compare", "{b}:b4", "b4"), "name another: b5 or uncached"),
    (("compare", "{b}:b6", "b4"), "use one of: b4, b5, uncached"),
    (("bench", "{b}", "--plan", "b4,b4"), "name each once"),
    (("bench", "{b}", "--batch", "99"), "--batch "),
    (("bench", "{b}", "--export-times", "{b}"), "name a file in it"),
    (("plan", "{b}", "--rename", "b4"), "for example --rename b15=good"),
    (("plan", "{b}", "--remove", "uncached"), "leave it out"),
])  # fmt: skip
def test_mistakes(arguments: tuple[str, ...], fix: str, bundle: Path) -> None:
    done = typed(*(word.format(b=bundle) for word in arguments))
    assert done.exit_code == 2 and f"→ {fix}" in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_plan_says_what_it_made_and_inspect_remembers(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    known = {plan["rows_digest"] for plan in json.loads((copy / "reports" / "plans.json").read_text())["plans"]}
    assert known == {Bundle.open(copy).plan(name).rows_digest for name in ("b4", "b5", "uncached")}
    done = typed("plan", copy, "--budget", "6", "--method", "lemica")
    assert done.exit_code == 0, done.output
    assert "2 held-out clips on onnxruntime, 28 full steps" in done.stderr
    assert f"added    b6; not compared with PyTorch: lemica-trt verify {copy}" in done.stdout
    rows = {cells[0]: cells for line in done.stdout.splitlines() if (cells := line.split()) and len(cells) > 5}
    decibels = float(rows["b6"][2])
    assert 20 < decibels < 80 and rows["uncached"][2] == "ref."
    assert typed("plan", copy, "--rename", "b6=good", "--default", "good", "-q").exit_code == 0
    shown = typed("inspect", copy).stdout
    assert f"{decibels:.1f}" in next(line for line in shown.splitlines() if line.startswith(" good"))
    assert max(map(len, shown.splitlines())) <= 80
    assert typed("plan", copy, "--remove", "good", "--default", "b4", "-q").exit_code == 0
    assert Bundle.open(copy).plans == ("b4", "b5", "uncached")


def test_what_the_bundle_has_is_not_made_again(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    before = Bundle.open(copy).digest
    for budget in (("--budget", "8"), ("--latency", "1000s"), ("--speedup", "1"), ("--budget", "4,5")):
        done = typed("plan", copy, *budget)
        assert done.exit_code == 0 and "the bundle has it" in done.stderr, done.output
        assert "added" not in done.stdout and "held-out clips on" not in done.stderr
    assert Bundle.open(copy).digest == before
    done = typed("plan", copy, "--schedule", "0,1,2,3,4,5,6,7")
    assert done.exit_code == 0 and Bundle.open(copy).plans == ("b4", "b5", "uncached")


def test_nothing_is_run_where_no_clip_is_asked_for(bundle: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle, tmp_path / "copy")
    done = typed("plan", copy, "--budget", "6", "--verify-samples", "0")
    assert done.exit_code == 0 and "held-out clips on" not in done.stderr and " b6 " in done.stdout
