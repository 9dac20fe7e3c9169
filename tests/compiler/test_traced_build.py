"""Pipelines that have no family are built end to end: trace, export, engines, plan, run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

import lemica_trt
from lemica_trt.cli.main import main
from lemica_trt.core.values import read_value
from lemica_trt.ir.graphs import FULL, SKIP
from lemica_trt.ir.report import VerifyReport
from lemica_trt.testing.pipelines import tiny_pipeline

pytestmark = [pytest.mark.cpu, pytest.mark.filterwarnings("ignore")]  # of diffusers, transformers and exporters

FLAGS = {
    "flux": ("--height", 32, "--width", 48, "--max-sequence-length", 64),
    "chroma": ("--height", 32, "--width", 48, "--max-sequence-length", 64),
    "hunyuanvideo": ("--height", 32, "--width", 48, "--frames", 9),
    "ltx": ("--height", 32, "--width", 64, "--frames", 9),
}

GRAPHS = ("combine", FULL.name, SKIP.name)

SMALL = ("--samples", 1, "--validation-samples", 1, "--max-skip", 2, "--method", "lemica", "--verify-samples", 1)


def lemica(*arguments: object) -> Result:
    return CliRunner().invoke(main, [*map(str, arguments)], env={"HF_HUB_OFFLINE": "1", "COLUMNS": "120"})


def saved(name: str, folder: Path) -> Path:
    tiny_pipeline(name).save_pretrained(folder)
    return folder


def built(name: str, folder: Path, *flags: object) -> Path:
    source, output = saved(name, folder / name), folder / "bundle"
    done = lemica(
        *("build", "--model", source, *FLAGS[name], "--denoising-steps", 5),
        *(*(flags or ("--schedule", "0,2,4", "--verify-samples", 1)), "--quiet", "--output", output),
    )
    assert done.exit_code == 0, done.output
    return output


@pytest.mark.parametrize("name", [name for name in FLAGS if name != "flux"])
def test_the_uncached_plan_of_a_bundle_is_the_pipeline(name: str, tmp_path: Path) -> None:
    require_agreement(built(name, tmp_path))


def require_agreement(bundle: Path) -> None:
    report = read_value(VerifyReport, bundle / "reports" / "verify.json")
    found = {(run.plan, run.against): run.difference for run in report.agreement}
    assert found["uncached", "diffusers"] < 1e-4
    assert max(found.values()) < 1e-4
    assert {check.role for check in report.graphs} >= {*GRAPHS, "text_encoder", "vae_decoder"}
    with lemica_trt.load(bundle) as pipe:
        made = pipe.bundle.engine().builds[FULL.name]
    assert made.fused_attention == made.attentions > 0


def test_one_command_makes_a_plan_for_a_budget(tmp_path: Path) -> None:
    output = built("flux", tmp_path, "--budget", 3, *SMALL)
    require_agreement(output)
    with lemica_trt.load(output) as pipe:
        assert pipe.bundle.plan().budget == 3
        one, other = (pipe(prompt, seed=3) for prompt in ("a red bird", "a green house"))
        again = pipe("a red bird", seed=3)
    assert one.frames.shape == (1, 32, 48, 3)
    assert np.array_equal(one.latents, again.latents)
    assert not np.array_equal(one.latents, other.latents)
    done = lemica("run", output, "a red bird", "--output", tmp_path / "x.png", "--quiet")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "x.png").stat().st_size > 100


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("latte", "LattePipeline cannot be built yet: shapes follow the length of the prompt"),
        ("mochi", "one whose shapes follow its data"),
        ("cogvideox", "expected a profile of the family cogvideox"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(name: str, line: str, tmp_path: Path) -> None:
    source = saved(name, tmp_path / name)
    size = ("--height", 32, "--width", 32 if name == "latte" else 48, "--frames", {"latte": 4, "mochi": 7}.get(name, 9))
    done = lemica(
        "build",
        "--model",
        source,
        *size,
        "--denoising-steps",
        5,
        "--budget",
        3,
        *SMALL,
        "--quiet",
        "--output",
        tmp_path / "out",
    )
    assert done.exit_code in (2, 5), done.output
    assert line in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
