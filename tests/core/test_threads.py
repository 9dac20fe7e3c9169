"""How many threads a process may use: what it is told, its affinity, its control group."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lemica_trt.core import threads
from lemica_trt.core.threads import cpu_share, usable_threads

pytestmark = pytest.mark.null


def test_omp_num_threads_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    for text, expected in (("3", 3), ("4,2", 4), (" 1 ", 1)):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert usable_threads() == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "many"])
def test_what_is_no_number_is_left_aside(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 2, 5}, raising=False)
    for share, expected in ((None, 3), (0.5, 1), (1.2, 2), (16.0, 3)):
        monkeypatch.setattr(threads, "cpu_share", lambda share=share: share)
        assert usable_threads() == expected


@pytest.mark.parametrize(
    ("files", "membership", "share"),
    [
        ({"cpu.max": "150000 100000\n"}, "0::/\n", 1.5),
        ({"cpu.max": "max 100000\n"}, "0::/\n", None),
        ({}, "0::/\n", None),
        ({"cpu.max": "max 100000", "a/cpu.max": "400000 100000", "a/b/cpu.max": "50000 100000"}, "0::/a/b\n", 0.5),
        ({"a/cpu.max": "100000 100000", "a/b/cpu.max": "300000 100000"}, "1:x:/y\n0::/a/b\n", 1.0),
        (
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "200000\n", "cpu,cpuacct/a/cpu.cfs_period_us": "100000\n"},
            "5:memory:/b\n4:cpu,cpuacct:/a\n",
            2.0,
        ),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, "4:cpu:/\n", None),
        ({"cpu.max": "nonsense"}, "0::/\n", None),
    ],
)
def test_the_share_of_a_control_group(
    tmp_path: Path, files: dict[str, str], membership: str, share: float | None
) -> None:
    for name, text in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "self").write_text(membership)
    assert cpu_share(tmp_path / "cgroup", tmp_path / "self") == share
    assert cpu_share(tmp_path / "none", tmp_path / "none") is None
