"""How many threads a process may use."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")


def usable_threads() -> int:
    """`OMP_NUM_THREADS` where it is set; else one for each CPU that the process may run on (its affinity), or as many
    as the CPU time that its control group gives it, rounded up."""
    asked = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = cpu_share()
    return cpus if share is None else max(1, min(cpus, math.ceil(share)))


def cpu_share(root: Path = CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> float | None:
    """CPUs' worth of time that the control group of this process gives it, the least of all groups that it is in; None:
    no limit.

    Args:
        root: where control groups are mounted.
        membership: the file that names this process's own.
    """
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    folders = []
    for line in lines or ["0::/"]:
        controllers, _, own = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        names = [part for part in own.split("/") if part]
        folders += [root.joinpath(controllers, *names[:depth]) for depth in range(len(names) + 1)]
    found = [share for share in map(_share_of, folders) if share is not None]
    return min(found, default=None)


def _share_of(folder: Path) -> float | None:
    """Of one control group, version 2 (`cpu.max`) or 1."""
    for quota, period in (("cpu.max", None), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
        try:
            numbers = (folder / quota).read_text(encoding="utf-8").split()
            if period is not None:
                numbers += (folder / period).read_text(encoding="utf-8").split()
            share = int(numbers[0]) / int(numbers[1])
            return share if share > 0 else None  # version 1 writes -1 for no limit
        except (OSError, ValueError, IndexError, ZeroDivisionError):  # not there, or "max"
            continue
    return None
