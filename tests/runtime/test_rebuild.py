"""The command that builds engines again where they do not fit: it works, and nothing but the engines changes."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from command import lemica

from lemica_trt.bundle.reading import Bundle


@pytest.mark.cpu
def test_it_makes_the_same_bundle_here(built: tuple[Path, subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    shutil.copytree(built[0], tmp_path / "bundle")
    bundle = Bundle.open(tmp_path / "bundle")
    words = shlex.split(bundle.rebuild_command(bundle.engine().key))
    assert words[:2] == ["lemica-trt", "engine"]
    done = lemica(*words[1:])
    assert done.returncode == 0, done.stderr
    here = Bundle.open(tmp_path / "bundle-here")
    here.check()
    assert here.manifest == bundle.manifest, "the same backend on the same machine: the same bundle"
    done = lemica(*words[1:-1], tmp_path / "bundle")
    assert done.returncode == 2 and "another folder" in done.stderr
