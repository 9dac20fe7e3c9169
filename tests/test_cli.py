"""The command line as a user types it: a bundle from one command, from the stages one by one, and every mistake."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
from command import PAPER, SMALL, in_process, lemica, result_of

from lemica_trt.bundle.manifest import manifest_digest_line
from lemica_trt.bundle.reading import Bundle
from lemica_trt.bundle.workspace import work_folder
from lemica_trt.core.errors import EXIT_CODES
from lemica_trt.core.values import read_value
from lemica_trt.ir.calibration import ErrorGraph, TrajectoryGrams
from lemica_trt.ir.plan import StepPlan
from lemica_trt.ir.resources import profile_names
from lemica_trt.ir.trials import TrialTables
from lemica_trt.planning.planner import auto_methods

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore::DeprecationWarning")]  # of diffusers


def test_build_makes_a_verified_bundle(built: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    output, done = built
    bundle = Bundle.open(output)
    bundle.check()
    assert bundle.plans == ("b4", "b5", "uncached")
    assert bundle.plan().name == "b4"
    assert [len(bundle.plan(name).full_steps) for name in bundle.plans] == [4, 5, 8]
    report = json.loads((output / "reports" / "verify.json").read_text())
    differences = {(run["plan"], run["against"]): run["difference"] for run in report["agreement"]}
    assert set(differences) == {("b4", "torch"), ("b5", "torch"), ("uncached", "diffusers")}
    assert max(differences.values()) <= 1e-4
    # Baselines are of the default plan; LeMiCa's is this very plan.
    ways = {(row["plan"], row["method"]) for row in report["quality"]}
    assert ways == {("b4", "plan"), ("b4", "fewer-steps"), ("b5", "plan")}
    # Plans beside the default one run on a third of the clips, rounded up.
    assert {(row["plan"], len(row["each_psnr"])) for row in report["quality"]} == {("b4", 2), ("b5", 1)}
    assert "2 held-out clips (b5: 1 clip) against the uncached run" in done.stdout
    assert (output / "reports" / "contact_sheet.png").stat().st_size > 1000
    assert "b4" in done.stdout and "PSNR" in done.stdout
    assert str(output) in done.stdout.replace("\n", "")


def test_build_again_does_nothing_again(built: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    output, _ = built
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    (journal,) = output.with_name("bundle.work").glob("journals/journal-*.jsonl")
    finished = journal.read_bytes()
    done = lemica("build", *SMALL, *PAPER, "--budget", "4,5", "--verify-samples", "2", "--output", output)
    assert done.returncode == 0, done.stderr
    assert re.search(r"export +unchanged", done.stderr) and re.search(r"verify +unchanged", done.stderr)
    assert journal.read_bytes() == finished
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}


def test_a_bundle_that_does_not_verify_replaces_none(
    built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The old one stays as it is, the new one lies beside it with its report."""

    from lemica_trt.compiler import work_commands
    from lemica_trt.compiler.requests import BuildRequest
    from lemica_trt.core.errors import VerificationError
    from lemica_trt.core.progress import Quiet
    from lemica_trt.evaluate import verify

    output = tmp_path / "bundle"
    shutil.copytree(built[0], output)
    shutil.copytree(work_folder(built[0]), work_folder(output))
    before = {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    profile = Bundle.open(output).manifest.profile
    request = BuildRequest(budgets=(3,), methods=("uniform",), verify_samples=1)
    monkeypatch.setattr(verify.VerifyReport, "failures", lambda report: ["the graphs differ"])
    with pytest.raises(VerificationError, match=rf"the graphs differ → do not deploy {output}\.unverified; report it"):
        work_commands.build(profile, output, request, Quiet())
    assert before == {path: path.read_bytes() for path in output.rglob("*") if path.is_file()}
    candidate = Bundle.open(tmp_path / "bundle.unverified")
    assert candidate.plans == ("b3", "uncached") and (candidate.path / "reports" / "verify.json").is_file()
    monkeypatch.undo()
    built_again = work_commands.build(profile, output, request, Quiet())
    assert built_again.report is not None and built_again.bundle.path == output
    assert built_again.bundle.plans == ("b3", "uncached")
    assert not candidate.path.exists()


def test_stages_one_by_one_make_the_same_bundle(
    built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    work, output = tmp_path / "work", tmp_path / "bundle"
    for arguments in (
        ("calibrate", *SMALL, "--output", work),
        ("plan", work, *PAPER, "--budget", "4,5"),
        ("export", work),
        ("engine", work, "--output", output),
        ("verify", output, "--verify-samples", "1"),
    ):
        done = lemica(*arguments)
        assert done.returncode == 0, (arguments, done.stderr)
    assert Bundle.open(output).manifest == Bundle.open(built[0]).manifest


def test_stages_refuse_what_another_profile_left(tmp_path: Path) -> None:
    work = tmp_path / "work"
    for steps in (6, 8):
        small = ("--model", "cogvideox-tiny", "--samples", "1", "--max-skip", "1", "--denoising-steps", steps)
        assert in_process("calibrate", *small, "--output", work).returncode == 0
        if steps == 6:
            assert in_process("plan", work, *PAPER, "--budget", "4").returncode == 0
    assert in_process("export", work, "--quiet").returncode == 0
    engine = ("engine", work, "--output", tmp_path / "bundle", "--quiet")
    done = in_process(*engine)
    assert done.returncode == 3 and f"lemica-trt plan {work}" in done.stderr
    assert in_process("plan", work, *PAPER, "--budget", "5").returncode == 0
    shutil.rmtree(work / "onnx")
    done = in_process(*engine)
    assert done.returncode == 3 and f"lemica-trt export {work}" in done.stderr
    assert not (tmp_path / "bundle").exists()


def test_cheap_calibration_says_what_it_costs_before_and_after(tmp_path: Path) -> None:
    work = tmp_path / "work"
    done = in_process("calibrate", *SMALL, "--calibration", "secant", "--output", work)
    assert done.returncode == 0, done.stderr
    assert re.search(r"calibrate +secant: 1 samples, up to 3 steps skipped: \d+ samplings' work", done.stderr)
    counted = re.search(r"(\d+) full steps, \d+ skipped steps were run: ([\d.]+) samp", done.stderr)
    assert counted is not None and float(counted[2]) == pytest.approx(int(counted[1]) / 8, abs=0.05)
    graph = read_value(ErrorGraph, work / "calibration" / "error_graph.json")
    assert (graph.method, graph.samplings) == ("secant", int(counted[1]) / 8)
    assert read_value(TrajectoryGrams, work / "calibration" / "grams.json").sampler_digest == graph.sampler_digest
    assert in_process("plan", work, "--budget", "4").returncode == 0
    (trials,) = read_value(TrialTables, work / "calibration" / "selection.json").tables
    assert {trial.label for trial in trials.trials} == set(auto_methods(8)) and trials.of == "frames"


def test_plan_adds_to_a_bundle_without_torch(
    built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    copy = tmp_path / "moved"
    shutil.copytree(built[0], copy)
    done = lemica("plan", copy, "--budget", "6", "--default", "b6", "--json")
    assert done.returncode == 0, done.stderr
    assert Bundle.open(copy).plan().full_steps[0] == 0
    assert Bundle.open(copy).plan().budget == 6 and "skip" in {row.variant for row in Bundle.open(copy).plan().rows}
    assert {plan["name"] for plan in result_of(done.stdout)["plans"]} == {"b4", "b5", "b6", "uncached"}


def test_report_is_the_page_that_build_wrote(
    built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Without PyTorch, and small; a bundle whose reports are gone has a page too."""
    written = (built[0] / "reports" / "report.html").read_bytes()
    done = lemica("report", built[0], "-o", tmp_path / "page.html", "--json")
    assert done.returncode == 0, done.stderr
    assert result_of(done.stdout) == {"output": str(tmp_path / "page.html"), "bytes": len(written)}
    assert (tmp_path / "page.html").read_bytes() == written and len(written) < 2_000_000
    assert str(tmp_path).encode() not in written and str(built[0].parent).encode() not in written
    copy = tmp_path / "copy"
    shutil.copytree(built[0], copy, ignore=shutil.ignore_patterns("reports"))
    done = lemica("report", copy)
    assert done.returncode == 0 and b"Not verified" in (copy / "reports" / "report.html").read_bytes()
    Bundle.open(copy).check()


def test_run_writes_a_clip(built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    for flags, side in (((), 256), (("--scale", 1), 64)):  # small clips are enlarged, unless told otherwise
        done = lemica(
            *("run", built[0], "a big red circle moves left", "--plan", "default", "--seed", 7, "-o", clip, "--json"),
            *flags,
        )
        assert done.returncode == 0, done.stderr
        found = result_of(done.stdout)
        assert (found["plan"], found["scale"]) == ("b4", side // 64)
        import av

        with av.open(str(clip)) as container:
            frames = list(container.decode(video=0))
        assert (len(frames), frames[0].height, frames[0].width) == (9, side, side)
    done = lemica("run", built[0], "a big red circle moves left", "-o", tmp_path / "clip.gif", "-q")
    assert done.returncode == 0 and "4 times as large, --scale 1: as it is" in done.stdout


def test_inspect_shows_bundle_plan_and_graph(built: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    output, _ = built
    for arguments, words in (
        ((output,), ("cogvideox-tiny", "b4", "uncached", "onnxruntime")),
        ((output, "--plan", "b4"), ("full", "skip")),
        ((output / "plans" / "b5.json",), ("full", "skip")),
        ((output / "calibration" / "error_graph.json",), ("skip 1", "cogvideox-tiny")),
    ):
        done = lemica("inspect", *arguments)
        assert done.returncode == 0, done.stderr
        for word in words:
            assert word in done.stdout, (arguments, word)
    whole = result_of(lemica("inspect", output, "--json").stdout)
    assert whole["measured"]["uncached"]["psnr"] == [] and len(whole["measured"]["b4"]["psnr"]) == 2
    plan = result_of(lemica("inspect", output, "--plan", "b4", "--json").stdout)
    assert (
        tuple(row["step"] for row in plan["rows"] if "variant" in row and "caches" not in row)
        == read_value(StepPlan, output / "plans" / "b4.json").full_steps
    )


def test_dry_run_does_nothing(tmp_path: Path) -> None:
    done = lemica("build", *SMALL, "--budget", "4", "--output", tmp_path / "bundle", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    stages = {stage["name"]: stage for stage in result_of(done.stdout)}
    assert list(stages) == [
        "lower",
        "layout",
        "export",
        "engine",
        "draft",
        "calibrate",
        "fit",
        "select",
        "plan",
        "bundle",
        "verify",
    ]
    assert stages["calibrate"]["seconds"] > 0 and stages["export"]["disk"] > 1_000_000
    assert list(tmp_path.iterdir()) == []


def test_doctor_counts_the_named_models() -> None:
    done = lemica("doctor", "--json")
    assert done.returncode == 0, done.stderr
    found = {check["what"]: check["found"] for check in result_of(done.stdout)}
    assert found["named models"] == f"{len(profile_names())}, see lemica-trt models"


MISTAKES: tuple[tuple[tuple[str, ...], int, str], ...] = (
    (("build",), 2, "--model"),
    (("build", "--model", "cogvideo-tiny"), 2, "did you mean cogvideox-tiny"),
    (("build", "--model", "cogvideox-tiny", "--budget", "fifteen"), 2, "integers"),
    (("build", "--model", "cogvideox-tiny", "--denoising-steps", "1"), 2, "steps"),
    (("build", "--model", "cogvideox-tiny", "--weights", "nowhere"), 3, "nowhere"),
    (("build", "--model", "cogvideox-tiny", "--frames", "8"), 3, "frames"),
    (("build", "--model", "cogvideox-tiny", "--height", "60"), 3, "height"),
    (("build", "--model", "cogvideox-tiny", "--scheduler", "NoScheduler"), 2, "NoScheduler"),
    (("build", "--model", "cogvideox-tiny", "--schedule", "0,7,3"), 2, "schedule[2]"),
    (("build", "--model", "cogvideox-tiny", "--budget", "99", "--method", "uniform"), 6, "99"),
    (("build", "--model", "cogvideox-tiny", "--backend", "abacus"), 2, "abacus"),
    (("build", "--model", "cogvideox-tiny", "--dtype", "bf16"), 5, "bf16"),
    (("build", "--model", "cogvideox-tiny", "--budget", "3"), 6, "5 … 50"),
    (("build", "--model", "cogvideox-tiny", "--error-graph", "none.json"), 3, "none.json"),
    (("build", "--model", "cogvideox-tiny", "--method", "published"), 3, "cogvideox-tiny"),
    (("run", "nowhere", "a prompt", "-o", "x.mp4"), 3, "nowhere"),
    (("build", "--model", "cogvideox-tiny", "--opset", "7"), 2, "opset"),
    (("build", "--model", "cogvideox-tiny", "--output", "/etc"), 2, "/etc"),
    (("build", "--model", "cogvideox-tiny", "--device", "abacus"), 7, "abacus"),
    (("build", "--model", "wan2.1-t2v-1.3b", "--weights", "nowhere", "--dtype", "fp16"), 3, "nowhere"),
    (("build", "--model", "cogvideox-tiny", "--schedule", "0,7", "--budget", "2"), 2, "together with --budget"),
    (("build", "--model", "cogvideox-tiny", "--error-graph", "g.json", "--samples", "2"), 2, "together with --samples"),
    (
        ("build", "--model", "cogvideox-tiny", "--method", "lemica,best"),
        2,
        "unipc, teacache, uniform, got 'best'",
    ),
    (("build", "--model", "cogvideox-tiny", "--solver", "fitted"), 2, "--method fitted"),
    (("build", "--model", "cogvideox-tiny", "--reuse", "residual"), 2, "--method lemica"),
    (("build", "--model", "wan-tiny", "--sigmas", "1,0.5,x", "--budget", "2"), 2, "numbers separated by commas"),
    (("build", "--model", "wan-tiny", "--sigmas", "0.5,1", "--budget", "2"), 2, "sigmas must fall"),
    (("build", "--model", "cogvideox-tiny", "--timesteps", "900,500", "--budget", "2"), 5, "takes timesteps"),
    (("frobnicate",), 2, "frobnicate"),
)


@pytest.mark.parametrize(
    ("arguments", "code", "word"), MISTAKES, ids=lambda value: " ".join(value) if isinstance(value, tuple) else None
)
def test_mistakes_get_one_line_and_their_exit_code(
    arguments: tuple[str, ...], code: int, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    quiet = "--quiet" if arguments[0] == "build" else "-q"
    done = in_process(*arguments, quiet)
    assert done.returncode == code, done.stderr
    assert code in EXIT_CODES
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("lemica-trt: ") and word in lines[0], done.stderr
    assert "Traceback" not in done.stderr


def test_altered_bundle_is_not_loaded(built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    copy = tmp_path / "altered"
    shutil.copytree(built[0], copy)
    loaded = Bundle.open(copy).engine().files["full"]
    (copy / loaded).write_bytes(b"x" * 100)
    done = in_process("run", copy, "a prompt", "-o", tmp_path / "x.mp4", "--quiet")
    assert done.returncode == 4 and loaded in done.stderr
    assert not (tmp_path / "x.mp4").exists()
    done = in_process("verify", copy, "--samples", "2", "--quiet")  # whatever its report says
    assert done.returncode == 4 and loaded in done.stderr
    (copy / "manifest.json").write_bytes((copy / "manifest.json").read_bytes()[:-2] + b"\xff}")
    done = in_process("inspect", copy)
    assert (done.returncode, len(done.stderr.splitlines())) == (4, 1)


def test_a_default_alone_plans_nothing(built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built[0], copy)
    before = {name: built[0].joinpath("plans", f"{name}.json").read_bytes() for name in ("b4", "b5", "uncached")}
    assert in_process("plan", copy, "--default", "b5", "--quiet").returncode == 0
    assert Bundle.open(copy).plan().name == "b5"
    assert {file.stem: file.read_bytes() for file in (copy / "plans").iterdir()} == before
    done = in_process("plan", copy, "--default", "b6", "--quiet")
    assert done.returncode == 2 and "b6" in done.stderr
    done = in_process("plan", copy, "--budget", "4", "--device", "cpu", "--quiet")
    assert done.returncode == 2 and "got device: a bundle is planned without the model" in done.stderr


def test_what_a_build_would_only_find_at_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").write_text("x")
    done = in_process("build", *SMALL, "--output", tmp_path / "b", "--triton", tmp_path, "--dry-run")
    assert done.returncode == 2 and "expected a model repository" in done.stderr
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        done = in_process("build", *SMALL, "--output", tmp_path / "b", "--provider", "cuda", "--dry-run")
        assert done.returncode == 7 and "CUDAExecutionProvider" in done.stderr
    monkeypatch.chdir(tmp_path)
    assert work_folder(Path()) == tmp_path.with_name(f"{tmp_path.name}.work")


@pytest.mark.parametrize("error", ["torch.OutOfMemoryError('CUDA out of memory. Tried 2 GiB')", "MemoryError()"])
def test_out_of_memory_is_one_line(error: str, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import torch, lemica_trt.compiler.work_commands as p\nfrom lemica_trt.cli.main import main\n"
        f"def fail(*_, **__): raise {error}\n"
        "p.build = fail\nmain(['build', '--model', 'cogvideox-tiny'])\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert done.returncode == 7 and done.stderr.startswith("lemica-trt: out of memory"), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_verify_finds_a_graph_that_computes_something_else(
    built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """A bundle whose digests are all right, but whose skip graph adds twice the residual."""
    import hashlib

    import onnx

    copy = tmp_path / "wrong"
    shutil.copytree(built[0], copy)
    file = copy / "onnx" / "skip.onnx"
    model = onnx.load(file)
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == "trunk_0":
                node.input[index] = "doubled"
    model.graph.node.insert(0, onnx.helper.make_node("Add", ["trunk_0", "trunk_0"], ["doubled"]))
    data = model.SerializeToString()
    file.write_bytes(data)
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["files"]["onnx/skip.onnx"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    (copy / "manifest.json").write_text(json.dumps(manifest))
    (copy / "manifest.sha256").write_bytes(manifest_digest_line((copy / "manifest.json").read_bytes()))
    done = in_process("verify", copy, "--verify-samples", "1", "--quiet")
    assert done.returncode == 9, done.stderr
    assert "graph skip differs from PyTorch" in done.stderr and "plan b4 differs from torch" in done.stderr
    report = json.loads((copy / "reports" / "verify.json").read_text())
    wrong = {
        graph["role"]
        for graph in report["graphs"]
        if graph["difference"] > max(1e-3 * graph["scale"], graph["role"] == "vae_decoder")
    }
    assert wrong == {"skip"}


def test_bad_output_suffix_is_refused_before_any_work(built: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    done = lemica("run", built[0], "a prompt", "-o", "clip.avi", "--quiet")
    assert done.returncode == 2 and ".mp4" in done.stderr
