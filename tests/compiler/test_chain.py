"""A second family through the whole chain: Wan 2.1 (one stream, flow matching, UniPC) with random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny
from command import lemica

from lemica_trt.bundle.reading import Bundle
from lemica_trt.core.values import read_value
from lemica_trt.ir.trials import TrialTables

pytestmark = pytest.mark.cpu

PROFILE = """
family = "wan"
source = {source}
dtype = "fp32"
text_length = {length}
[shape]
frames = 5
height = 32
width = 32
max_batch = 2
[sampling]
steps = 6
guidance_scale = 3.0
[calibration]
samples = 2
max_skip = 3
validation_samples = 2
"""


def test_wan_from_folder_to_verified_bundle_and_clip(tmp_path: Path) -> None:
    folder = tiny.tiny_wan(tmp_path / "wan")
    profile = tmp_path / "wan-random.toml"
    profile.write_text(PROFILE.format(source=json.dumps(str(folder)), length=tiny.TEXT_LENGTH))
    output = tmp_path / "bundle"
    done = lemica("build", "--model", profile, "--budget", "4", "--method", "linear,stock:unipc",
                  "--verify-samples", "1", "--output", output)  # fmt: skip
    assert done.returncode == 0, done.stderr
    bundle = Bundle.open(output)
    assert bundle.plan().scheduler == "UniPCMultistepScheduler"
    # A multistep sampler, folded: as many rows as full steps and the last, which read outputs far back.
    assert len(bundle.plan().rows) == 5 and bundle.plan().output_history >= 3
    trials = read_value(TrialTables, output / "calibration" / "selection.json").tables[0]
    assert trials.best.label == bundle.plan().method and len(trials.trials) == 2
    assert bundle.manifest.profile.source == "wan"  # no path of this machine
    assert str(tmp_path).encode() not in b"".join(path.read_bytes() for path in output.rglob("*") if path.is_file())
    report = json.loads((output / "reports" / "verify.json").read_text())
    against = {(run["plan"], run["against"]): run["difference"] for run in report["agreement"]}
    assert against["uncached", "diffusers"] <= 1e-4 and against["b4", "torch"] <= 1e-4
    clip = tmp_path / "clip.gif"
    done = lemica("run", output, "a prompt", "--output", clip, "--quiet")
    assert done.returncode == 0, done.stderr
    assert clip.read_bytes()[:6] == b"GIF89a"
    done = lemica("verify", output, "--quiet")
    assert done.returncode == 2 and "--weights" in done.stderr
